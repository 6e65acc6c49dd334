"""A frozen difference of two models in a fold: against float64, alone and on top of adapters of every kind."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_kinds import ARCHITECTURES, KINDS, PEFT_WARNINGS, load, make_model, train
from numerics_helpers import (
    BF16,
    dense_delta,
    gaussian,
    load_all,
    random_adapter,
    round_directly,
    small_tensors,
    write_base,
)
from typer.testing import CliRunner

from bam_lora.cli import app
from bam_lora.difference import Difference, add_difference
from bam_lora.errors import UserError
from bam_lora.folding import fold
from bam_lora.store import hash_file

pytestmark = PEFT_WARNINGS

SHAPES = {"model.layers.0.q_proj": (700, 900), "model.layers.0.k_proj": (64, 900)}


def weights(dtype: torch.dtype, seed: int = 0, scale: float = 0.02) -> dict[str, torch.Tensor]:
    tensors = {
        f"{module}.weight": gaussian(*shape, seed=seed + n, scale=scale)
        for n, (module, shape) in enumerate(SHAPES.items())
    }
    tensors["model.norm.weight"] = 1 + gaussian(900, seed=seed + 8, scale=scale)
    tensors["model.experts"] = gaussian(3, 20, 30, seed=seed + 9, scale=scale)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def near(tensors: dict[str, torch.Tensor], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same weights after some training."""
    return {name: tensor.float().add(gaussian(*tensor.shape, seed=seed, scale=1e-3)).to(dtype)
            for name, tensor in tensors.items()}  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("adapters", [0, 2])
def test_against_float64(tmp_path: Path, dtype: torch.dtype, adapters: int) -> None:
    base = weights(dtype)
    old = near(base, 20, BF16)
    new = near(old, 40, torch.float32)
    for name, tensors, shards in (("base", base, 2), ("old", old, 1), ("new", new, 3)):
        write_base(tmp_path / name, tensors, shards=shards)
    paths = [random_adapter(tmp_path / f"a{seed}", SHAPES, rank=8, seed=seed, scale=0.01) for seed in range(adapters)]
    difference = (tmp_path / "new", tmp_path / "old", 0.7)
    facts = fold(tmp_path / "base", paths, tmp_path / "out", difference=difference, verify=True)
    assert (facts["changed"], facts["tensors"], facts["verified"]["tensors"]) == (4, 4, 4)
    assert facts["verified"]["worst_ulp"] <= 1
    folded = load_all(tmp_path / "out")
    same = total = 0
    for name, before in base.items():
        delta = 0.7 * (new[name].double() - old[name].double())
        for path in paths if name.removesuffix(".weight") in SHAPES else ():
            delta += 0.5 * dense_delta(path, name)
        want = before.double() + delta
        assert folded[name].dtype == dtype
        if dtype == torch.float32:
            rounding = 2.0**-24 * want.norm()
            assert (folded[name].double() - want).norm() <= 1e-6 * delta.norm() + rounding, name
        else:
            expected = round_directly(want, dtype)
            same, total = same + int((folded[name] == expected).sum()), total + want.numel()
            assert facts["delta_norms"][name] == pytest.approx(float(delta.norm()), rel=1e-4)
    assert same >= 0.9999 * total


