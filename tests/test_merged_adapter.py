"""Merged adapters of every kind: PEFT loads them and gives the logits of the folded fp32 model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapter_kinds import ARCHITECTURES, KINDS, PEFT_WARNINGS, SIZES, load, logits, make_model, train
from dense_reference import in_full, reference
from numerics_helpers import dense_delta, random_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bam_lora.adapters import Adapter
from bam_lora.base import file_hashes, find_base
from bam_lora.cli import app
from bam_lora.coefficients import Coefficients
from bam_lora.compression import truncated_dense
from bam_lora.dense_methods import DenseOptions
from bam_lora.errors import UserError
from bam_lora.export import export_adapter
from bam_lora.folding import fold
from bam_lora.ledger import Ledger
from bam_lora.merged_adapter import merge_adapters

pytestmark = [*PEFT_WARNINGS, pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed.*")]

LOW_RANK = [
    ("llama", ["linear", "rslora"]),
    ("llama", ["linear", "patterns"]),
    ("llama", ["linear", "head"]),
    ("llama", ["embeddings", "linear"]),
    ("llama", ["both-ends", "embeddings"]),
    ("llama-tied", ["embeddings", "embeddings"]),
    ("llama-tied", ["head", "linear"]),
    ("llama-tied", ["embeddings-tied", "embeddings-tied"]),
    ("qwen2", ["lora-bias", "lora-bias"]),
    ("qwen2", ["lora-bias", "linear"]),
    ("gpt2", ["conv1d", "conv1d"]),
    ("gpt-neox", ["neox-bias", "neox-bias"]),
    ("phi3", ["linear", "linear"]),
    ("mixtral", ["experts", "experts"]),
    ("qwen3-moe", ["experts", "experts"]),
    ("qwen3-moe", ["one-of-the-experts", "experts"]),
    ("gpt-oss", ["experts", "one-of-the-experts"]),
    ("gemma3-vision", ["vision-language", "vision-language"]),
]
AVERAGED = [
    ("llama", "saved"),
    ("llama", "saved-embeddings"),
    ("llama", "tokens"),
    ("llama-tied", "saved-tied"),
    ("llama-tied", "saved-embeddings"),
    ("llama-tied", "tokens"),
    ("qwen2", "bias-all"),
    ("gemma3", "saved"),
]


def two(tmp_path: Path, architecture: str, kinds: list[str]) -> tuple[Any, list[Path]]:
    """A base and two adapters of it, the second of another rank where its kind allows."""
    model = make_model(ARCHITECTURES[architecture]())
    model.save_pretrained(tmp_path / "base")
    for seed, kind in enumerate(kinds):
        train(copy.deepcopy(model), seed, **KINDS[kind]).save_pretrained(tmp_path / str(seed))
    return model, [tmp_path / "0", tmp_path / "1"]


def assert_loads_as_folded(tmp_path: Path, model: Any, adapters: list[Path], weights: list[float]) -> None:
    """PEFT's logits on the base with the merged adapter, and those of the base that they are folded into."""
    fold(tmp_path / "base", adapters, tmp_path / "folded", any_base=True, weights=weights)
    folded = load(tmp_path / "folded", model.config)
    base = logits(model)
    loaded = PeftModel.from_pretrained(model, tmp_path / "merged").eval()
    got, want = logits(loaded), logits(folded)
    assert (want - base).abs().max() > 1e-3
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize(("architecture", "kinds"), LOW_RANK)
def test_peft_loads_the_merge_of_two(tmp_path: Path, architecture: str, kinds: list[str]) -> None:
    model, adapters = two(tmp_path, architecture, kinds)
    weights = [0.7, 0.4]
    merge_adapters(adapters, tmp_path / "merged", any_base=True, weights=weights)
    assert_loads_as_folded(tmp_path, model, adapters, weights)


@pytest.mark.parametrize(("architecture", "kind"), AVERAGED)
def test_what_is_whole_is_averaged(tmp_path: Path, architecture: str, kind: str) -> None:
    model, adapters = two(tmp_path, architecture, [kind, kind])
    weights = [0.7, 0.3]
    merge_adapters(adapters, tmp_path / "merged", any_base=True, weights=weights)
    assert_loads_as_folded(tmp_path, model, adapters, weights)
    for arguments, words in (({"weights": [0.7, 0.7]}, "sum to 1.4"), ({"method": "karcher"}, "method 'karcher'")):
        with pytest.raises(UserError, match=rf"merged value of .*in every adapter and weights that sum to 1.*{words}"):
            merge_adapters(adapters, tmp_path / "new", any_base=True, **arguments)


@pytest.mark.parametrize("kinds", [["saved", "linear"], ["tokens", "linear"], ["saved-embeddings", "embeddings"]])
def test_what_only_some_adapters_hold_whole(tmp_path: Path, kinds: list[str]) -> None:
    _, adapters = two(tmp_path, "llama", kinds)
    with pytest.raises(UserError, match=r"merged value of .*not the same kind in every adapter.*bam-lora fold"):
        merge_adapters(adapters, tmp_path / "new", any_base=True)


