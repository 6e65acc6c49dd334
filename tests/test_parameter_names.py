"""Where parameters lie in a checkpoint: against what transformers itself loads from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_models import (
    DENSE,
    EXPERTS,
    GPT2,
    MROPE,
    QWEN3_VISION,
    QWEN_VISION,
    SMALL,
    STORED_EXPERTS,
    VISION,
    VISION_STORED,
    assembled,
    assert_describes,
    places_in,
    rewrite,
    saved,
)

from bam_lora.checkpoint import open_checkpoint
from bam_lora.errors import UserError
from bam_lora.parameter_names import Piece, stored_parameters


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
