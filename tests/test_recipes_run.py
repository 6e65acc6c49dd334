"""Every fragment of the recipes runs from the Hub to the report: the base made tiny, rows of the stated columns.

The quick tests run each base, goal and language at least once, the slow ones every pair of two of them.
"""

from __future__ import annotations

import functools
import itertools
import json
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import PatchedHub
from recipe_hub import (
    BASES,
    FULL,
    GOALS,
    LANGUAGES,
    RECIPES,
    SCRIPTS,
    architecture,
    fragment_of,
    hub_id,
    recipes_hub,
)

from bam_lora.loop import run
from bam_lora.recipe import Recipe, load_recipe

Triple = tuple[Path, Path, Path]
SMALL = (  # two branches of a step each, one iteration
    "bam.slices=2", "training.max_steps=2", "training.warmup_steps=0", "training.gradient_accumulation_steps=1",
    "training.checkpointing=false", "data.sequence_length=128", "lora.r=4", "lora.alpha=8",
    "evaluation.branches=false", "evaluation.samples=[Ja]",
)  # fmt: skip
DOCUMENTS = 3
TUNED = [path.parent for path in FULL if path.name == "instruct.yaml"]


def pairs_of(triple: Triple) -> set[tuple[Path, Path]]:
    return set(itertools.combinations(triple, 2))


def every_triple() -> list[Triple]:
    goes = itertools.product(BASES, GOALS, LANGUAGES)
    return [(base, goal, language) for base, goal, language in goes if fragment_of(language, goal) is not None]


@functools.cache
def pairwise() -> list[Triple]:
    """Runs that have every pair of a base, a goal and a language that go together; greedy, the most new ones first."""
    left = {pair for triple in every_triple() for pair in pairs_of(triple)}
    found, goes = [], every_triple()
    for most in (3, 2, 1):
        for triple in goes:
            if len(left & pairs_of(triple)) == most:
                found.append(triple)
                left -= pairs_of(triple)
    return found


@functools.cache
def each_once() -> list[Triple]:
    """Few runs that have every fragment, spread over the goals and as many pairs as they can have."""
    chosen: list[Triple] = []
    left = {part for triple in every_triple() for part in triple}
    pairs: set[tuple[Path, Path]] = set()
    goals: Counter[Path] = Counter()
    while left:
        best = max(every_triple(), key=lambda one: (len(left & set(one)), -goals[one[1]], len(pairs_of(one) - pairs)))
        chosen.append(best)
        left -= set(best)
        pairs |= pairs_of(best)
        goals[best[1]] += 1
    return chosen


def name_of(triple: Triple) -> str:
    base, goal, language = triple
    return f"{base.stem}-{goal.stem}-{language.name}"


def small(path: Path, output: Path) -> Recipe:
    """A recipe on a few rows and steps."""
    recipe = load_recipe(path)
    sets = [("target", len(recipe.evaluation.target)), ("source", len(recipe.evaluation.source))]
    few = [f"evaluation.{role}.{number}.documents={DOCUMENTS}" for role, count in sets for number in range(count)]
    return load_recipe(path, [*SMALL, *few], output=str(output))


def written(triple: Triple, folder: Path) -> Path:
    base, goal, language = triple
    path = folder / "recipe.yaml"
    path.write_text(f"extends: [{base}, {goal}, {fragment_of(language, goal)}]\noutput: {folder / 'run'}\n")
    return path


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[PatchedHub]:
    """A hub with the bases and data sets of all recipes, asked by this process."""
    folder = tmp_path_factory.mktemp("recipes")
    recipes = [load_recipe(written(triple, folder)) for triple in each_once()]
    with recipes_hub(folder, tiny_base, [*recipes, *map(load_recipe, FULL)]) as hub:
        yield hub


def run_small(recipe: Recipe, model_type: str) -> dict[str, Any]:
    """Runs it; what every run must come to."""
    output = Path(recipe.output)
    report = run(recipe, output)
    plan = json.loads((output / "plan.json").read_text(encoding="utf-8"))
    sources = plan["data"]["sources"]
    assert len(sources) == len(recipe.data.target) + len(recipe.data.replay)
    assert all(source["used_tokens"] > 0 for source in sources if source["role"] == "target")
    assert sum(source["used_tokens"] > 0 for source in sources) >= len(sources) - 2  # a share may be below one row
    assert len(report["iterations"]) == 1
    assert {one["set"] for one in report["scores"]} == {
        one.set for one in (*recipe.evaluation.target, *recipe.evaluation.source)
    }
    assert json.loads((output / "model" / "config.json").read_text(encoding="utf-8"))["model_type"] == model_type
    return report


