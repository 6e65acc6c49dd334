"""Searched merge weights: which candidates are tried, what is kept, what it costs, and a run that searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENGLISH, GERMAN, write_jsonl
from numerics_helpers import gaussian

import bam_lora.merge_learning
import bam_lora.quickstart
from bam_lora.adapters import Factors
from bam_lora.base import Loading, load_model, load_tokenizer
from bam_lora.coefficients import Coefficients, stack
from bam_lora.errors import Interrupted, UserError
from bam_lora.evaluate import EvaluationSet, Window, bits_per_byte, make_windows, score
from bam_lora.ledger import Ledger
from bam_lora.loop import run
from bam_lora.merge_search import SearchSettings, search_weights
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.report import collect
from bam_lora.scoring import Windowed
from bam_lora.selection import SelectionWindows, split_selection
from bam_lora.store import hash_file, read_record

SCALES = (0.7, 0.85, 1.0, 1.2)
SETTINGS = SearchSettings(
    source_weight=1.0, scales=SCALES, evaluations=24, tokens=1_000_000, batch_tokens=512, dtype="float32"
)


TRIAL: dict[str, Any] = {"scales": (1.0, 0.75, 0.5, 0.25, 0.0), "shares": False}
BASE = Path(bam_lora.quickstart.__file__).parent / "base"  # small and trained: noise makes it worse


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(BASE, Loading(16, compute_dtype="float32"))


@pytest.fixture(scope="module")
def selection() -> SelectionWindows:
    tokenizer = load_tokenizer(BASE)
    sets = (EvaluationSet("de", "target", tuple(GERMAN[:16])), EvaluationSet("en", "source", tuple(ENGLISH[:16])))
    windows = tuple(tuple(make_windows(s.documents, tokenizer, 512, 0)) for s in sets)
    return split_selection(Windowed("key", sets, windows, 512, 0), 0.25, 0)


def noise(model: Any, *sizes: float) -> dict[str, list[Factors | None]]:
    """A branch of noise of each size for every linear layer."""
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    branches: dict[str, list[Factors | None]] = {}
    for number, name in enumerate(linear):
        o, i = model.get_submodule(name).weight.shape
        branches[f"{name}.weight"] = [
            Factors(gaussian(4, i, seed=10 * number + k), gaussian(o, 4, scale=size, seed=10 * number + k + 5), 2.0)
            for k, size in enumerate(sizes)
        ]
    return branches


def bits(model: Any, windows: Sequence[Window]) -> float:
    nats, sizes = score(model, list(windows), pad=0, batch_size=4, dtype="float32")
    return bits_per_byte(nats, sizes)[0]


def test_what_harms_least_is_chosen_and_scores_are_those_of_the_dense_model(selection: SelectionWindows) -> None:
    model = load_model(BASE, Loading(16, compute_dtype="float32"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    branches = noise(model, 0.2, 0.05)
    steps: list[tuple[int, int]] = []
    found = search_weights(
        model, branches, [0.5, 0.5], selection, SETTINGS, on_step=lambda step, most: steps.append((step, most))
    )
    best = min(found.trials, key=lambda trial: trial["objective"])
    assert found.weights == best["weights"]
    assert found.weights[0] == 0  # nothing of the large noise
    assert found == search_weights(model, branches, [0.5, 0.5], selection, SETTINGS)
    assert steps == [(step, 24) for step in range(1, 21)]
    assert [trial["weights"] for trial in found.held_out] == [[0.5, 0.5], best["weights"]]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    for trial in found.held_out:
        with torch.no_grad():
            for name, factors in branches.items():
                stacked = stack(factors, Coefficients.scalar(trial["weights"]))
                assert stacked is not None
                weight = model.get_submodule(name.removesuffix(".weight")).weight
                weight.copy_(before[name] + stacked[0] @ stacked[1])
        values = [bits(model, selection.held_out[role]) for role in ("target", "source")]
        assert [trial["target"], trial["source"]] == pytest.approx(values, rel=1e-4)
        assert trial["objective"] == pytest.approx(sum(values), rel=1e-4)


def test_the_plain_average_stays_unless_held_out_text_agrees(
    model: Any, selection: SelectionWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bam_lora.merge_search.score_roles

    def contrary(view: Any, text: Any, settings: Any) -> dict[str, float]:
        values = real(view, text, settings)
        held_out = text["target"][0] in selection.held_out["target"]
        return {**values, "objective": -values["objective"] if held_out else values["objective"]}

    monkeypatch.setattr(bam_lora.merge_search, "score_roles", contrary)
    found = search_weights(model, noise(model, 0.04, 0.002), [0.5, 0.5], selection, SETTINGS)
    assert len(found.held_out) == 2
    assert found.weights == [0.5, 0.5]


def test_the_source_weight_decides(model: Any, selection: SelectionWindows) -> None:
    """Each candidate's objective is target + μ · source."""
    heavy = replace(SETTINGS, source_weight=3.0, evaluations=5)
    found = search_weights(model, noise(model, 0.01, 0.01), [0.5, 0.5], selection, heavy)
    assert len(found.trials) == 5
    for trial in found.trials:
        assert trial["objective"] == pytest.approx(trial["target"] + 3 * trial["source"])


