"""docs/recipe.md is what the models say, and the recipes of the repository load."""

from pathlib import Path

import pytest

from bam_lora.recipe import Recipe, load_recipe
from bam_lora.recipe_reference import main, reference
from bam_lora.recipe_yaml import read_yaml

ROOT = Path(__file__).resolve().parents[1]
SHARED = sorted((ROOT / "recipes" / "_shared").glob("*.yaml"))
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path not in SHARED)


def test_the_reference_is_not_stale():
    written = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert written == reference(), "run python -m bam_lora.recipe_reference"


def test_the_reference_names_every_key(tmp_path):
    main([str(tmp_path / "recipe.md")])
    text = (tmp_path / "recipe.md").read_text(encoding="utf-8")
    for name in (
        "`replay_share`",
        "`checkpointing`",
        "`window_bytes`",
        *(f"| `{key}` |" for key in Recipe.model_fields),
    ):
        assert name in text


def test_the_example_in_the_reference_loads(tmp_path):
    example = reference().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(example, encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml").data.target[0].tokens == 200_000_000


def test_there_are_recipes():
    assert len(RECIPES) >= 2
    assert len(SHARED) >= 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_loads_and_says_how_to_run_it(path):
    made = load_recipe(path)
    assert made.evaluation.target
    assert made.evaluation.source
    header = path.read_text(encoding="utf-8").split("\nextends:")[0].split("\nbase:")[0]
    for word in (f"recipes/{path.parent.name}/{path.name}", "Hardware:", "Expect:"):
        assert word in header


@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.name)
def test_every_shared_part_is_used(path):
    extended = [
        name for recipe in RECIPES for name in read_yaml(recipe.read_text(encoding="utf-8"), recipe).value["extends"]
    ]
    assert f"../_shared/{path.name}" in extended
