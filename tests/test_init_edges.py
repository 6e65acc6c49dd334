"""`bam-lora init` with names that are hard to write down, and with hardly any time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bam_lora import init_fit
from bam_lora.commented_yaml import scalar
from bam_lora.errors import UserError
from bam_lora.init import Flags, new_recipe
from bam_lora.recipe import Recipe, load_recipe
from bam_lora.recipe_yaml import read_yaml

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 512,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _a_folder_of_its_own_and_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init_fit, "_config_on_hub", lambda model: None)


def made(base: str, file: str = "mine.yaml", **flags: object) -> tuple[Recipe, str]:
    said = new_recipe(Flags("bg", base, None, **{"gpu_memory": "12GB", **flags}), Path(file), asking=False)
    return load_recipe(file), said


@pytest.mark.parametrize(
    "name",
    ["plain", "a # b", "a: b", "it's", 'say "hi"', "trailing ", "null", "12", "- list", "[a, b]", "{x}", "модел: 8B",
     "a\\b", "x'\"y: #z", "&a", "*a", "@x", "%d", "true", "~", "", "😀", "no", "1e3", "? a", "a:"],
)  # fmt: skip
def test_any_text_is_written_as_yaml_that_reads_the_same(name: str) -> None:
    assert read_yaml(f"base: {scalar(name)} # remark\n", None).value == {"base": name}
    assert read_yaml(f"base: {scalar('./' + name)}\n", None).value == {"base": f"./{name}"}


def test_usual_paths_stay_as_they_are() -> None:
    assert [scalar(path) for path in ("Qwen/Qwen3-4B-Base", "../models/a b")] == ["Qwen/Qwen3-4B-Base", "../models/a b"]


@pytest.mark.parametrize("name", ["a # b: 'модел'", "~nobody-of-this-name"])
def test_a_base_in_a_folder_with_a_hard_name_is_the_one_that_is_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    recipe, said = made(name, "my recipe.yaml")
    assert Path(recipe.base).resolve() == (tmp_path / name).resolve()
    assert "bam-lora run 'my recipe.yaml'" in said


def test_the_folder_one_is_in_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    recipe, said = made(".")
    assert Path(recipe.base).resolve() == tmp_path.resolve()
    assert f"{tmp_path.name} learns Bulgarian" in said


@pytest.mark.parametrize(("base", "file"), [("a\nstrategy: single", "x.yaml"), ("qwen3-0.6b", "x\nseed: 1\n.yaml")])
def test_a_name_cannot_add_lines_to_the_recipe(tmp_path: Path, base: str, file: str) -> None:
    with pytest.raises(UserError, match="expected a name of printable characters"):
        made(base, file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hours", [float("nan"), float("inf"), 1e9, -1.0])
def test_hours_that_are_no_time_are_refused(hours: float) -> None:
    with pytest.raises(UserError, match="--hours: expected a number of hours"):
        made("qwen3-0.6b", hours=hours)


def test_hours_set_the_tokens() -> None:
    tokens = {}
    for hours in (2, 8, 40):
        recipe, _ = made("qwen3-4b", f"{hours}.yaml", gpu_memory="24GB", hours=hours)
        tokens[hours] = recipe.data.target[0].tokens
        assert recipe.limits.hours == hours
    assert tokens[40] == pytest.approx(20 * tokens[2], rel=0.1)
    assert tokens[8] == pytest.approx(4 * tokens[2], rel=0.1)


def test_a_recipe_is_planned_within_its_own_limit_or_says_that_it_is_not() -> None:
    _, short = made("qwen3-8b", "short.yaml", hours=0.3)
    assert "more than limits.hours" not in short
    assert load_recipe("short.yaml").data.target[0].tokens < 1_000_000
    _, shorter = made("qwen3-8b", "shorter.yaml", hours=0.01)
    assert "more than limits.hours, by which the run ends" in shorter


@pytest.mark.parametrize("memory", ["12GB", "0"])
def test_a_base_with_a_short_context_gets_sequences_that_it_can_read(tmp_path: Path, memory: str) -> None:
    (tmp_path / "short").mkdir()
    (tmp_path / "short/config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 1024}))
    recipe, _ = made("short", gpu_memory=memory)
    whole, _ = made("qwen3-0.6b", "whole.yaml", gpu_memory=memory)
    steps = [one.training.gradient_accumulation_steps * one.training.per_device_train_batch_size
             * one.data.sequence_length for one in (recipe, whole)]  # fmt: skip
    assert recipe.data.sequence_length == 1024
    assert steps[0] == steps[1]


def test_the_hours_of_a_base_without_a_fragment_go_by_its_size(tmp_path: Path) -> None:
    for name, width in (("small", 64), ("wide", 640)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": width, "vocab_size": 512}))
    tokens = [made(name, f"{name}.yaml", hours=0.001)[0].data.target[0].tokens for name in ("small", "wide")]
    assert tokens[0] > 5 * tokens[1]


def test_a_base_that_no_estimate_can_be_made_of_gets_a_recipe_without(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text(json.dumps({"model_type": "nobody-knows-it"}))
    made("odd")
    assert "the size of the base is not known here" in " ".join((tmp_path / "mine.yaml").read_text().split("\n# "))


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: expected JSON, found"):
        made("bad")


def test_the_base_is_of_the_family_that_the_languages_recipe_takes(tmp_path: Path) -> None:
    for language, family in (("Tamil", "apertus"), ("Bulgarian", "qwen3"), ("Manx", "qwen3")):
        file = tmp_path / f"{language}.yaml"
        new_recipe(Flags(language, None, None, "12GB", None), file, force=False, asking=False)
        assert family in load_recipe(file).base.lower()
