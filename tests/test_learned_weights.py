"""Learned merge weights: against dense float64, finite differences, and the folded model they end in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENGLISH, GERMAN
from numerics_helpers import delta, gaussian

import bam_lora.learned_weights
import bam_lora.quickstart
from bam_lora.adapters import Factors
from bam_lora.base import Loading, load_model, load_tokenizer
from bam_lora.coefficients import stack
from bam_lora.directions import Directions, TrainableDelta, group_of_directions
from bam_lora.errors import UserError
from bam_lora.evaluate import EvaluationSet, Window, bits_per_byte, make_windows, score
from bam_lora.learned_weights import LearningSettings, learn_weights
from bam_lora.scoring import Windowed
from bam_lora.selection import SelectionWindows, split_selection

SETTINGS = LearningSettings(
    source_weight=1.0, groups=4, steps=12, windows=4, learning_rate=0.1, tokens=1_000_000, seed=0, batch_tokens=512,
    dtype="float32", checkpointing=False,
)  # fmt: skip


def factors(o: int, i: int, r: int, seed: int, size: float = 1.0) -> Factors:
    return Factors(A_ri=gaussian(r, i, seed=seed), B_or=gaussian(o, r, scale=size, seed=seed + 1), scaling=2.0)


def reference(found: Factors, coefficients: torch.Tensor) -> torch.Tensor:
    """Each singular direction of the dense delta times its coefficient, in float64."""
    left, values, right = torch.linalg.svd(delta(found.A_ri, found.B_or, found.scaling), full_matrices=False)
    r = len(coefficients)
    return left[:, :r] @ (coefficients[:, None] * values[:r, None] * right[:r])


@pytest.mark.parametrize(("o", "i", "r"), [(768, 256, 64), (256, 768, 64), (5, 40, 3), (40, 5, 5), (3, 3, 1)])
def test_scaled_directions_are_those_of_the_dense_delta(o: int, i: int, r: int) -> None:
    found = factors(o, i, r, seed=o + i + r)
    chosen = torch.linspace(-1, 2, r, dtype=torch.float64)
    M = Directions.of(found).basis.matrix(chosen)
    made = found.scaling * found.B_or.double() @ M @ found.A_ri.double()
    expected = reference(found, chosen)
    assert torch.linalg.norm(made - expected) / torch.linalg.norm(expected) < 1e-10


def test_an_adapter_that_learned_nothing_or_less_than_its_rank_is_no_special_case() -> None:
    nothing = Factors(A_ri=gaussian(4, 16, seed=1), B_or=torch.zeros(8, 4), scaling=2.0)
    assert torch.count_nonzero(nothing.B_or.double() @ Directions.of(nothing).basis.matrix(torch.full((4,), 3.0))) == 0
    half = Factors(A_ri=gaussian(4, 16, seed=1), B_or=gaussian(8, 2, seed=2) @ gaussian(2, 4, seed=3), scaling=1.0)
    M = Directions.of(half).basis.matrix(torch.ones(4))
    torch.testing.assert_close(half.B_or.double() @ M @ half.A_ri.double(), delta(half.A_ri, half.B_or, 1.0))


def test_groups_double_and_cover_every_direction() -> None:
    assert group_of_directions(8, 3).tolist() == [0, 1, 1, 2, 2, 2, 2, 2]
    assert group_of_directions(64, 7).bincount().tolist() == [1, 2, 4, 8, 16, 32, 1]
    assert group_of_directions(5, 1).tolist() == [0] * 5
    assert group_of_directions(1, 9).tolist() == [0]


@pytest.mark.parametrize("groups", [1, 3])
def test_what_the_ledger_stores_is_what_was_trained(groups: int) -> None:
    branches = [factors(24, 16, 8, seed=1), None, factors(24, 16, 4, seed=5)]
    trained = TrainableDelta(branches, [0.5, 0.25, 0.25], groups, torch.float32, "cpu")
    with torch.no_grad():
        for number, coefficient in enumerate(trained.coefficients):
            coefficient += 0.1 * number + 0.2 * torch.arange(len(coefficient))
    stored = trained.resolved()
    assert stored.kind == ("scalar" if groups == 1 else "blocks")
    stacked = stack(branches, stored)
    assert stacked is not None
    x = gaussian(7, 16, seed=9)
    hooked = trained(None, (x,), torch.zeros(7, 24))
    torch.testing.assert_close(hooked, x @ (stacked[0] @ stacked[1]).T, rtol=1e-4, atol=1e-4)
    assert trained.values()[1] is None


BASE = Path(bam_lora.quickstart.__file__).parent / "base"  # small and trained: noise makes it worse


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(BASE, Loading(16, compute_dtype="float32"))


@pytest.fixture(scope="module")
def windowed() -> Windowed:
    tokenizer = load_tokenizer(BASE)
    sets = (
        EvaluationSet("german", "target", tuple(GERMAN[:16])),
        EvaluationSet("english", "source", tuple(ENGLISH[:16])),
    )
    windows = tuple(tuple(make_windows(s.documents, tokenizer, 512, 0)) for s in sets)
    return Windowed("key", sets, windows, 512, 0)


@pytest.fixture(scope="module")
def selection(windowed: Windowed) -> SelectionWindows:
    return split_selection(windowed, 0.25, 0)


def deltas(model: Any) -> dict[str, list[Factors | None]]:
    """Two branches of noise for every linear layer: the first large, so that most of it should go."""
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    return {
        f"{name}.weight": [factors(*shapes[name], 4, 10 * n, 0.04), factors(*shapes[name], 4, 10 * n + 5, 0.01)]
        for n, name in enumerate(names)
    }


def bits(model: Any, windows: list[Window]) -> float:
    nats, sizes = score(model, windows, pad=0, batch_size=4, dtype="float32")
    return bits_per_byte(nats, sizes)[0]


def test_split_is_by_document_and_covers_all(windowed: Windowed, selection: SelectionWindows) -> None:
    for role, windows in (("target", windowed.windows[0]), ("source", windowed.windows[1])):
        train, held_out = selection.train[role], selection.held_out[role]
        assert {w.document for w in train}.isdisjoint(w.document for w in held_out)
        assert sorted([*train, *held_out], key=vars_of) == sorted(windows, key=vars_of)
        assert len({w.document for w in held_out}) == 4
    assert split_selection(windowed, 0.25, 0) == selection
    assert split_selection(windowed, 0.25, 1) != selection


def vars_of(window: Window) -> tuple[Any, ...]:
    return window.document, window.context, window.scored


def test_one_document_cannot_be_split(windowed: Windowed) -> None:
    few = Windowed("key", windowed.sets, (windowed.windows[0], windowed.windows[1][:1]), 512, 0)
    with pytest.raises(UserError, match=r"selection.source: expected at least two documents.*found 1"):
        split_selection(few, 0.25, 0)


def test_harmful_directions_are_let_go_and_the_base_stays(model: Any, selection: SelectionWindows) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = learn_weights(model, deltas(model), [0.5, 0.5], selection, SETTINGS)
    objectives = [entry["objective"] for entry in found.history]
    assert found.best > 0
    untouched = learn_weights(model, deltas(model), [0.0, 0.0], selection, replace(SETTINGS, steps=1)).history[0]
    damage = objectives[0] - untouched["objective"]
    assert damage > 0.5
    assert objectives[found.best] == min(objectives) < objectives[0] - 0.5 * damage
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_history_is_the_score_of_the_model_with_the_dense_delta(selection: SelectionWindows) -> None:
    model = load_model(BASE, Loading(16, compute_dtype="float32"))
    branches = deltas(model)
    found = learn_weights(model, branches, [0.5, 0.5], selection, SETTINGS)
    with torch.no_grad():
        for name, coefficients in found.coefficients.items():
            stacked = stack(branches[name], coefficients)
            assert stacked is not None
            model.get_submodule(name.removesuffix(".weight")).weight += stacked[0] @ stacked[1]
    for role in ("target", "source"):
        expected = bits(model, list(selection.held_out[role]))
        assert found.history[found.best][role] == pytest.approx(expected, rel=1e-4)


def test_gradient_is_that_of_finite_differences(model: Any, selection: SelectionWindows) -> None:
    """One step of plain descent would go where the difference quotient says; Adam's first step shows its sign."""
    branches = {name: value for name, value in deltas(model).items() if name.endswith("0.mlp.down_proj.weight")}
    (name,) = branches
    one = replace(SETTINGS, groups=1, steps=1, windows=100, learning_rate=1e-3)
    every = SelectionWindows(selection.train, selection.train)

    def objective(first: float, second: float) -> float:
        return learn_weights(model, branches, [first, second], every, one).history[0]["objective"]

    slopes = [
        objective(0.5 + 0.05, 0.5) - objective(0.5 - 0.05, 0.5),
        objective(0.5, 0.5 + 0.05) - objective(0.5, 0.5 - 0.05),
    ]
    moved = learn_weights(model, branches, [0.5, 0.5], every, one)
    if moved.best == 0:
        pytest.fail("a step along the gradient over all text did not lower the objective over the same text")
    steps = [groups[0] - 0.5 for groups in moved.groups[name] if groups is not None]
    assert [step < 0 for step in steps] == [slope > 0 for slope in slopes]


