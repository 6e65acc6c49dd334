"""Where parameters lie in a checkpoint: against what transformers itself loads from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
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


@pytest.mark.parametrize("model_type", DENSE)
def test_dense_models(tmp_path: Path, model_type: str) -> None:
    found = assert_describes(tmp_path, saved(tmp_path, model_type, DENSE[model_type]))
    renamed = {name: pieces[0].tensor for name, pieces in found.items() if pieces[0].tensor != name}
    assert renamed == ({"lm_head.weight": "embed_out.weight"} if model_type == "gpt_neox" else {})
    assert all(pieces == [Piece(pieces[0].tensor, None, pieces[0].rows, False)] for pieces in found.values())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
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


@pytest.mark.parametrize("model_type", VISION)
def test_vision_language_models(tmp_path: Path, model_type: str) -> None:
    model = saved(tmp_path, model_type, VISION[model_type], transformers.AutoModelForImageTextToText)
    found = assert_describes(tmp_path, model)
    stored = VISION_STORED[model_type] + "layers.1.self_attn.q_proj.weight"
    assert found["model.language_model.layers.1.self_attn.q_proj.weight"] == [Piece(stored, None, (0, 32), False)]


def test_experts_that_are_transposed_on_loading(tmp_path: Path) -> None:
    """As the Hub has Qwen3-VL-MoE: the names are those in memory, the matrices are not."""
    values = {"text_config": {**EXPERTS["qwen3_moe"], **MROPE}, "vision_config": {**QWEN_VISION, **QWEN3_VISION}}
    saved(tmp_path, "qwen3_vl_moe", values, transformers.AutoModelForImageTextToText)
    rewrite(
        tmp_path,
        lambda tensors: {n: t.transpose(1, 2) if ".experts." in n else t for n, t in tensors.items()},
    )
    found = assert_describes(tmp_path, transformers.AutoModelForImageTextToText.from_pretrained(tmp_path))
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert found[f"{name}[5]"] == [Piece(name, 5, (0, 48), True)]


def test_text_part_of_a_vision_language_model(tmp_path: Path) -> None:
    """AutoModelForCausalLM loads the text part alone, whose parameters have other names than in the whole."""
    values = {"text_config": {**EXPERTS["qwen3_5_moe"]}, "vision_config": {**QWEN_VISION, **QWEN3_VISION}}
    assert_describes(tmp_path, saved(tmp_path, "qwen3_5_moe", values, transformers.AutoModelForImageTextToText))
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(text).__name__ == "Qwen3_5MoeForCausalLM"
    stored, places = load_file(tmp_path / "model.safetensors"), places_in(tmp_path)
    for name in ("model.layers.1.linear_attn.out_proj.weight", "model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(assembled(stored, places[name], text.get_parameter(name)), text.get_parameter(name))
    experts = text.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert torch.equal(assembled(stored, places["model.layers.0.mlp.experts.gate_up_proj[4]"], experts[4]), experts[4])


def test_parameters_that_share_a_stored_tensor(tmp_path: Path) -> None:
    found = assert_describes(tmp_path, saved(tmp_path, "hrm_text", SMALL))
    fused = "model.L_module.layers.0.attn.gqkv_proj.weight"
    key = "model.L_module.layers.0.self_attn.k_proj.weight"
    assert found[key] == [Piece(fused, None, (0, 32), False, stored_rows=(64, 96))]


def test_tied_parameter_that_is_not_stored_has_no_place(tmp_path: Path) -> None:
    saved(tmp_path, "llama", DENSE["llama"])
    places = places_in(tmp_path)
    assert "model.embed_tokens.weight" in places
    assert "lm_head.weight" not in places


def test_gpt2_without_the_prefix(tmp_path: Path) -> None:
    """As the Hub's GPT-2 has it, whose config names GPT2LMHeadModel all the same."""
    saved(tmp_path, "gpt2", GPT2)
    rewrite(tmp_path, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    found = assert_describes(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    rows = (0, 32)
    assert found["transformer.h.0.attn.c_attn.weight"] == [Piece("h.0.attn.c_attn.weight", None, rows, False)]


def test_base_model_saved_alone_is_found_from_either_class(tmp_path: Path) -> None:
    base = saved(tmp_path, "gpt2", GPT2, transformers.AutoModel)
    assert_describes(tmp_path, base)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2Model"]
    places = places_in(tmp_path)
    assert places["transformer.h.1.mlp.c_fc.weight"] == places["h.1.mlp.c_fc.weight"]


@pytest.fixture
def conversion(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Gives Mistral a conversion on loading, for one test."""
    from transformers import conversion_mapping

    def register(source: str | list[str], targets: list[str], operation: Any) -> None:
        converter = transformers.core_model_loading.WeightConverter(source, targets, [operation])
        conversion_mapping.register_checkpoint_conversion_mapping("MistralForCausalLM", [converter])

    yield register
    conversion_mapping._checkpoint_conversion_mapping_cache.pop("MistralForCausalLM", None)
    conversion_mapping.USER_REGISTERED_MAPPINGS.discard("MistralForCausalLM")


def test_tensor_split_by_the_sizes_of_parameters(tmp_path: Path, conversion: Callable[..., None]) -> None:
    if not hasattr(transformers.core_model_loading, "Split"):
        pytest.skip("this version of transformers has no Split")
    saved(tmp_path, "mistral", DENSE["mistral"])

    def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for layer in ("model.layers.0.self_attn", "model.layers.1.self_attn"):
            parts = [tensors.pop(f"{layer}.{part}_proj.weight") for part in "qkv"]
            tensors[f"{layer}.att_proj.weight"] = torch.cat(parts)
        return tensors

    rewrite(tmp_path, fused)
    targets = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    conversion("self_attn.att_proj.weight", targets, transformers.core_model_loading.Split(dim=0))
    found = assert_describes(tmp_path, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    stored = "model.layers.1.self_attn.att_proj.weight"
    assert found["model.layers.1.self_attn.v_proj.weight"] == [Piece(stored, None, (0, 16), False, (48, 64))]


def test_what_cannot_be_followed_is_refused_when_asked_for(tmp_path: Path, conversion: Callable[..., None]) -> None:
    saved(tmp_path, "mistral", DENSE["mistral"])
    name = "self_attn.q_proj.weight"
    conversion(name, [name], transformers.core_model_loading.Interleave(dim=0))
    places = places_in(tmp_path)
    assert places["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(
        UserError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight.*Interleave.*save_original_format"
    ):
        places["model.layers.0.self_attn.q_proj.weight"]


def test_columns_of_a_parameter_are_refused(tmp_path: Path, conversion: Callable[..., None]) -> None:
    saved(tmp_path, "mistral", DENSE["mistral"])
    name = "model.layers.0.self_attn.o_proj.weight"

    def halved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        left, right = tensors.pop(name).chunk(2, dim=1)
        return {**tensors, name.replace("o_proj", "left"): left, name.replace("o_proj", "right"): right}

    rewrite(tmp_path, halved)
    sources = ["self_attn.left.weight", "self_attn.right.weight"]
    conversion(sources, ["self_attn.o_proj.weight"], transformers.core_model_loading.Concatenate(dim=1))
    with pytest.raises(UserError, match=r"self_attn\.left\.weight' cut along its columns"):
        places_in(tmp_path)[name]


def test_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "gpt_neox", DENSE["gpt_neox"])
    checkpoint = open_checkpoint(tmp_path)
    places = stored_parameters({**checkpoint.config, "vocab_size": 100}, checkpoint.tensors())
    with pytest.raises(UserError, match=r"embed_out\.weight' of shape \[96, 32\], not \[100, 32\]\. Check that config"):
        places["lm_head.weight"]


def test_missing_expert_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe", EXPERTS["qwen3_moe"])
    checkpoint = open_checkpoint(tmp_path)
    tensors = checkpoint.tensors()
    del tensors["model.layers.0.mlp.experts.7.down_proj.weight"], tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    places = stored_parameters(checkpoint.config, tensors)
    assert places["model.layers.1.mlp.experts.down_proj[7]"]
    with pytest.raises(UserError, match=r"shape \[11, 32, 24\], not \[12, 32, 24\]"):
        places["model.layers.0.mlp.experts.down_proj[7]"]
    with pytest.raises(
        UserError, match=r"shapes \[12, 24, 32\] and \[11, 24, 32\].*layers\.1\.mlp\.experts\.0\.up_proj"
    ):
        places["model.layers.1.mlp.experts.gate_up_proj[0]"]


def test_matrix_outside_the_parameter_has_no_place(tmp_path: Path) -> None:
    saved(tmp_path, "gpt_oss", EXPERTS["gpt_oss"])
    places = places_in(tmp_path)
    name = "model.layers.0.mlp.experts.down_proj"
    assert f"{name}[3]" in places
    assert not {name, f"{name}[4]", f"{name}[03]", "model.norm.weight[0]"} & set(places)
    with pytest.raises(KeyError):
        places[f"{name}[4]"]


@pytest.mark.parametrize("model_type", ["not-in-transformers", None])
def test_unknown_architecture_keeps_its_names(tmp_path: Path, model_type: str | None) -> None:
    saved(tmp_path, "gpt_oss", EXPERTS["gpt_oss"])
    tensors = open_checkpoint(tmp_path).tensors()
    places = stored_parameters({"model_type": model_type, "auto_map": {"AutoModel": "code.Model"}}, tensors)
    assert places["model.norm.weight"] == [Piece("model.norm.weight", None, (0, 32), False)]
    name = "model.layers.0.mlp.experts.down_proj"
    assert places[f"{name}[1]"] == [Piece(name, 1, (0, 24), False)]
    assert "norm.weight" not in places


def test_config_that_builds_no_model_is_named(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3", DENSE["qwen3"])
    checkpoint = open_checkpoint(tmp_path)
    places = stored_parameters({**checkpoint.config, "hidden_act": "no-such"}, checkpoint.tensors())
    with pytest.raises(UserError, match=r"Qwen3ForCausalLM.*no-such.*Check config\.json"):
        places["model.norm.weight"]