def awkward() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base and a model whose elements are far apart in size, zeros of both signs, and tensors of other kinds."""
    tensors, others = weights(torch.float32), weights(torch.float32, seed=30)
    name = "model.layers.0.k_proj.weight"
    tensors[name] *= 10.0 ** gaussian(64, 900, seed=3).mul(6).round()
    others[name] *= 10.0 ** gaussian(64, 900, seed=4).mul(6).round()
    for place, (one, other) in enumerate([(-0.0, 0.0), (0.0, -0.0), (0.5, -0.0), (-0.0, 3.0), (1.0, 1e-30)]):
        tensors[name][0, place], others[name][0, place] = one, other
    for one in (tensors, others):
        one["steps"] = torch.arange(5)
        one["scale"] = torch.tensor(3.0)
        one["nothing"] = torch.zeros(0, 4)
    others["scale"] = torch.tensor(2.5)
    return tensors, others


def test_the_base_plus_its_whole_difference_is_the_model(tmp_path: Path) -> None:
    base, model = awkward()
    write_base(tmp_path / "base", base, shards=2)
    write_base(tmp_path / "model", model, shards=2)
    fold(tmp_path / "base", [], tmp_path / "out", difference=(tmp_path / "model", tmp_path / "base", 1), verify=True)
    for path in sorted((tmp_path / "model").glob("*.safetensors")):
        assert hash_file(path) == hash_file(tmp_path / "out" / path.name)


def test_no_difference_keeps_every_bit(tmp_path: Path) -> None:
    base, model = awkward()
    write_base(tmp_path / "base", base)
    write_base(tmp_path / "model", model)
    for model_name, weight in (("base", 0.3), ("model", 0.0)):
        fold(tmp_path / "base", [], tmp_path / "out", difference=(tmp_path / model_name, tmp_path / "base", weight))
        names = [tmp_path / folder / "model.safetensors" for folder in ("base", "out")]
        assert hash_file(names[0]) == hash_file(names[1])


def test_the_sum_in_float64() -> None:
    before, model, base = (gaussian(6, 5, seed=seed) for seed in range(3))
    want = before.double() + -1.3 * (model.double() - base.double())
    assert torch.equal(add_difference(before, model, base, -1.3), want.float())
    assert (add_difference(before.double(), model, base, -1.3) - want).abs().max() < 1e-15


KINDS_OF = [
    ("llama", "dora"),
    ("llama", "saved"),
    ("llama", "tokens"),
    ("llama-tied", "head"),
    ("llama-tied", "tokens"),
    ("qwen2", "lora-bias"),
    ("gpt2", "conv1d"),
    ("phi3", "linear"),
    ("mixtral", "experts"),
    ("mixtral", "one-of-the-experts"),
    ("gpt-oss", "experts"),
]


def moved(model: Any, seed: int) -> Any:
    """A model a little way off."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return other


@pytest.mark.parametrize(("architecture", "kind"), KINDS_OF)
def test_on_top_of_adapters_of_every_kind(tmp_path: Path, architecture: str, kind: str) -> None:
    config = ARCHITECTURES[architecture]()
    model = make_model(config)
    old, new = moved(model, 1), moved(model, 2)
    for name, one in (("base", model), ("old", old), ("new", new)):
        one.save_pretrained(tmp_path / name)
    delta = {name: 0.6 * (value.double() - old.state_dict()[name].double()) for name, value in new.state_dict().items()}
    train(model, 1, **KINDS[kind]).save_pretrained(tmp_path / "a")
    adapters, difference = [tmp_path / "a"], (tmp_path / "new", tmp_path / "old", 0.6)
    fold(tmp_path / "base", adapters, tmp_path / "plain", any_base=True)
    fold(tmp_path / "base", adapters, tmp_path / "both", any_base=True, difference=difference, verify=True)
    plain, both = (load(tmp_path / name, config) for name in ("plain", "both"))
    assert plain.config.tie_word_embeddings == both.config.tie_word_embeddings
    for name, value in both.state_dict().items():
        found = value.double() - plain.state_dict()[name].double()
        assert (found - delta[name]).norm() <= 1e-5 * delta[name].norm(), name


def test_with_a_method_that_works_by_element_and_a_resized_vocabulary(tmp_path: Path) -> None:
    config = ARCHITECTURES["llama"]()
    model = make_model(config)
    old, new = moved(model, 1), moved(model, 2)
    for name, one in (("base", model), ("old", old), ("new", new)):
        one.save_pretrained(tmp_path / name)
    difference = (tmp_path / "new", tmp_path / "old", 0.5)
    for seed in (0, 1):
        train(copy.deepcopy(model), seed, target_modules=["q_proj"]).save_pretrained(tmp_path / str(seed))
    pair = [tmp_path / "0", tmp_path / "1"]
    fold(tmp_path / "base", pair, tmp_path / "ties", any_base=True, method="ties", difference=difference, verify=True)
    fold(tmp_path / "base", pair, tmp_path / "alone", any_base=True, method="ties")
    name = "model.layers.0.self_attn.q_proj.weight"
    ties, alone = (load_all(tmp_path / folder)[name].double() for folder in ("ties", "alone"))
    delta = 0.5 * (new.state_dict()[name].double() - old.state_dict()[name].double())
    assert (ties - alone - delta).norm() <= 1e-5 * delta.norm()
    model.resize_token_embeddings(67)
    train(model, 2, target_modules=["q_proj"]).save_pretrained(tmp_path / "wide", save_embedding_layers=True)
    fold(tmp_path / "base", [tmp_path / "wide"], tmp_path / "out", any_base=True, difference=difference, verify=True)
    folded = load(tmp_path / "out", config).model.embed_tokens.weight.detach().double()
    wanted = model.state_dict()["model.embed_tokens.weight"]
    name = "model.embed_tokens.weight"
    delta = 0.5 * (new.state_dict()[name].double() - old.state_dict()[name].double())
    assert torch.equal(folded[60:].float(), wanted[60:])
    assert (folded[:60] - wanted[:60].double() - delta).norm() <= 1e-5 * delta.norm()