def test_nothing_is_kept_that_is_not_better_on_held_out_text(model: Any, selection: SelectionWindows) -> None:
    wild = learn_weights(model, deltas(model), [0.0, 0.0], selection, replace(SETTINGS, learning_rate=50.0))
    assert wild.best == 0
    assert all(value == 0 for groups in wild.groups.values() for branch in groups for value in branch or ())


def test_cost_stays_within_its_share(model: Any, selection: SelectionWindows) -> None:
    seen: list[int] = []
    narrow = replace(SETTINGS, tokens=6000, steps=1000)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            int(kwargs["attention_mask"].sum()) * (3 if torch.is_grad_enabled() else 1)
        ),
        with_kwargs=True,
    )
    try:
        found = learn_weights(model, deltas(model), [0.5, 0.5], selection, narrow)
    finally:
        handle.remove()
    assert sum(seen) / 3 < 1.1 * narrow.tokens
    assert 8 <= found.settings.steps < 1000


def test_same_seed_same_weights(model: Any, selection: SelectionWindows) -> None:
    first, second = (learn_weights(model, deltas(model), [0.5, 0.5], selection, SETTINGS) for _ in range(2))
    assert first.coefficients == second.coefficients
    other = learn_weights(model, deltas(model), [0.5, 0.5], selection, replace(SETTINGS, seed=1))
    assert other.coefficients != first.coefficients


def test_no_batch_is_larger_than_a_training_batch_or_longer_than_the_longest_window(
    model: Any, selection: SelectionWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows are padded to few lengths, and all that padding counts."""
    sizes: list[tuple[int, int]] = []
    real = bam_lora.learned_weights.pad_windows

    def recording(rows: Any, pad: int, length: int | None = None) -> Any:
        ids, mask = real(rows, pad, length)
        sizes.append(tuple(ids.shape))
        return ids, mask

    monkeypatch.setattr(bam_lora.learned_weights, "pad_windows", recording)
    short = {role: [replace(w, context=(), scored=w.scored[:10]) for w in windows] * 3
             for role, windows in selection.train.items()}  # fmt: skip
    mixed = SelectionWindows({role: [*short[role], *selection.train[role]] for role in short}, short)
    learn_weights(model, deltas(model), [0.5, 0.5], mixed, replace(SETTINGS, batch_tokens=300, steps=2, windows=40))
    longest = max(window.length for windows in mixed.train.values() for window in windows)
    assert len(sizes) > 8
    assert all(rows * length <= 300 or rows == 1 for rows, length in sizes), sizes
    assert all(length % 64 == 0 or length == longest for _, length in sizes), sizes