def test_a_merge_that_harms_is_rejected_and_one_that_harms_little_is_scaled_down(
    model: Any, selection: SelectionWindows
) -> None:
    on_trial = replace(SETTINGS, **TRIAL)
    rejected = search_weights(model, noise(model, 0.2, 0.2), [0.5, 0.5], selection, on_trial)
    assert rejected.weights == [0.0, 0.0]
    assert [trial["weights"] for trial in rejected.held_out] == [[0.5, 0.5], [0.0, 0.0]]
    alone = [bits(model, selection.held_out[role]) for role in ("target", "source")]
    assert [rejected.held_out[1][role] for role in ("target", "source")] == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("changes", [{}, TRIAL])
def test_cost_stays_within_its_share(model: Any, selection: SelectionWindows, changes: dict[str, Any]) -> None:
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int(kwargs["attention_mask"].sum())), with_kwargs=True
    )
    try:
        search_weights(
            model, noise(model, 0.01, 0.01), [0.5, 0.5], selection, replace(SETTINGS, tokens=3000, **changes)
        )
    finally:
        handle.remove()
    assert 0.4 * 3000 < sum(seen) / 3 < 1.1 * 3000


def test_a_candidate_without_a_finite_score_is_named(model: Any, selection: SelectionWindows) -> None:
    broken = noise(model, 1e30, 1e30)
    with pytest.raises(UserError, match=r"candidate 0\.5/0\.5: expected a finite score, found NaN or infinity"):
        search_weights(model, broken, [0.5, 0.5], selection, SETTINGS)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, texts in (("german", GERMAN), ("english", ENGLISH)):
        write_jsonl(folder / f"{name}.jsonl", texts[:24])
        write_jsonl(folder / f"{name}.select.jsonl", texts[24:40])
        write_jsonl(folder / f"{name}.test.jsonl", texts[-3:])
    return folder


