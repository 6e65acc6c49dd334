"""Tied embeddings and resized vocabularies in all their mixtures: the fold against PEFT's own models."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapter_kinds import (
    ARCHITECTURES,
    KINDS,
    PEFT_WARNINGS,
    SIZES,
    assert_same_effect,
    load,
    logits,
    make_model,
    train,
)
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bam_lora.cli import app
from bam_lora.dense_methods import DenseOptions
from bam_lora.errors import UserError
from bam_lora.folding import fold

pytestmark = PEFT_WARNINGS


def both_ends(folder: Path, config: Any) -> dict[str, torch.Tensor]:
    """A model's weights, its head among them even if it is tied."""
    model = load(folder, config)
    return {**model.state_dict(), "lm_head.weight": model.get_output_embeddings().weight.detach()}


@pytest.mark.parametrize("second", ["embeddings", "saved-embeddings", "head", "saved-tied", "linear", "tokens"])
def test_token_rows_on_a_tied_model_and_another_adapter(tmp_path: Path, second: str) -> None:
    """Each adapter alone is compared with PEFT, then the mean of both with the mean of what each makes."""
    config = ARCHITECTURES["llama-tied"]()
    model = make_model(config)
    model.save_pretrained(tmp_path / "base")
    base = logits(model)
    wanted = {name: torch.zeros_like(value) for name, value in both_ends(tmp_path / "base", config).items()}
    for kind in ("tokens", second):
        adapted = train(copy.deepcopy(model), len(kind), **KINDS[kind])
        adapted.save_pretrained(tmp_path / kind)
        fold(tmp_path / "base", [tmp_path / kind], tmp_path / f"{kind}-out", any_base=True)
        assert_same_effect(logits(load(tmp_path / f"{kind}-out", config)), logits(adapted), base)
        for name, value in both_ends(tmp_path / f"{kind}-out", config).items():
            wanted[name] += 0.5 * value
    fold(tmp_path / "base", [tmp_path / "tokens", tmp_path / second], tmp_path / "out", any_base=True, verify=True)
    for name, value in both_ends(tmp_path / "out", config).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["embed_tokens", "lm_head"]])
def test_lora_on_a_resized_embedding(tmp_path: Path, targets: list[str], dora: bool) -> None:
    for tied in (True, False):
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
        model = make_model(config)
        model.save_pretrained(tmp_path / "base")
        model.resize_token_embeddings(67)
        base = logits(model, 67)
        adapted = train(model, 1, target_modules=targets, use_dora=dora)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        has_head = any("lm_head" in name for name in kept)
        if tied or has_head:
            fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", any_base=True, verify=True)
            assert_same_effect(logits(load(tmp_path / "out", config), 67), logits(adapted, 67), base)
        else:
            with pytest.raises(UserError, match=r"as many rows .*embed_tokens.weight 67, lm_head.weight 60"):
                fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "new", any_base=True)


def test_a_resized_vocabulary_belongs_to_the_text_part(tmp_path: Path) -> None:
    model = make_model(ARCHITECTURES["llama"]())
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "audio_config": {"vocab_size": 128}}))
    model.resize_token_embeddings(67)
    for seed in (0, 1):
        adapted = train(copy.deepcopy(model), seed, target_modules=["q_proj"])
        adapted.save_pretrained(tmp_path / str(seed), save_embedding_layers=True)
    adapters = [tmp_path / "0", tmp_path / "1"]
    fold(tmp_path / "base", adapters, tmp_path / "out", any_base=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["audio_config"]) == (67, {"vocab_size": 128})
    with pytest.raises(UserError, match=r"embed_tokens.weight \[60, 32\], not \[67, 32\]"):
        fold(tmp_path / "base", adapters, tmp_path / "new", any_base=True, method="dare_linear")


def test_two_names_for_one_stored_tensor(tmp_path: Path) -> None:
    model = make_model(ARCHITECTURES["gemma3-vision"]())
    model.save_pretrained(tmp_path / "base")
    train(model, 1, **KINDS["vision-language"]).save_pretrained(tmp_path / "memory")
    stored = next(
        name for name in load_file(tmp_path / "base" / "model.safetensors") if "layers.0.self_attn.q_" in name
    )
    prefix = stored.partition("layers.0")[0]
    (tmp_path / "disk").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "disk" / file).write_bytes((tmp_path / "memory" / file).read_bytes())
    tensors = load_file(tmp_path / "memory" / "adapter_model.safetensors")
    renamed = {f"base_model.model.{prefix}layers.{name.partition('layers.')[2]}": one for name, one in tensors.items()}
    save_file(renamed, tmp_path / "disk" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"expected one name for it in all adapters, found '.*' and '.*'"):
        fold(tmp_path / "base", [tmp_path / "memory", tmp_path / "disk"], tmp_path / "out", any_base=True)


def test_methods_by_element_see_the_stored_tensors(tmp_path: Path) -> None:
    """Gate and up lie in one parameter in memory, and are two tensors on the disk with a random choice each."""
    model = make_model(ARCHITECTURES["mixtral"]())
    model.save_pretrained(tmp_path / "base")
    train(model, 1, **KINDS["experts"]).save_pretrained(tmp_path / "a")
    how: dict[str, Any] = {"any_base": True, "method": "dare_linear", "options": DenseOptions(0.5)}
    fold(tmp_path / "base", [tmp_path / "a"], tmp_path / "out", **how)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    names = [name for name in before if ".experts.0." in name and before[name].shape == (48, 32)]
    masks = [before[name] != after[name] for name in names]
    assert len(masks) == 4  # gate and up of two layers
    for mask in masks:
        assert 0.4 < mask.double().mean() < 0.6
    assert not any(torch.equal(one, two) for one, two in itertools.pairwise(masks))


def test_a_resized_vocabulary_without_its_tokenizer_is_said(tmp_path: Path) -> None:
    model = make_model(ARCHITECTURES["llama"]())
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(67)
    adapted = train(model, 1, target_modules=["q_proj"])
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    command = ["fold", "--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--any-base"]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "warning: the vocabulary has 67 rows now and the tokenizer is still the base's" in result.stderr
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "other")])
    assert result.exit_code == 0
    assert "warning" not in result.stderr
    assert (tmp_path / "other" / "tokenizer.json").read_text() == "{}"


def test_a_classifier_has_no_head_to_untie(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_labels=3, tie_word_embeddings=True)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "base")
    base = logits(model)
    adapted = train(model, 1, target_modules=["q_proj", "embed_tokens"], task_type="SEQ_CLS")
    adapted.save_pretrained(tmp_path / "adapter")
    fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", any_base=True)
    kinds = transformers.AutoModelForSequenceClassification
    folded, found = kinds.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    assert_same_effect(logits(folded.eval()), logits(adapted), base)
