"""Every kind of LoRA adapter on real architectures made small: the folded model against PEFT's own, unmerged."""

from __future__ import annotations

import copy
import json
from pathlib import Path

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
from versions import before

from bam_lora import adapters
from bam_lora.errors import UserError
from bam_lora.folding import fold
from bam_lora.safetensors_stream import write_stream

pytestmark = PEFT_WARNINGS

ARIA = pytest.mark.skipif(before("peft", "0.21"), reason="PEFT before 0.21 finds no experts in Aria: nothing to fold")
CASES = [
    *[(name, "linear") for name in ARCHITECTURES if name not in ("gpt2", "mixtral", "mamba") and "square" not in name],
    *[("llama", kind) for kind in ("rslora", "patterns", "dora", "embeddings", "embeddings-dora", "head", "both-ends")],
    *[("llama", kind) for kind in ("saved", "saved-embeddings", "tokens")],
    *[("llama-tied", kind) for kind in ("embeddings", "embeddings-tied", "head", "both-ends")],
    *[("llama-tied", kind) for kind in ("saved-embeddings", "saved-tied", "tokens")],
    *[("qwen2", kind) for kind in ("lora-bias", "bias-all", "dora")],
    ("gpt2", "conv1d"), ("gpt2", "conv1d-dora"), ("gpt-neox", "neox-bias"), ("phi3", "dora"),
    ("mixtral", "experts"), ("qwen3-moe", "experts"), ("qwen3-moe", "one-of-the-experts"), ("gpt-oss", "experts"),
    ("gpt-oss-square", "square"), pytest.param("aria-square", "square", marks=ARIA), ("llama4-square", "square-llama4"),
    ("mamba", "embeddings-mamba"), ("mamba", "saved-mamba"), ("llama-tied", "tokens-and-head"),
    ("gemma3-vision", "vision-language"), ("gemma3", "saved"), ("qwen3", "embeddings"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_the_folded_model_is_the_adapted_one(tmp_path: Path, architecture: str, kind: str) -> None:
    config = ARCHITECTURES[architecture]()
    model = make_model(config)
    model.save_pretrained(tmp_path / "base")
    base = logits(model)
    adapted = train(model, 1, **KINDS[kind])
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", any_base=True, verify=True)
    assert_same_effect(logits(load(tmp_path / "out", config)), expected, base)


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    for tied in (False, True):
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
        model = make_model(config)
        model.save_pretrained(tmp_path / "base")
        model.resize_token_embeddings(67)
        base = logits(model, 67)
        adapted = train(model, 1, target_modules=["q_proj"])
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        expected = logits(adapted, 67)
        fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", any_base=True)
        folded = load(tmp_path / "out", config)
        assert folded.config.vocab_size == 67
        assert folded.config.tie_word_embeddings == tied
        assert_same_effect(logits(folded, 67), expected, base)
        with pytest.raises(UserError, match=r"vocabulary was resized: expected a sum of 1 .*found 0.5"):
            fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "half", any_base=True, weights=[0.5])


def test_adapted_tied_embeddings_are_untied_and_untouched_ones_stay_tied(tmp_path: Path) -> None:
    config = ARCHITECTURES["llama-tied"]()
    model = make_model(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    embedding = model.model.embed_tokens.weight.detach().clone()
    for kind, tied in (("head", False), ("linear", True), ("tokens", True), ("saved-tied", True)):
        train(copy.deepcopy(model), 1, **KINDS[kind]).save_pretrained(tmp_path / kind)
        fold(tmp_path / "base", [tmp_path / kind], tmp_path / f"{kind}-out", any_base=True, dtype="float32")
        index = json.loads((tmp_path / f"{kind}-out" / "model.safetensors.index.json").read_text())
        assert ("lm_head.weight" in index["weight_map"]) is not tied
        sizes = [path.stat().st_size for path in (tmp_path / f"{kind}-out").glob("*.safetensors")]
        assert 0 <= sum(sizes) - index["metadata"]["total_size"] < 2000 * len(sizes)  # headers
        folded = load(tmp_path / f"{kind}-out", config)
        assert folded.config.tie_word_embeddings is tied
        assert torch.equal(folded.model.embed_tokens.weight, embedding) is (kind in ("head", "linear"))
    changed = (folded.model.embed_tokens.weight != embedding).any(dim=1).nonzero().flatten().tolist()
    assert changed == list(range(60)), "modules_to_save replaces all of it"
    rows = load(tmp_path / "tokens-out", config).model.embed_tokens.weight
    assert (rows != embedding).any(dim=1).nonzero().flatten().tolist() == [3, 7, 59]


@pytest.mark.parametrize("kind", ["tokens", "saved-tied"])
@pytest.mark.parametrize("names", [("a", "z"), ("z", "a")])
def test_a_stored_copy_of_a_tied_head_changes_with_the_embedding(
    tmp_path: Path, kind: str, names: tuple[str, str]
) -> None:
    """Before it in the file, and after it."""
    config = ARCHITECTURES["llama-tied"]()
    model = make_model(config)
    model.save_pretrained(tmp_path / "base")
    train(model, 1, **KINDS[kind]).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    places = dict(zip(("model.embed_tokens.weight", "lm_head.weight"), names, strict=True))
    order = sorted(tensors, key=lambda name: places.get(name, "m"))
    layout = [(name, "F32", tuple(tensors[name].shape)) for name in order]
    write_stream(path, layout, [tensors[name] for name in order], {"format": "pt"})
    fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", any_base=True, verify=True)
    folded = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(folded["lm_head.weight"], folded["model.embed_tokens.weight"])
    assert not torch.equal(folded["lm_head.weight"], tensors["lm_head.weight"])
    assert set(folded) == set(tensors)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:50].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"'lm_head.weight' in .*expected shape \[60, 32\].*found \[50, 32\]"):
        fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "other", any_base=True)