def recipe(base: Path, files: Path, merge: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    def one(kind: str) -> dict[str, Any]:
        return {
            "target": [{"path": str(files / f"german.{kind}.jsonl"), "set": "german"}],
            "source": [{"path": str(files / f"english.{kind}.jsonl"), "set": "english"}],
        }

    search = {"evaluations": 7, "share": 1.0}
    values: dict[str, Any] = {
        "base": str(base),
        "output": "unused",
        "data": {"target": [{"path": str(files / "german.jsonl")}], "sequence_length": 128},
        "bam": {"slices": 3, "branches": 2, "merge": {"weights": "search", "search": search, **(merge or {})}},
        "lora": {"r": 4},
        "training": {
            "learning_rate": 5e-3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "checkpointing": False,
        },
        "evaluation": {**one("test"), "branches": False},
        "selection": one("select"),
    }
    return recipe_from_dict({**values, **changes})


@pytest.mark.slow
def test_a_run_stopped_while_it_searches_ends_with_the_same_bytes(
    tiny_base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(recipe(tiny_base, files), tmp_path / "whole")
    report = collect(tmp_path / "whole")
    for number, trials in ((1, 7), (2, 4)):  # one branch is left for the second merge: its scales
        merged = read_record(tmp_path / f"whole/iterations/{number:02}/merge.json")
        assert merged is not None
        found = merged["searched"]
        assert len(found["trials"]) == trials
        assert merged["weights"] == found["weights"]
        assert report["iterations"][number - 1]["searched"] == found
        stored = Ledger.load(tmp_path / "whole").iterations[number - 1]["coefficients"].values()
        assert {tuple(value["values"]) for value in stored} == {tuple(found["weights"])}
    page = (tmp_path / "whole/report.html").read_text()
    assert "Searched merge weights" in page
    assert "Candidates, iteration 1" in page

    real, calls = bam_lora.merge_learning.search_weights, []

    def stopping(*args: Any, on_step: Any, **kwargs: Any) -> Any:
        def step(number: int, steps: int) -> None:
            calls.append(number)
            if len(calls) in (3, 12):  # once in each merge
                raise Interrupted("SIGTERM")
            on_step(number, steps)

        return real(*args, on_step=step, **kwargs)

    monkeypatch.setattr(bam_lora.merge_learning, "search_weights", stopping)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run(recipe(tiny_base, files), tmp_path / "stopped")
    run(recipe(tiny_base, files), tmp_path / "stopped")
    whole, stopped = (hash_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "stopped"))
    assert whole == stopped


def test_a_rejected_merge_leaves_the_base_as_it_was(
    tiny_base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a selection set that calls everything but the base alone worse: the first merge is rejected, the next not."""
    real = bam_lora.merge_learning.search_weights
    merges: list[int] = []

    def judged(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        merges.append(len(found.trials))
        return replace(found, weights=[0.0, 0.0]) if len(merges) == 1 else found

    monkeypatch.setattr(bam_lora.merge_learning, "search_weights", judged)
    search = {"scales": [1, 0.5, 0], "shares": False, "share": 1.0}
    report = run(recipe(tiny_base, files, {"search": search}), tmp_path / "run")
    assert merges == [3, 3]
    first, second = report["iterations"]
    assert first["coefficients"] == [0.0, 0.0]
    assert (first["delta_norm"], first["merged_norm"]) == (0.0, 0.0)
    before, after = (
        {s["set"]: s["bits_per_byte"] for s in report["scores"] if s["iteration"] == number} for number in (0, 1)
    )
    assert before == after
    assert second["delta_norm"] == pytest.approx(second["merged_norm"], rel=1e-4)
    assert "Iteration 1: rejected, the base stayed as it was" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize(
    ("merge", "changes", "message"),
    [
        (
            {"method": "karcher"},
            {},
            r"bam\.merge\.method: expected linear, since its weights are searched, found karch",
        ),
        ({"search": {"scales": [-1]}}, {}, r"bam\.merge\.search\.scales: expected a list of numbers >= 0"),
        (
            {"search": {"scales": []}},
            {},
            r"bam\.merge\.search\.scales: expected a list of numbers >= 0, found an empty",
        ),
        ({"weights_by_module": {"q": "tokens"}}, {}, r"weights_by_module: expected none beside `weights: search`"),
        ({}, {"selection": {}}, r"selection\.target: expected text to search the merge weights by, found none"),
    ],
)
def test_what_is_refused(tiny_base: Path, files: Path, merge: Any, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(tiny_base, files, merge, **changes)
