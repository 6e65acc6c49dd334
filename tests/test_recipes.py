"""The recipes load and plan, and say of themselves and of their data what is true."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from recipe_hub import (
    BASES,
    FRAGMENTS,
    FULL,
    GOALS,
    LANGUAGES,
    RECIPES,
    SHARED,
    TASKS,
    architecture,
    catalogue,
    comment,
)
from recipe_hub import fragment_of as fragment
from transformers import CONFIG_MAPPING

from bam_lora.plan import SlicePlan, make_plan
from bam_lora.recipe import load_recipe
from bam_lora.recipe_catalogue import head_lines, used_sources, with_head
from bam_lora.recipe_loading import _read_file
from bam_lora.recipe_yaml import read_yaml

EVERY = sorted(RECIPES.rglob("*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def leaves(value: Any, place: str = "") -> set[str]:
    """The dotted keys of a fragment; a list is one value."""
    if not isinstance(value, dict):
        return {place}
    return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{place}.{key}" if place else str(key))}


def keys_of(path: Path) -> set[str]:
    return leaves(_read_file(path, ()).value)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_there_are_recipes() -> None:
    assert len(BASES) >= 12
    assert {goal.stem for goal in GOALS} == {"pretrain-approximate", "pretrain-minimal", "instruct", "single"}
    assert {"bulgarian", "german"} <= {language.name for language in LANGUAGES}
    assert len(FULL) >= 2 * len(LANGUAGES)


@pytest.mark.parametrize("path", FULL, ids=name_of)
def test_every_recipe_loads_and_plans_what_it_says(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.evaluation.target
    assert recipe.evaluation.source
    assert recipe.evaluation.samples
    text = next(re.finditer(r"Tokens: +(.*)", text_of(path)))[1]
    said = re.match(r"(\d+) M \w+ and (\d+) M of replay, some ([\d,]+) steps(?: in all, ([\d,]+) a branch)?", text)
    if recipe.mode == "chat":
        assert said is None
        return
    assert said, text
    target, replay, steps, branch = (int((number or "0").replace(",", "")) for number in said.groups())
    assert [one.tokens for one in recipe.data.target] == [target * 10**6]
    assert replay / (target + replay) == pytest.approx(recipe.data.replay_share)
    tokens = (target + replay) * 10**6 // recipe.slices
    part = SlicePlan("01", (0, tokens // recipe.data.sequence_length), tokens, 0)
    plan = make_plan(recipe, [part] * recipe.slices, base_key="base")
    every = plan.all_branches()
    assert sum(one.steps for one in every) == pytest.approx(steps, rel=0.01)
    assert recipe.strategy == "single" or every[0].steps == pytest.approx(branch, rel=0.01)


@pytest.mark.parametrize("path", FULL, ids=name_of)
def test_the_head_of_a_recipe(path: Path) -> None:
    text = text_of(path)
    head = text.split("\nextends:")[0]
    assert re.search(rf"^#     bam-lora run   recipes/{re.escape(name_of(path))}( |$)", head, re.MULTILINE)
    for word in ("Hardware:", "Tokens:", "Time:", "Expect:", "not measured"):
        assert word in head, word
    recipe = load_recipe(path)
    assert with_head(text, head_lines(recipe, catalogue())) == text, "run python -m bam_lora.recipe_catalogue"
    stated = comment(path).partition("Data, with its columns:")[2]
    for name in used_sources(recipe):
        data = catalogue()[name]
        for said in (data.id, data.licence, data.source, data.looked_up, *data.columns):
            assert said in stated, said
    gated = [base for base in BASES if f"base: {recipe.base}\n" in text_of(base) and "gated: ask" in comment(base)]
    assert not gated or "hf auth login" in head


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_every_file_begins_with_a_line_that_says_what_it_is(path: Path) -> None:
    first, second = text_of(path).splitlines()[:2]
    assert re.match(r"# [A-Z].{20,117}$", first)
    assert second == "#" or not second.startswith("#"), "one line, then an empty one"


@pytest.mark.parametrize("path", BASES, ids=name_of)
def test_bases_say_what_they_are(path: Path) -> None:
    base = read_yaml(text_of(path), path).value["base"]
    said = comment(path)
    assert architecture(path) in CONFIG_MAPPING
    assert f"Looked up: https://huggingface.co/{base}, 20" in said
    for word in ("parameters", "context", "vocabulary", "languages its vendor names"):
        assert word in said
    assert re.search("Apache-2.0|License|terms of use", said)
    assert "gated" in said or "hf auth login" in said
    assert {"lora.r", "lora.alpha", "quantization.bits", "training.learning_rate"} <= keys_of(path)


def test_no_key_stands_in_two_kinds_of_fragments() -> None:
    kinds = {
        "base": {key for path in BASES for key in keys_of(path)},
        "goal": {key for path in GOALS for key in keys_of(path)},
        "language": {key for language in LANGUAGES for name in FRAGMENTS if (language / name).is_file()
                     for key in keys_of(language / name)},
        "tasks": {key for path in TASKS for key in keys_of(path)},
    }  # fmt: skip
    for one, other in itertools.combinations(kinds, 2):
        assert not kinds[one] & kinds[other], f"{one} and {other}"
    assert kinds.pop("tasks") == {"evaluation.tasks"}
    assert all(len(keys) >= 3 for keys in kinds.values())


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.stem)
def test_fragments_combine_in_any_order(goal: Path, tmp_path: Path) -> None:
    language = fragment(RECIPES / "german", goal)
    assert language is not None
    made = []
    for order in itertools.permutations((BASES[0], goal, language)):
        (tmp_path / "recipe.yaml").write_text(f"extends: [{', '.join(map(str, order))}]\noutput: out\n")
        made.append(load_recipe(tmp_path / "recipe.yaml"))
    assert len(made) == 6
    assert all(one == made[0] for one in made)


def test_the_recipe_in_the_readme_loads(tmp_path: Path) -> None:
    block = text_of(RECIPES / "README.md").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(re.sub(r"([\w-]+/[\w./-]+\.yaml)", rf"{RECIPES}/\1", block))
    assert load_recipe(tmp_path / "recipe.yaml").base == "Qwen/Qwen3-0.6B-Base"


def test_every_fragment_and_data_set_is_of_use() -> None:
    used = {name for path in FULL for name in used_sources(load_recipe(path))}
    for goal, language in itertools.product(GOALS, LANGUAGES):
        for path in (goal, fragment(language, goal)):
            held = _read_file(path, ()).value if path else {}
            lists = [*held.get("data", {}).values(), *held.get("evaluation", {}).values()]
            used |= {one["path"] for listed in lists if isinstance(listed, list) for one in listed if "path" in one}
    assert used == set(catalogue())
    for path in (SHARED / "datasets").glob("*.yaml"):
        assert path.stem.replace("--", "/") in used


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda language: language.name)
def test_a_language_is_complete(language: Path) -> None:
    names = {path.name for path in language.iterdir() if path.is_file()}
    assert {"data.yaml", "tasks.yaml", "pretrain.yaml", "adapt.py"} <= names
    assert ("instruct.yaml" in names) == ("instruct-data.yaml" in names)
    script = (language / "adapt.py").read_text(encoding="utf-8")
    target = load_recipe(language / "pretrain.yaml").data.target[0]
    assert f'"{target.path}", "{target.name}"' in script
    assert f"python recipes/{language.name}/adapt.py" in script
    assert len(script.splitlines()) <= 60


@pytest.mark.parametrize("path", TASKS, ids=name_of)
def test_tasks_go_with_a_recipe(path: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"extends: [{path}, {path.parent / 'pretrain.yaml'}]\noutput: out\n")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.evaluation.target == load_recipe(path.parent / "pretrain.yaml").evaluation.target
    *own, english = recipe.evaluation.tasks
    assert own
    assert {one.role for one in own} == {"target"}
    assert (english.task, english.role) == ("belebele_eng_Latn", "source")
    assert own[0].task.startswith("belebele_")
    said = re.search(r"Tasks for it in lm-evaluation-harness: ([\w, ]+)\.", comment(path.parent / "data.yaml"))
    assert said is None or said[1].split(", ") == [one.task for one in own]


@pytest.mark.slow
def test_the_harness_has_the_tasks() -> None:
    pytest.importorskip("lm_eval")
    from bam_lora.tasks import TaskSpec, find_tasks, require_known

    names = {one["task"] for path in TASKS for one in read_yaml(text_of(path), path).value["evaluation"]["tasks"]}
    assert len(names) > len(TASKS)
    for found in find_tasks([TaskSpec(name) for name in sorted(names)]):
        require_known(found)