def test_other_things_that_an_adapter_cannot_hold(tmp_path: Path) -> None:
    _, (first, second) = two(tmp_path, "llama", ["dora", "tokens"])
    with pytest.raises(UserError, match=r"merged change of 'model.layers.0.*found DoRA.*bam-lora fold"):
        merge_adapters([first], tmp_path / "new")
    other = tmp_path / "other"
    tokens = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 58]}
    train(make_model(ARCHITECTURES["llama"]()), 1, **tokens).save_pretrained(other)
    with pytest.raises(UserError, match=r"trained tokens of 'model.embed_tokens.weight': expected the same ones"):
        merge_adapters([second, other], tmp_path / "new", any_base=True)
    for kind in ("lora-bias", "experts"):
        train(make_model(ARCHITECTURES["qwen3-moe"]()), 1, **KINDS[kind]).save_pretrained(tmp_path / kind)
    with pytest.raises(UserError, match=r"lora_bias beside target_parameters: expected .*found both"):
        merge_adapters([tmp_path / "lora-bias", tmp_path / "experts"], tmp_path / "new", any_base=True)
    assert not (tmp_path / "new").exists()


def test_copies_of_embeddings_must_be_the_same(tmp_path: Path) -> None:
    _, (first, second) = two(tmp_path, "llama", ["embeddings", "embeddings"])
    merge_adapters([first, second], tmp_path / "merged", any_base=True)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, tmp_path / "merged"))
    assert torch.equal(before[key], after[key])
    before[key][0, 0] += 1
    save_file(before, first / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"copy of 'model.embed_tokens.weight' in .*expected the same numbers in all"):
        merge_adapters([first, second], tmp_path / "new", any_base=True)


def test_trained_rows_in_another_order(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    for name, indices in (("0", [3, 7]), ("1", [7, 3])):
        model = make_model(config)
        model.save_pretrained(tmp_path / "base")
        adapted = train(model, int(name), target_modules=["q_proj"], trainable_token_indices=indices)
        adapted.save_pretrained(tmp_path / name)
    adapters = [tmp_path / "0", tmp_path / "1"]
    merge_adapters(adapters, tmp_path / "merged", any_base=True)
    assert_loads_as_folded(tmp_path, make_model(config), adapters, [0.5, 0.5])


def test_equal_whole_weights_keep_every_bit(tmp_path: Path) -> None:
    _, (first, _) = two(tmp_path, "llama", ["saved", "saved"])
    merge_adapters([first] * 3, tmp_path / "merged", weights=[0.2, 0.3, 0.5])
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, tmp_path / "merged"))
    whole = [name for name in before if ".lora_" not in name]
    assert len(whole) == 7
    assert all(torch.equal(before[name], after[name]) for name in whole)


@pytest.mark.parametrize(("architecture", "kind"), [("mixtral", "experts"), ("qwen2", "lora-bias"), ("gpt2", "conv1d")])
def test_a_run_is_exported_as_its_merge(tmp_path: Path, architecture: str, kind: str) -> None:
    two(tmp_path, architecture, [kind, kind])
    base = str(tmp_path / "base")
    files = file_hashes(find_base(base), tmp_path)
    ledger = Ledger.start(tmp_path, {"name": base, "revision": None, "files": files})
    names = Adapter.open(tmp_path / "0").names
    ledger.record(1, ["0", "1"], "linear", {name: Coefficients.scalar([0.7, 0.4]) for name in names})
    ledger.save()
    export_adapter(tmp_path, tmp_path / "exported")
    merge_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "merged", weights=[0.7, 0.4])
    exported, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exported", "merged"))
    assert set(exported) == set(merged)
    for name, tensor in merged.items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-5, atol=1e-7)


SHAPES = {"model.layers.0.q_proj": (40, 32), "model.layers.0.up_proj": (48, 40), "model.layers.1.up_proj": (20, 48)}


