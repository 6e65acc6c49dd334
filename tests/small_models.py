"""Real architectures made small, and where their parameters lie, compared with what transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from bam_lora.checkpoint import open_checkpoint
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

CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}
QWEN3_VISION = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
MROPE = {
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**SMALL, "intermediate_size": 24, "num_local_experts": 12},
    "qwen3_moe": {**SMALL, "moe_intermediate_size": 24, "num_experts": 12, "num_experts_per_tok": 2},
    "gpt_oss": {**SMALL, "intermediate_size": 24, "num_local_experts": 4},
    "qwen3_5_moe": {
        **SMALL,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_experts": 6,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": SMALL, "vision_config": CLIP, "mm_tokens_per_image": 4},
    "llava": {
        "text_config": {**SMALL, "model_type": "llama"},
        "vision_config": {**CLIP, "model_type": "clip_vision_model", "projection_dim": 16},
    },
    "qwen2_5_vl": {"text_config": {**SMALL, **MROPE}, "vision_config": QWEN_VISION},
}
# How the Hub's checkpoints begin the names of the language model.
VISION_STORED = {"gemma3": "language_model.model.", "llava": "language_model.model.", "qwen2_5_vl": "model."}
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


def places_in(folder: Path) -> Mapping[str, list[Piece]]:
    checkpoint = open_checkpoint(folder)
    return stored_parameters(checkpoint.config, checkpoint.tensors())


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Puts the checkpoint's tensors into another layout."""
    tensors = change(load_file(folder / "model.safetensors"))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


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