@pytest.mark.parametrize("kind", ["dora", "saved", "tokens", "lora-bias", "bias-all", "embeddings-dora"])
def test_the_mean_of_two_of_a_kind(tmp_path: Path, kind: str) -> None:
    model = make_model(ARCHITECTURES["qwen2"]())
    model.save_pretrained(tmp_path / "base")
    weights = [0.7, 0.3]
    base = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in base.items()}
    for seed, weight in enumerate(weights):
        adapted = train(copy.deepcopy(model), seed, **KINDS[kind])
        adapted.save_pretrained(tmp_path / str(seed))
        for name, value in adapted.merge_and_unload().state_dict().items():
            wanted[name] += weight * (value.double() - base[name].double())
    fold(tmp_path / "base", [tmp_path / "0", tmp_path / "1"], tmp_path / "out", any_base=True, weights=weights)
    folded = load(tmp_path / "out", None).state_dict()
    changed = [name for name, delta in wanted.items() if bool(delta.any())]
    assert changed
    for name in folded:
        found = folded[name].double() - base[name].double()
        if name in changed:
            assert (found - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
        else:
            assert torch.equal(folded[name], base[name]), name


def test_kinds_that_a_method_is_not_defined_for(tmp_path: Path) -> None:
    model = make_model(ARCHITECTURES["llama"]())
    model.save_pretrained(tmp_path / "base")
    for seed in (0, 1):
        train(copy.deepcopy(model), seed, **KINDS["dora"]).save_pretrained(tmp_path / str(seed))
    with pytest.raises(UserError, match=r"merge method 'slerp' on 'model.layers.0.*found DoRA"):
        fold(tmp_path / "base", [tmp_path / "0", tmp_path / "1"], tmp_path / "out", any_base=True, method="slerp")
    assert not (tmp_path / "out").exists()


def test_the_factors_of_fused_experts_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base has its experts in an order in which each wants other tensors of the adapter than the one before."""
    model = make_model(ARCHITECTURES["qwen3-moe"]())
    train(model, 1, **KINDS["experts"]).save_pretrained(tmp_path / "adapter")
    looked, finite = list[int](), adapters.all_finite
    monkeypatch.setattr(adapters, "all_finite", lambda tensor: looked.append(tensor.numel()) or finite(tensor))
    adapter = adapters.Adapter.open(tmp_path / "adapter")
    names = sorted((name for name in adapter.names if name.endswith("]")), key=lambda name: name.split("[")[1])
    factors = [adapter.factors(name) for name in names for _ in range(2)]
    assert len(names) == 3 * 2 * SIZES["num_hidden_layers"]
    assert len(looked) == 2 * 2 * SIZES["num_hidden_layers"]  # A and B of two tensors a layer
    own = [tensor for one in factors if one is not None for tensor in (one.A_ri, one.B_or)]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in own)  # and no file is held open
