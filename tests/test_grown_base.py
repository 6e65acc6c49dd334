"""A base with more tokens: every row against a float64 reference, and the model against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bam_lora.errors import UserError
from bam_lora.grown_base import grow_base, grown_rows, row_count
from bam_lora.store import read_json, verify
from tests.adapter_kinds import ARCHITECTURES

PIECES = [(5, 6), (7,), (5, 6, 9, 5), (3, 4)]


def saved_base(folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[kind]()).to(dtype)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("the old one")
    (folder / "tokenizer.model").write_text("the old one")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def new_tokenizer(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text("the new one")
    return folder


def grow(base: Path, tmp_path: Path, first: int, count: int) -> Path:
    facts = grow_base(base, PIECES, first, count, new_tokenizer(tmp_path / "new"), tmp_path / "grown", key="k")
    assert facts["tokenizer"] == str(tmp_path / "new")
    assert verify(tmp_path / "grown", "k") is not None
    return tmp_path / "grown"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_the_means_of_their_pieces_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    old = torch.randn(10, 64).to(dtype)
    grown = grown_rows(old, PIECES, first=8, count=15)
    assert torch.equal(grown[:8], old[:8])
    for place, pieces in enumerate(PIECES):
        reference = old.double()[list(pieces)].mean(dim=0)
        exact = torch.nextafter(reference.float(), torch.tensor(torch.inf)) - reference.float()
        assert ((grown[8 + place].double() - reference).abs() <= 4 * exact + _half_step(reference, dtype)).all()
    assert torch.equal(grown[12:], old[:8].float().mean(dim=0).to(dtype).expand(3, -1))


def _half_step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbouring numbers of a type, in which rounding once may end."""
    return torch.finfo(dtype).eps * 2.0 ** values.abs().log2().floor() / 2


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "gpt-neox", "gemma3"])
def test_the_grown_model_is_the_old_one_with_more_rows(kind: str, tmp_path: Path) -> None:
    old = saved_base(tmp_path / "base", kind)
    grown = grow(tmp_path / "base", tmp_path, first=60, count=row_count(tmp_path / "base", 64, 16))
    assert (grown / "tokenizer.json").read_text() == "the new one"
    assert not (grown / "tokenizer.model").exists()
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        grown, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not loaded["missing_keys"]
    assert not loaded["mismatched_keys"]
    assert model.config.vocab_size == 64
    assert model.config.tie_word_embeddings == old.config.tie_word_embeddings
    for before, after in (
        (old.get_input_embeddings(), model.get_input_embeddings()),
        (old.get_output_embeddings(), model.get_output_embeddings()),
    ):
        assert torch.equal(after.weight, grown_rows(before.weight.detach(), PIECES, 60, 64))
    ids = torch.tensor([[1, 5, 9, 33, 59]])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits[..., :60], old(ids).logits)
    before_files, after_files = (
        load_file(tmp_path / "base" / "model.safetensors"),
        load_file(grown / "model.safetensors"),
    )
    assert before_files.keys() == after_files.keys()
    changed = {name for name, value in before_files.items() if not torch.equal(value, after_files[name][: len(value)])}
    assert not changed


def test_padding_rows_are_used_and_the_tokenizer_replaced_all_the_same(tmp_path: Path) -> None:
    old = saved_base(tmp_path / "base", "llama")
    assert row_count(tmp_path / "base", 58, None) == 60
    grown = grow(tmp_path / "base", tmp_path, first=54, count=60)
    weights = load_file(grown / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(weights[name], grown_rows(old.state_dict()[name], PIECES, 54, 60))
        assert torch.equal(weights[name][58:], old.state_dict()[name][58:])
    assert (grown / "tokenizer.json").read_text() == "the new one"


def test_a_bias_of_the_head_grows_too(tmp_path: Path) -> None:
    saved_base(tmp_path / "base", "llama")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.bias"] = torch.randn(60).to(torch.bfloat16)
    save_file(weights, file, {"format": "pt"})
    grown = load_file(grow(tmp_path / "base", tmp_path, first=60, count=64) / "model.safetensors")
    assert torch.equal(grown["lm_head.bias"], grown_rows(weights["lm_head.bias"][:, None], PIECES, 60, 64)[:, 0])


def test_a_second_table_by_token_is_refused(tmp_path: Path) -> None:
    saved_base(tmp_path / "base", "llama")
    file = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(file), "model.embed_tokens_per_layer.weight": torch.zeros(60, 8)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"one input embedding.*found 'model\.embed_tokens_per_layer\.weight' beside"):
        grow(tmp_path / "base", tmp_path, first=60, count=64)


def test_what_config_says_of_the_vocabulary_of_a_part_of_the_model(tmp_path: Path) -> None:
    saved_base(tmp_path / "base", "gemma3-vision")
    grown = grow(tmp_path / "base", tmp_path, first=60, count=64)
    assert read_json(grown / "config.json")["text_config"]["vocab_size"] == 64