def test_another_difference_is_another_fold(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", small_tensors())
    model = write_base(tmp_path / "model", weights(BF16))
    first = Difference.open(model, base, 0.5).identity()
    assert Difference.open(str(model), base, 0.5).identity() == first
    others = [Difference.open(model, base, 0.4).identity(), Difference.open(base, model, 0.5).identity()]
    os.utime(model / "model.safetensors", ns=(1, 1))
    others.append(Difference.open(model, base, 0.5).identity())
    assert first not in others


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    tensors = {**small_tensors(), "counts": torch.ones(8)}
    base = write_base(tmp_path / "base", tensors)
    embedding = "model.embed_tokens.weight"
    without = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    for name, others, words in (
        ("wide", {**tensors, embedding: gaussian(33, 8)},
         rf"'{embedding}' of .*wide: expected shape \[30, 8\], as in .*base, found \[33, 8\], a resized vocabulary"),
        ("long", {**tensors, "model.norm.weight": torch.ones(9)}, r"'model.norm.weight' of .*: .*\[8\].*found \[9\]"),
        ("without", without, r"'model.norm.weight' of .*without: expected it, as .*base has it, found none"),
        ("more", {**tensors, "lm_head.weight": gaussian(30, 8)}, r"'lm_head.weight' of .*base: .*as .*more has it"),
        ("whole", {**tensors, "counts": torch.arange(8)}, r"'counts' of .*expected a type like F32.*I64"),
    ):  # fmt: skip
        other = write_base(tmp_path / name, others)
        for pair in ((other, base), (base, other)):
            with pytest.raises(UserError, match=words):
                fold(base, [], tmp_path / "out", difference=(*pair, 1.0))
    with pytest.raises(UserError, match=r"weight of the difference: expected a finite number, found nan"):
        fold(base, [], tmp_path / "out", difference=(base, base, float("nan")))
    with pytest.raises(UserError, match=r"adapters: expected at least one"):
        fold(base, [], tmp_path / "out", difference=(base, base, 1.0), weights=[1.0])
    with pytest.raises(UserError, match=r"it holds the input"):
        fold(base, [], other, difference=(other, base, 1.0))
    bad = dict(tensors)
    bad["model.norm.weight"] = torch.full((8,), float("nan"), dtype=BF16)
    with pytest.raises(UserError, match=r"'model.norm.weight' of .*found NaN or Inf after the fold"):
        fold(base, [], tmp_path / "out", difference=(write_base(tmp_path / "bad", bad), base, 1.0))
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", small_tensors())
    model = {name: tensor * 2 for name, tensor in small_tensors().items()}
    arguments = ["fold", "--base", str(base), "--output", str(tmp_path / "out")]
    alone = CliRunner().invoke(app, [*arguments, "--difference", str(base)])
    assert alone.exit_code == 1
    assert "--difference: expected both --difference MODEL and --difference-base BASE, found it alone" in alone.stderr
    other = write_base(tmp_path / "model", model)
    wanted = ["--difference", str(other), "--difference-base", str(base), "--difference-weight", "2", "--verify"]
    done = CliRunner().invoke(app, [*arguments, *wanted])
    assert done.exit_code == 0, done.output
    assert "4 of 4 tensors changed" in done.output
    for name, tensor in load_all(tmp_path / "out").items():
        assert np.array_equal(tensor.float().numpy(), (small_tensors()[name].float() * 3).to(BF16).float().numpy())
    facts = json.loads((tmp_path / "out" / "done.json").read_text())["facts"]
    assert facts["changed"] == 4
