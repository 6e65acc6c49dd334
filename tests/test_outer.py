"""The outer step: against torch's Nesterov momentum on dense deltas, in the ledger, and through a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENGLISH, GERMAN, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_helpers import dense_delta, random_adapter
from safetensors.torch import load_file

from bam_lora.coefficients import Coefficients
from bam_lora.errors import UserError
from bam_lora.export import export_adapter
from bam_lora.ledger import Ledger
from bam_lora.loop import run
from bam_lora.merge_methods import METHODS
from bam_lora.outer import OuterStep, outer_update, past_merges
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.recipe_rules import LOW_RANK_METHODS
from bam_lora.store import hash_file, read_record

Q, UP, DOWN = "layers.0.q_proj.weight", "layers.0.up_proj.weight", "layers.0.down_proj.weight"
SHAPES = {Q: (12, 8), UP: (20, 12), DOWN: (6, 20)}
BASE = {"name": "org/model", "revision": None, "files": {"model.safetensors": {"bytes": 3, "sha256": "0" * 64}}}


def nesterov(deltas: list[torch.Tensor], step: OuterStep) -> list[torch.Tensor]:
    """The weights after every step of torch's optimizer, from zero, with the deltas as gradients downhill."""
    weight = torch.zeros_like(deltas[0]).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=step.learning_rate, momentum=step.momentum, nesterov=step.momentum > 0)
    states = []
    for delta in deltas:
        weight.grad = -delta
        optimizer.step()
        states.append(weight.detach().clone())
    return states


def grow(root: Path, iterations: int, step: OuterStep) -> dict[str, list[torch.Tensor]]:
    """A ledger as a run writes it; returns the merged delta of every iteration, dense, by weight.

    Branches come and go (three, two, one), the second has no DOWN, and no branch of the third iteration changes UP.
    """
    ledger, earlier = Ledger.start(root, BASE), []
    dense: dict[str, list[torch.Tensor]] = {name: [] for name in SHAPES}
    for number in range(1, iterations + 1):
        count = 3 - (number - 1) % 3
        folders = [root / f"iterations/{number:02}/branch-{k + 1}/adapter" for k in range(count)]
        changed = set()
        for k, folder in enumerate(folders):
            names = [name for name in SHAPES if not (k == 1 and name == DOWN) and not (number == 3 and name == UP)]
            shapes = {name.removesuffix(".weight"): SHAPES[name] for name in names}
            random_adapter(folder, shapes, rank=2 + k, seed=10 * number + k, scale=0.3)
            changed.update(names)
        merged = {name: Coefficients.scalar([0.2 + 0.3 * k + 0.01 * number for k in range(count)]) for name in changed}
        for name in SHAPES:
            parts = [
                float(weight) * dense_delta(folder, name)
                for weight, (k, folder) in zip(
                    merged[name].values if name in merged else (), enumerate(folders), strict=False
                )
                if not (k == 1 and name == DOWN)
            ]
            dense[name].append(sum(parts, torch.zeros(SHAPES[name], dtype=torch.float64)))
        past = past_merges(ledger, earlier, step)
        used = [*folders, *(folder for one in past for folder in one.folders)]
        names_of = [folder.relative_to(root).as_posix() for folder in used]
        ledger.record(number, names_of, "linear", outer_update(merged, count, past, step))
        earlier.append(folders)
    ledger.save()
    return dense


@settings(max_examples=12, deadline=None)
@given(st.floats(0.05, 3), st.floats(0, 0.99), st.integers(1, 6))
def test_every_iteration_is_where_nesterov_momentum_takes_it(
    tmp_path_factory: pytest.TempPathFactory, learning_rate: float, momentum: float, iterations: int
) -> None:
    root, step = tmp_path_factory.mktemp("run"), OuterStep(learning_rate, momentum)
    dense = grow(root, iterations, step)
    ledger = Ledger.load(root)
    for name, deltas in dense.items():
        for upto, expected in enumerate(nesterov(deltas, step), start=1):
            stacked = ledger.stacked(name, upto)
            assert stacked is not None
            made = stacked[0].double() @ stacked[1].double()
            assert float((made - expected).norm() / expected.norm()) < 1e-6


def test_a_branch_takes_part_once_in_the_product_however_often_it_is_named(tmp_path: Path) -> None:
    grow(tmp_path, 5, OuterStep(0.7, 0.9))
    ledger = Ledger.load(tmp_path)
    assert [len(one["adapters"]) for one in ledger.iterations] == [3, 5, 6, 9, 11]
    ranks = {3: 2 + 3 + 4, 2: 2 + 3, 1: 2}
    assert ledger.rank(Q) == sum(ranks[count] for count in (3, 2, 1, 3, 2))


def test_without_momentum_nothing_of_the_past_is_named(tmp_path: Path) -> None:
    grow(tmp_path, 3, OuterStep(0.5, 0.0))
    assert [len(one["adapters"]) for one in Ledger.load(tmp_path).iterations] == [3, 2, 1]


def test_the_recipe_knows_which_methods_are_low_rank() -> None:
    assert set(LOW_RANK_METHODS) == set(METHODS)


