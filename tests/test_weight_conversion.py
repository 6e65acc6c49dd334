"""Conversions that no small model has, given to one that transformers then loads with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import DENSE, assert_describes, places_in, rewrite, saved

from bam_lora.errors import UserError
from bam_lora.parameter_names import Piece


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


def test_unknown_interface_of_transformers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "mistral", DENSE["mistral"])
    places = places_in(tmp_path)
    monkeypatch.delattr("transformers.core_model_loading.rename_source_key")
    with pytest.raises(UserError, match=r"transformers: expected a version.*rename_source_key.*Install such a version"):
        places["model.norm.weight"]
