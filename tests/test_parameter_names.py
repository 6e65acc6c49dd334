"""Where parameters lie in a checkpoint: against what transformers itself loads from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bam_lora.checkpoint import open_checkpoint
from bam_lora.errors import UserError
from bam_lora.parameter_names import Piece, stored_parameters

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "tie_word_embeddings": True, "attention_bias": True},
    "mistral": SMALL,
    "qwen3": SMALL,
    "gemma3_text": SMALL,
    "phi3": SMALL,
    "gpt2": GPT2,
    "gpt_neox": SMALL,
}

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**SMALL, "intermediate_size": 24, "num_local_experts": 12},
    "qwen3_moe": {**SMALL, "moe_intermediate_size": 24, "num_experts": 12, "num_experts_per_tok": 2},
    "gpt_oss": {**SMALL, "intermediate_size": 24, "num_local_experts": 4},
}
# Where the Hub's checkpoints have the experts: module, gate, down, up.
STORED_EXPERTS = {
    "mixtral": ("block_sparse_moe", "w1", "w2", "w3"),
    "qwen3_moe": ("mlp", "gate_proj", "down_proj", "up_proj"),
}


def saved(folder: Path, model_type: str, values: Mapping[str, Any], auto: Any = None) -> Any:
    """Saves a model with random numbers in every parameter, and returns it as transformers loads it again."""
    auto = auto or transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(transformers.AutoConfig.for_model(model_type, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return auto.from_pretrained(folder)


def stored_part(stored: Mapping[str, torch.Tensor], piece: Piece, like: torch.Tensor) -> torch.Tensor:
    matrix = stored[piece.tensor] if piece.index is None else stored[piece.tensor][piece.index]
    part = matrix.T if piece.transposed else matrix
    if piece.stored_rows is not None:
        part = part[piece.stored_rows[0] : piece.stored_rows[1]]
    assert piece.rows[1] - piece.rows[0] == (part.shape[0] if part.dim() else 1)
    return part.reshape(like.shape[1:] if like.dim() == 0 else (-1, *like.shape[1:]))


def assembled(stored: Mapping[str, torch.Tensor], pieces: list[Piece], like: torch.Tensor) -> torch.Tensor:
    """The parameter's matrix from its pieces; `like` gives the shape in memory."""
    parts = [stored_part(stored, piece, like) for piece in pieces]
    assert [piece.rows[0] for piece in pieces] == [0, *(piece.rows[1] for piece in pieces)][:-1]
    return parts[0] if like.dim() == 0 else torch.cat(parts)


def assert_describes(folder: Path, model: Any) -> dict[str, list[Piece]]:
    """Every parameter in memory is equal to its pieces from the files, and these use every stored tensor."""
    checkpoint = open_checkpoint(folder)
    stored = {name: tensor for file in checkpoint.shards for name, tensor in load_file(folder / file).items()}
    places = stored_parameters(checkpoint.config, checkpoint.tensors())
    found: dict[str, list[Piece]] = {}
    for name, parameter in model.named_parameters():
        matrices = {f"{name}[{i}]": m for i, m in enumerate(parameter)} if parameter.dim() == 3 else {name: parameter}
        for key, matrix in matrices.items():
            found[key] = places[key]
            torch.testing.assert_close(assembled(stored, found[key], matrix), matrix.data, rtol=0, atol=0, msg=key)
    assert {piece.tensor for pieces in found.values() for piece in pieces} == set(stored)
    assert found.keys() <= set(places)
    return found


@pytest.mark.parametrize("model_type", DENSE)
def test_dense_models(tmp_path: Path, model_type: str) -> None:
    found = assert_describes(tmp_path, saved(tmp_path, model_type, DENSE[model_type]))
    renamed = {name: pieces[0].tensor for name, pieces in found.items() if pieces[0].tensor != name}
    assert renamed == ({"lm_head.weight": "embed_out.weight"} if model_type == "gpt_neox" else {})
    assert all(pieces == [Piece(pieces[0].tensor, None, pieces[0].rows, False)] for pieces in found.values())


@pytest.mark.parametrize("model_type", EXPERTS)
def test_mixture_of_experts(tmp_path: Path, model_type: str) -> None:
    """Fused in memory; on disk one tensor per expert, but for gpt-oss."""
    found = assert_describes(tmp_path, saved(tmp_path, model_type, EXPERTS[model_type]))
    expert = {name: pieces for name, pieces in found.items() if name.startswith("model.layers.1.mlp.experts.")}
    folder = STORED_EXPERTS.get(model_type)
    assert expert["model.layers.1.mlp.experts.down_proj[3]"] == [
        Piece("model.layers.1.mlp.experts.down_proj", 3, (0, 24), False)
        if folder is None
        else Piece(f"model.layers.1.{folder[0]}.experts.3.{folder[2]}.weight", None, (0, 32), False)
    ]
    if folder is not None:
        assert expert["model.layers.1.mlp.experts.gate_up_proj[3]"] == [
            Piece(f"model.layers.1.{folder[0]}.experts.3.{folder[1]}.weight", None, (0, 24), False),
            Piece(f"model.layers.1.{folder[0]}.experts.3.{folder[3]}.weight", None, (24, 48), False),
        ]


def test_tied_parameter_that_is_not_stored_has_no_place(tmp_path: Path) -> None:
    saved(tmp_path, "llama", DENSE["llama"])
    checkpoint = open_checkpoint(tmp_path)
    places = stored_parameters(checkpoint.config, checkpoint.tensors())
    assert "model.embed_tokens.weight" in places
    assert "lm_head.weight" not in places


def test_gpt2_without_the_prefix(tmp_path: Path) -> None:
    """As the Hub's GPT-2 has it, whose config names GPT2LMHeadModel all the same."""
    saved(tmp_path, "gpt2", GPT2)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = assert_describes(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    rows = (0, 32)
    assert found["transformer.h.0.attn.c_attn.weight"] == [Piece("h.0.attn.c_attn.weight", None, rows, False)]


def test_base_model_saved_alone_is_found_from_either_class(tmp_path: Path) -> None:
    base = saved(tmp_path, "gpt2", GPT2, transformers.AutoModel)
    assert_describes(tmp_path, base)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2Model"]
    checkpoint = open_checkpoint(tmp_path)
    places = stored_parameters(checkpoint.config, checkpoint.tensors())
    assert places["transformer.h.1.mlp.c_fc.weight"] == places["h.1.mlp.c_fc.weight"]