def test_the_plain_step_is_the_merge_itself() -> None:
    step = OuterStep(1.0, 0.0)
    assert step.is_plain
    merged = {Q: Coefficients.scalar([0.3, 0.7])}
    assert outer_update(merged, 2, [], step) == merged
    assert not OuterStep(1.0, 0.1).is_plain
    assert not OuterStep(0.9, 0.0).is_plain


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_jsonl(folder / "german.jsonl", GERMAN[:30])
    write_jsonl(folder / "german.test.jsonl", GERMAN[-3:])
    write_jsonl(folder / "english.test.jsonl", ENGLISH[-3:])
    return folder


def recipe(base: Path, files: Path, **bam: Any) -> Recipe:
    return recipe_from_dict(
        {
            "base": str(base),
            "output": "unused",
            "data": {"target": [{"path": str(files / "german.jsonl")}], "sequence_length": 64},
            "bam": {"slices": 5, "branches": 2, **bam},
            "lora": {"r": 4},
            "training": {
                "learning_rate": 5e-3,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "checkpointing": False,
            },
            "evaluation": {
                "target": [{"path": str(files / "german.test.jsonl"), "set": "german"}],
                "source": [{"path": str(files / "english.test.jsonl"), "set": "english"}],
                "branches": False,
            },
        }
    )


OUTER = {"learning_rate": 0.7, "momentum": 0.8}


@pytest.fixture(scope="module")
def finished(tiny_base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "finished"
    run(recipe(tiny_base, files, outer=OUTER, merge={"scale": 1.1}), root)
    return root


def test_a_run_ends_where_nesterov_momentum_takes_its_deltas(finished: Path, tiny_base: Path) -> None:
    base, made = (load_file(folder / "model.safetensors") for folder in (tiny_base, finished / "model"))
    ledger = Ledger.load(finished)
    assert [len(one["adapters"]) for one in ledger.iterations] == [2, 4, 5]
    last_step = 0.0
    for name in ledger.names():
        deltas = []
        for iteration, branches in ((1, 2), (2, 2), (3, 1)):  # the last group is short
            folders = [finished / f"iterations/{iteration:02}/branch-{b + 1}/adapter" for b in range(branches)]
            deltas.append(1.1 / branches * torch.stack([dense_delta(folder, name) for folder in folders]).sum(0))
        *_, before, expected = nesterov(deltas, OuterStep(**OUTER))
        last_step += float((expected - before).square().sum())
        stacked = ledger.stacked(name)
        assert stacked is not None
        torch.testing.assert_close(stacked[0].double() @ stacked[1].double(), expected, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(made[name].double(), base[name].double() + expected, rtol=2**-8, atol=1e-6)
    merged = read_record(finished / "iterations/03/merge.json")
    assert merged is not None
    assert merged["outer"] == OUTER
    assert len(merged["delta_norms"]) == 1  # of the iteration's own branches
    assert merged["merged_norm"] == pytest.approx(last_step**0.5, rel=1e-6)


def test_it_exports_as_one_adapter_of_the_branches_ranks(finished: Path, tmp_path: Path) -> None:
    assert export_adapter(finished, tmp_path / "adapter")["rank"] == 5 * 4
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "as one LoRA adapter of rank 20: exact" in card
    assert "library_name: peft" in card


def test_a_lost_merge_is_made_again_the_same(finished: Path, tiny_base: Path, files: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    ledger = Ledger.load(root)
    key = ledger.key()
    ledger.iterations[2:] = []  # as after a kill before the last merge
    ledger.save()
    shutil.rmtree(root / "model")
    (root / "iterations/03/merge.json").unlink()
    run(recipe(tiny_base, files, outer=OUTER, merge={"scale": 1.1}), root)
    assert Ledger.load(root).key() == key
    assert hash_file(root / "model/model.safetensors") == hash_file(finished / "model/model.safetensors")


def test_a_run_that_continues_this_one_starts_without_momentum(finished: Path, files: Path, tmp_path: Path) -> None:
    run(recipe(finished, files, slices=2, outer=OUTER), tmp_path / "next")
    ledger = Ledger.load(tmp_path / "next")
    assert [len(one["adapters"]) for one in ledger.inherited] == [2, 4, 5]
    assert [len(one["adapters"]) for one in ledger.iterations] == [2]
    assert set(next(iter(ledger.iterations[0]["coefficients"].values()))["values"]) == {0.7 * 1.8 / 2}


def test_an_extension_keeps_the_momentum(finished: Path, tiny_base: Path, files: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    more = write_jsonl(tmp_path / "more.jsonl", GERMAN[30:44])
    longer = recipe(tiny_base, files, slices=6, outer=OUTER, merge={"scale": 1.1}).resolved()
    longer["data"]["target"].append({"path": str(more)})
    run(recipe_from_dict(longer), tmp_path / "run", extend=True)
    assert [len(one["adapters"]) for one in Ledger.load(tmp_path / "run").iterations] == [2, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outer": {"momentum": 1.0}}, r"bam\.outer\.momentum: expected a number >= 0, < 1, found 1\.0"),
        ({"outer": {"learning_rate": 0}}, r"bam\.outer\.learning_rate: expected a number > 0, found 0"),
        (
            {"outer": OUTER, "merge": {"weights": "learned"}},
            r"bam\.outer: expected learning_rate 1 and momentum 0, since `weights: learned` chooses the step itself",
        ),
        (
            {"outer": OUTER, "merge": {"method": "ties"}},
            r"bam\.outer: expected learning_rate 1 and momentum 0, since ties is not low rank, found others",
        ),
    ],
)
def test_what_does_not_go_together(tiny_base: Path, files: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(tiny_base, files, **changes)
