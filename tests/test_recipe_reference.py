"""docs/recipe.md is what the models say."""

from pathlib import Path

from bam_lora.recipe import Recipe, load_recipe
from bam_lora.recipe_reference import main, reference

ROOT = Path(__file__).resolve().parents[1]


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
