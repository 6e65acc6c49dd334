"""The languages of the recipes: each in its own words and script, and the table of them in docs/languages.md."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from recipe_hub import FRAGMENTS, LANGUAGES, RECIPES, SHARED, comment

from bam_lora.recipe import load_recipe
from bam_lora.recipe_yaml import read_yaml

PAGE = RECIPES.parent / "docs" / "languages.md"
AT_LEAST = {
    "ukrainian", "greek", "polish", "czech", "romanian", "hungarian", "finnish", "turkish", "arabic", "persian",
    "hindi", "bengali", "tamil", "thai", "vietnamese", "indonesian", "swahili", "basque", "bulgarian", "german",
}  # fmt: skip
SCRIPTS = {"Cyrl": "CYRILLIC", "Grek": "GREEK", "Arab": "ARABIC", "Deva": "DEVANAGARI", "Beng": "BENGALI",
           "Taml": "TAMIL", "Thai": "THAI", "Latn": "LATIN"}  # fmt: skip


def name_of(language: Path) -> str:
    return language.name


def rows() -> dict[str, list[str]]:
    """The table of the page: by folder, the cells of its row."""
    table = PAGE.read_text(encoding="utf-8").split("\n## Recipes\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    linked = {re.match(r"\[(\w+)\]", row[4]): row for row in cells[1:]}
    return {found[1]: row for found, row in linked.items() if found}


def prompts(path: Path) -> list[str]:
    found = read_yaml(path.read_text(encoding="utf-8"), path).value["evaluation"]["samples"]
    assert all(isinstance(one, str) for one in found)
    return list(found)


def scripts_in(text: str) -> Counter[str]:
    """How many letters and signs of each script a text has, by the first word of their Unicode names."""
    return Counter(unicodedata.name(sign).split()[0] for sign in text if unicodedata.category(sign)[0] in "LM")


def fragments() -> list[Path]:
    return [language / name for language in LANGUAGES for name in FRAGMENTS if (language / name).is_file()]


def test_there_are_the_languages() -> None:
    assert {language.name for language in LANGUAGES} >= AT_LEAST
    assert set(rows()) == {language.name for language in LANGUAGES}


@pytest.mark.parametrize("language", LANGUAGES, ids=name_of)
def test_a_language_is_in_the_table_as_its_recipes_have_it(language: Path) -> None:
    name, family, script, config, recipe, instructions, tasks = rows()[language.name]
    assert name.lower() == language.name
    assert family
    target = load_recipe(language / "pretrain.yaml").data.target[0]
    assert target.name == config.strip("`")
    assert script == {"Cyrl": "Cyrillic", "Grek": "Greek", "Arab": "Arabic", "Deva": "Devanagari", "Beng": "Bengali",
                      "Taml": "Tamil", "Thai": "Thai", "Latn": "Latin"}[config.strip("`").split("_")[1]]  # fmt: skip
    assert recipe == f"[{language.name}](../recipes/{language.name}/pretrain.yaml)"
    own = load_recipe(language / "instruct.yaml").data.target[0]
    assert instructions == (f"MURI-IT, `{own.name}`" if "muri-it" in own.path else own.path)
    said = re.search(r"Tasks for it in lm-evaluation-harness: ([\w, ]+)\.", comment(language / "data.yaml"))
    assert said is None or said[1].split(", ") == re.findall(r"`(\w+)`", tasks)


@pytest.mark.parametrize("path", fragments(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_prompts_are_in_the_language_and_the_last_is_english(path: Path) -> None:
    *own, english = prompts(path)
    config = load_recipe(path.parent / "pretrain.yaml").data.target[0].name or ""
    assert len(own) >= 2
    assert english.isascii()
    for prompt in own:
        found = scripts_in(prompt.replace("\u200c", ""))
        assert set(found) <= {SCRIPTS[config.split("_")[1]]}, f"{prompt}: {found}"
        assert prompt == unicodedata.normalize("NFC", prompt)
        assert prompt == prompt.strip()


def test_no_prompt_stands_in_two_languages() -> None:
    every = Counter(prompt for path in fragments() for prompt in set(prompts(path)[:-1]))
    assert len(every) >= 4 * len(AT_LEAST)
    assert set(every.values()) == {1}


def test_scripts_differ_in_nothing_but_their_language() -> None:
    made = set()
    for language in LANGUAGES:
        text = (language / "adapt.py").read_text(encoding="utf-8")
        text = re.sub(r"default=[\d_]+, help=\"\w+ pages", 'default=0, help="pages', text)
        text = re.sub(r"samples=\[\".*\"\]", "samples=[]", text)
        text = re.sub(r"(Qwen|swiss-ai)/[\w.-]+", "BASE", text)
        text = text.replace(load_recipe(language / "pretrain.yaml").data.target[0].name or "", "CONFIG")
        text = re.sub(language.name, "LANGUAGE", text, flags=re.IGNORECASE)
        made.add(" ".join(text.split()))
    assert len(made) == 1


@pytest.mark.parametrize("language", LANGUAGES, ids=name_of)
def test_a_script_takes_the_base_of_the_recipe(language: Path) -> None:
    text = (language / "adapt.py").read_text(encoding="utf-8")
    recipe = load_recipe(language / "pretrain.yaml")
    assert f'"--base", default="{recipe.base}"' in text
    assert f'samples=["{recipe.evaluation.samples[0]}"]' in text


@pytest.mark.parametrize("language", LANGUAGES, ids=name_of)
def test_what_the_comments_advise_can_be_loaded(language: Path, tmp_path: Path) -> None:
    recipe = language / "pretrain.yaml"
    minimal = recipe.read_text(encoding="utf-8").replace("pretrain-approximate", "pretrain-minimal")
    minimal = re.sub(r"\.\./_shared", str(SHARED), minimal).replace("data.yaml]", f"{language / 'data.yaml'}]")
    (tmp_path / "minimal.yaml").write_text(minimal, encoding="utf-8")
    assert load_recipe(tmp_path / "minimal.yaml", ["vocabulary.tokens=8000"]).vocabulary.tokens == 8000
    advice = comment(language / "data.yaml")
    for said in re.findall(r"add `data: \{filters: (\{.*?\})\}`", advice):
        assert load_recipe(recipe, [f"data.filters={said}"]).data.filters != load_recipe(recipe).data.filters
    for setting in re.findall(r"--set (data\.[^ `]+)", comment(recipe)):
        assert load_recipe(recipe, [setting])


@pytest.mark.slow  # the harness reads all of its task files, which takes its time
def test_the_tasks_are_those_of_the_harness() -> None:
    tasks = pytest.importorskip("lm_eval.tasks").TaskManager().all_tasks
    named = {task for row in rows().values() for task in re.findall(r"`(\w+)`", row[6])}
    assert len(named) >= 3 * len(AT_LEAST)
    assert named <= set(tasks)