def merged_deltas(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{module}.weight": dense_delta(folder, f"{module}.weight") for module in SHAPES}


def singular_error(delta: torch.Tensor, rank: int) -> float:
    """The squared norm of what the best product of a rank leaves out."""
    return float(torch.linalg.svdvals(delta)[rank:].square().sum())


def pair(tmp_path: Path) -> list[Path]:
    return [random_adapter(tmp_path / f"a{seed}", SHAPES, rank=6, seed=seed) for seed in range(2)]


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_a_smaller_rank_is_the_closest(tmp_path: Path, method: str) -> None:
    adapters = pair(tmp_path)
    exact = merge_adapters(adapters, tmp_path / "exact", method=method)
    facts = merge_adapters(adapters, tmp_path / "small", method=method, rank=5)
    assert (exact["rank"], exact["stacked_rank"], exact["error"]) == (12, 12, 0.0)
    assert (facts["rank"], facts["stacked_rank"]) == (5, 12)
    assert facts["merged_norm"] == exact["merged_norm"]
    whole, small = merged_deltas(tmp_path / "exact"), merged_deltas(tmp_path / "small")
    for name, delta in whole.items():
        error = float((small[name] - delta).norm() / delta.norm())
        assert error == pytest.approx(facts["errors"][name], rel=1e-5)
        assert error == pytest.approx((singular_error(delta, 5)) ** 0.5 / float(delta.norm()), rel=1e-5)
    left = sum(float((small[name] - delta).square().sum()) for name, delta in whole.items())
    total = sum(float(delta.square().sum()) for delta in whole.values())
    assert facts["error"] == pytest.approx((left / total) ** 0.5, rel=1e-5)
    assert merge_adapters(adapters, tmp_path / "large", rank=64)["error"] == 0


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "breadcrumbs"])
def test_a_method_by_element_at_a_rank(tmp_path: Path, method: str) -> None:
    adapters = pair(tmp_path)
    options = DenseOptions(0.4, 0.05, seed=3)
    facts = merge_adapters(adapters, tmp_path / "m", method=method, rank=7, weights=[0.6, 0.5], options=options)
    merge_adapters(adapters, tmp_path / "whole", method=method, rank=999, weights=[0.6, 0.5], options=options)
    small, whole = merged_deltas(tmp_path / "m"), merged_deltas(tmp_path / "whole")
    assert facts["stacked_rank"] is None
    left = total = 0.0
    for name, got in small.items():
        deltas = [dense_delta(adapter, name) for adapter in adapters]
        want, unsure = reference(method, in_full(deltas), [0.6, 0.5], options, name=name)
        sure = torch.from_numpy(~unsure)
        wanted = torch.from_numpy(want)
        difference = (whole[name] - wanted)[sure]
        assert float(difference.abs().max()) <= 1e-5 * float(wanted.abs().max()), name
        error = float((got - whole[name]).square().sum())
        assert error == pytest.approx(singular_error(whole[name], 7), rel=1e-4)
        assert facts["errors"][name] ** 2 == pytest.approx(error / float(whole[name].square().sum()), rel=1e-4)
        left, total = left + error, total + float(whole[name].square().sum())
    assert facts["error"] == pytest.approx((left / total) ** 0.5, rel=1e-4)
    assert facts["merged_norm"] == pytest.approx(total**0.5, rel=1e-5)
    with pytest.raises(UserError, match=rf"merge method '{method}': .*element by element.*Give --rank r"):
        merge_adapters(adapters, tmp_path / "new", method=method)


@pytest.mark.parametrize(("architecture", "kind"), [("gpt2", "conv1d"), ("gpt-oss", "experts"), ("llama", "both-ends")])
def test_ties_at_full_rank_is_the_folded_model(tmp_path: Path, architecture: str, kind: str) -> None:
    model, adapters = two(tmp_path, architecture, [kind, kind])
    facts = merge_adapters(adapters, tmp_path / "merged", any_base=True, method="ties", rank=1000)
    assert facts["error"] < 1e-6
    for path in adapters:
        if kind == "both-ends":  # TIES of whole weights takes the base: only their low-rank deltas are merged here
            tensors = load_file(path / "adapter_model.safetensors")
            kept = {name: tensor for name, tensor in tensors.items() if "base_layer" not in name}
            save_file(kept, path / "adapter_model.safetensors", {"format": "pt"})
    fold(tmp_path / "base", adapters, tmp_path / "folded", any_base=True, method="ties")
    want = logits(load(tmp_path / "folded", model.config))
    got = logits(PeftModel.from_pretrained(model, tmp_path / "merged").eval())
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_a_large_dense_delta_is_cut_nearly_as_well_as_can_be() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 1 / torch.arange(1, 1101, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(size, 1100, generator=generator).double()).Q for size in (1200, 1100))
    delta = (left * values @ right.T).float()
    B_or, A_ri, left_out, whole = truncated_dense(delta, 16)
    best = float(values[16:].square().sum())
    measured = float((delta.double() - B_or.double() @ A_ri.double()).square().sum())
    assert left_out == pytest.approx(measured, rel=1e-9)
    assert whole == pytest.approx(float(values.square().sum()), rel=1e-5)
    assert best * (1 - 1e-6) <= left_out <= best * 1.001


def test_the_command_says_the_error(tmp_path: Path) -> None:
    first, second = pair(tmp_path)
    arguments = ["merge", "--adapter", str(first), "--adapter", str(second), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--method", "ties", "--density", "0.3", "--rank", "4"])
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "out" / "done.json").read_text())["facts"]
    assert f"relative error of the delta {facts['error']:.2%}; most in model.layers." in result.output
    bad = CliRunner().invoke(app, [*arguments, "--rank", "0"])
    assert bad.exit_code == 1
    assert "--rank: expected a rank of at least 1, found 0" in bad.stderr
