"""The probe of a baseline: both runs at a share of the tokens, and what the report says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENGLISH, GERMAN, write_jsonl
from typer.testing import CliRunner

from bam_lora.base import load_tokenizer
from bam_lora.baseline import probe_baseline, probe_recipe, rival_recipe
from bam_lora.cli import app
from bam_lora.data import Layout, TrainingSource
from bam_lora.dealing import deal_sources
from bam_lora.errors import UserError
from bam_lora.planning import text_source
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.report import collect
from bam_lora.sources import TextSource
from bam_lora.store import read_record


def values(base: Path, folder: Path) -> dict[str, Any]:
    return {
        "base": str(base),
        "output": str(folder / "run"),
        "data": {
            "target": [{"path": str(write_jsonl(folder / "german.jsonl", GERMAN * 2))}],
            "replay": [{"path": str(write_jsonl(folder / "english.jsonl", ENGLISH[:24] * 6))}],
            "replay_share": 0.2,
            "sequence_length": 64,
        },
        "bam": {"slices": 6, "branches": 2, "merge": {"weights": "learned", "learned": {"steps": 4}}},
        "lora": {"r": 4},
        "training": {"learning_rate": 5e-3, "gradient_accumulation_steps": 1, "checkpointing": False},
        "evaluation": {
            "target": [{"path": str(write_jsonl(folder / "german.test.jsonl", GERMAN[-3:])), "set": "german"}],
            "source": [{"path": str(write_jsonl(folder / "english.test.jsonl", ENGLISH[-3:])), "set": "english"}],
            "samples": ["Am Morgen"],
        },
        "selection": {
            "target": [{"path": str(write_jsonl(folder / "german.select.jsonl", GERMAN[24:40]))}],
            "source": [
                {"path": str(write_jsonl(folder / "english.select.jsonl", ENGLISH[24:40] * 2)), "documents": 24}
            ],
        },
    }


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Recipe:
    return recipe_from_dict(values(tiny_base, tmp_path))


def test_probe_recipe_takes_its_share_of_what_was_used(recipe: Recipe) -> None:
    source = {**vars(text_source(recipe.data.target[0])), "role": "target"}
    # Of an extended run the plan holds a source once for each part that used it.
    used = [{**source, "used_tokens": 6_000}, {**source, "used_tokens": 4_000}]
    used.append({**vars(text_source(recipe.data.replay[0])), "role": "replay", "used_tokens": 2_500})
    probe = probe_recipe(recipe, used, 0.05)
    assert (probe.strategy, probe.data.target[0].tokens, probe.data.replay_share) == ("bam", 500, 0.2)
    assert (probe.bam.slices, probe.evaluation.samples) == (4, [])
    assert probe.training == recipe.training


def test_the_probe_has_as_many_slices_for_every_group() -> None:
    for groups, branches, slices, expected in ((3, 3, 12, 6), (3, 2, 12, 12), (3, 2, 6, 6), (2, 2, 8, 4)):
        recipe = recipe_from_dict(
            {
                "base": "org/m",
                "output": "out",
                "data": {"target": [{"path": f"org/{n}"} for n in range(groups)], "slicing": "by_dataset"},
                "bam": {"slices": slices, "branches": branches},
            }
        )
        used = [{**vars(text_source(source)), "role": "target", "used_tokens": 900} for source in recipe.data.target]
        assert probe_recipe(recipe, used, 0.05, groups).bam.slices == expected


def taken(recipe: Recipe, available: dict[str, int]) -> dict[str, int]:
    """Tokens by path that a run of a recipe takes of sources with so many, in documents of 10 tokens."""
    listed = [("target", source) for source in recipe.data.target] + [("replay", s) for s in recipe.data.replay]
    sources = [TrainingSource(text_source(s), role, s.tokens, s.weight) for role, s in listed]
    lengths = [np.full(available[source.where.path] // 10, 10, dtype=np.int64) for source in sources]
    _, used, _ = deal_sources(sources, lengths, Layout(recipe.slices, 64, "random", recipe.data.replay_share, 0))
    return dict(zip((source.where.path for source in sources), used, strict=True))


@pytest.mark.parametrize(
    ("replay", "share", "text_tokens", "expected"),
    [
        ([], 0.0, 70, {"/de": 5_581, "/fr": 2_349, "/en.select": 70}),  # all of it
        ([], 0.0, 5_000, {"/de": 5_067, "/fr": 2_133, "/en.select": 800}),  # a tenth
        ([("/en", None)], 0.2, 700, {"/de": 5_138, "/fr": 2_162, "/en": 2_000, "/en.select": 700}),
        ([("/en", 3.0), ("/books", 1.0)], 0.2, 700,
         {"/de": 5_138, "/fr": 2_162, "/en": 1_500, "/books": 500, "/en.select": 700}),
    ],
)  # fmt: skip
def test_the_rival_trains_on_the_selection_text_in_place_of_target_text(
    recipe: Recipe, replay: list[tuple[str, float | None]], share: float, text_tokens: int, expected: dict[str, int]
) -> None:
    values = recipe.resolved()
    values["data"].update(
        target=[{"path": "/de", "weight": 2.37}, {"path": "/fr", "weight": 1}],
        replay=[{"path": path, "weight": weight} for path, weight in replay],
        replay_share=share,
    )
    probe = recipe_from_dict(values)
    used = [{"role": "target", "used_tokens": 5_630}, {"role": "target", "used_tokens": 2_370}]
    used += [{"role": "replay", "used_tokens": expected[path]} for path, _ in replay]
    rival, added = rival_recipe(probe, used, [(TextSource("/en.select"), text_tokens)])
    available = {"/de": 5_630, "/fr": 9_000, "/en": 90_000, "/books": 90_000, "/en.select": text_tokens}
    assert taken(rival, available) == expected
    assert added == expected["/en.select"]
    assert sum(expected.values()) == sum(one["used_tokens"] for one in used)
    assert (rival.strategy, rival.bam.merge.weights) == ("single", "uniform")
    assert rival.training == probe.training
    assert rival.selection.source == []  # else what it replays would count as held out
    assert rival.data.replay[-1].filters is not None  # what it replays is all of that text


def test_without_selection_text_the_rival_has_the_probes_data(recipe: Recipe) -> None:
    used = [{"role": "target", "used_tokens": 900}, {"role": "replay", "used_tokens": 225}]
    rival, added = rival_recipe(recipe, used, [])
    assert (rival.data, added, rival.strategy) == (recipe.data, 0, "single")


@pytest.mark.parametrize(
    ("changes", "share", "words"),
    [
        ({}, 0.0, "expected a share above 0 and at most 1, found 0"),
        ({"strategy": "single"}, 0.05, "found strategy: single"),
        ({"evaluation": {}}, 0.05, "expected evaluation.target and evaluation.source, found not both"),
    ],
)
def test_what_cannot_be_probed(tiny_base: Path, tmp_path: Path, changes: Any, share: float, words: str) -> None:
    recipe = recipe_from_dict({**values(tiny_base, tmp_path), **changes})
    with pytest.raises(UserError, match=words):
        probe_baseline(tmp_path / "run", recipe, share)


def test_run_with_a_probe(recipe: Recipe, tmp_path: Path) -> None:
    from bam_lora.recipe import dump_recipe

    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = ["run", str(tmp_path / "recipe.yaml"), "--baseline", "0.5"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    probe = read_record(tmp_path / "run" / "baseline.json")
    assert probe is not None
    whole = collect(tmp_path / "run")["cost"]["train_tokens"]
    assert probe["tokens"] == pytest.approx(0.5 * whole, rel=0.1)
    sources: dict[str, Any] = {}
    for name in ("single", "bam"):
        (folder,) = (tmp_path / "run" / "baseline").glob(f"0.5-*/{name}")
        report = collect(folder)
        assert report["cost"]["train_tokens"] == probe["tokens"]
        sources[name] = {Path(one["path"]).name: one["used_tokens"] for one in report["data"]["sources"]}
    replayed = sources["single"].pop("english.select.jsonl")
    assert replayed == sources["bam"]["german.jsonl"] // 10
    assert sources["single"] == {**sources["bam"], "german.jsonl": sources["bam"]["german.jsonl"] - replayed}
    tokenizer = load_tokenizer(Path(recipe.base))
    there = sum(len(tokenizer(text)["input_ids"]) + 1 for text in (ENGLISH[24:40] * 2)[:24])
    assert f"trained on {replayed:,} of the {there:,} tokens of source text" in probe["note"]
    assert probe["envelope"]["verdict"] in ("beyond", "on", "inside", "not compared")
    said = " ".join(first.stdout.split())
    assert f"A probe on 50 % of the tokens ({probe['tokens']:,})" in said.replace("\N{NO-BREAK SPACE}", " ")
    assert CliRunner().invoke(app, command).exit_code == 0  # finds all of it done
    assert read_record(tmp_path / "run" / "baseline.json") == probe