@pytest.mark.parametrize("triple", each_once(), ids=name_of)
def test_every_fragment_runs(triple: Triple, hub: PatchedHub, tmp_path: Path) -> None:
    recipe = small(written(triple, tmp_path), tmp_path / "run")
    run_small(recipe, architecture(triple[0]))
    asked = {one.path.split("?")[0] for one in hub.requests("/resolve/|/cdn/|/tree/|/api/datasets/")}
    for source in (*recipe.data.target, *recipe.data.replay):
        assert any(source.path in path for path in asked), source.path


def test_the_runs_have_every_fragment(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = each_once()
    fragments = {part for triple in chosen for part in triple}
    assert fragments == {*BASES, *GOALS, *LANGUAGES}
    with capsys.disabled():
        quick = len({pair for triple in chosen for pair in pairs_of(triple)})
        every = {pair for triple in pairwise() for pair in pairs_of(triple)}
        print(f"\n{len(FULL)} recipes; {len(chosen)} quick runs have all {len(fragments)} fragments and {quick} of")
        print(f"{len(every)} pairs; {len(pairwise())} slow runs have all of them")


def test_the_slow_runs_have_every_pair() -> None:
    wanted = {pair for triple in every_triple() for pair in pairs_of(triple)}
    assert len(pairwise()) < len(every_triple())
    assert {pair for triple in pairwise() for pair in pairs_of(triple)} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("triple", pairwise(), ids=name_of)
def test_every_pair_of_fragments_runs(triple: Triple, hub: PatchedHub, tmp_path: Path) -> None:
    run_small(small(written(triple, tmp_path), tmp_path / "run"), architecture(triple[0]))


def run_chain(folder: Path, first: str, second: str, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language's continued pretraining, then its instruction tuning from the finished run."""
    monkeypatch.chdir(output)
    recipe = load_recipe(folder / f"{first}.yaml")
    model_type = next(architecture(base) for base in BASES if hub_id(base) == recipe.base)
    run_small(small(folder / f"{first}.yaml", output / recipe.output), model_type)
    tuned = small(folder / f"{second}.yaml", output / "runs" / "tuned")
    assert tuned.base == recipe.output
    report = run_small(tuned, model_type)
    assert [one["name"] for one in report["inherited"]] == [Path(recipe.output).name]


def test_instruction_tuning_goes_on_from_the_finished_run(
    hub: PatchedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_chain(RECIPES / "bulgarian", "pretrain", "instruct", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "language", [path.parent for path in FULL if path.name == "instruct.yaml"], ids=lambda p: p.name
)
def test_every_language_can_be_tuned(
    language: Path, hub: PatchedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_chain(language, "pretrain", "instruct", tmp_path, monkeypatch)
    if (language / "paper-instruct.yaml").is_file():
        (tmp_path / "paper").mkdir()
        run_chain(language, "paper-llama-3-8b", "paper-instruct", tmp_path / "paper", monkeypatch)


def run_script(script: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--cpu", "--documents", "12", "--max-length", "64", "--max-steps", "8", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    assert (output / "model" / "model.safetensors").is_file()
    recipe = load_recipe(output / "recipe.yaml")
    plain = load_recipe(script.parent / "pretrain.yaml")
    assert (recipe.base, recipe.slices, recipe.bam.branches) == (plain.base, plain.slices, plain.bam.branches)
    assert recipe.data.replay_share == plain.data.replay_share
    assert (recipe.lora.r, recipe.lora.alpha, recipe.quantization.bits) == (plain.lora.r, plain.lora.alpha, 4)
    assert recipe.training.learning_rate == plain.training.learning_rate


def test_a_script_does_what_its_recipe_does(hub: PatchedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_script(RECIPES / "bulgarian" / "adapt.py", tmp_path / "run", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_every_script_runs(script: Path, hub: PatchedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_script(script, tmp_path / "run", monkeypatch)
