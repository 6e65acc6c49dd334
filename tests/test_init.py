"""`bam-lora init`: by flags, by asking on a terminal, and what it writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_fixtures import PatchedHub
from terminal import Terminal
from typer.testing import CliRunner, Result

from bam_lora import init_fit
from bam_lora.cards import Card
from bam_lora.cli import app
from bam_lora.errors import UserError
from bam_lora.init_fragments import list_bases, list_goals, recipes_folder
from bam_lora.languages import all_languages
from bam_lora.recipe import Recipe, load_recipe
from bam_lora.recipe_yaml import read_yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_gpu_and_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init_fit, "detected_card", lambda: None)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["init", *(str(argument) for argument in arguments)])


def error_of(result: Result) -> str:
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


def made(*arguments: object, file: str = "bulgarian.yaml") -> Recipe:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return load_recipe(file)


def test_bulgarian_for_twelve_gigabytes():
    result = call("--language", "Bulgarian", "--gpu-memory", "12GB")
    assert result.exit_code == 0, result.output
    assert "bam-lora check bulgarian.yaml" in result.stdout
    assert "bam-lora run bulgarian.yaml" in result.stdout
    recipe, text = load_recipe("bulgarian.yaml"), Path("bulgarian.yaml").read_text(encoding="utf-8")
    assert recipe.base in {base.model for base in list_bases(recipes_folder())}
    assert recipe.data.target[0].name == "bul_Cyrl"
    assert recipe.output == "runs/bulgarian"
    assert len(recipe.data.replay) > 1
    assert recipe.evaluation.source
    assert recipe.evaluation.samples
    assert "extends" not in read_yaml(text, None).value
    for words in (
        "Licence: ODC-By",
        "Hardware: one GPU (NVIDIA: RTX 30 or newer) with 12 GB, of which",
        "Expect:",
        "--language bul_Cyrl",
    ):
        assert words in text
    memory = float(re.search(r"of which ([\d.]+) are used", text)[1])
    assert 4 < memory < 12


def test_the_sections_stand_in_the_order_of_the_reference_each_with_its_comment():
    made("--language", "bg", "--gpu-memory", "12GB")
    text = Path("bulgarian.yaml").read_text(encoding="utf-8")
    keys = re.findall(r"^(\w+):", text, re.MULTILINE)
    assert keys == [key for key in Recipe.model_fields if key in keys]
    for key in keys:
        assert re.search(rf"^#.*\n{key}:", text, re.MULTILINE), key
    assert list(read_yaml(text, None).value["data"])[:2] == ["target", "replay"]


def test_the_written_command_writes_the_same_again():
    made("--language", "bg", "--gpu-memory", "16GB", "--hours", "8")
    text = Path("bulgarian.yaml").read_text(encoding="utf-8")
    command = re.search(r"Written by: bam-lora init (.*)", text)[1].split()
    assert call(*command, "--force").exit_code == 0
    assert Path("bulgarian.yaml").read_text(encoding="utf-8") == text


BASES = [base.name for base in list_bases(recipes_folder())]
GOALS = [goal.name for goal in list_goals(recipes_folder())]


def test_every_base_and_every_goal_loads():
    assert len(BASES) >= 9
    assert len(GOALS) == 4
    for number, base in enumerate(BASES):
        goal = GOALS[number % len(GOALS)]
        recipe = made(
            "x.yaml", "--force", "--language", "bul", "--gpu-memory", "0", "--base", base, "--goal", goal, file="x.yaml"
        )
        assert recipe.strategy == ("single" if goal == "single" else "bam")
        assert recipe.mode == ("chat" if goal == "instruct" else "text")


def test_languages_of_all_sizes_load():
    for language in all_languages()[::150]:
        recipe = made(
            "x.yaml", "--force", "--language", language.config, "--gpu-memory", "0", "--base", "qwen3-4b", file="x.yaml"
        )
        source, scored = recipe.data.target[0], recipe.evaluation.target[0]
        assert (source.name, scored.name) == (language.config, language.config)
        assert (source.split, source.tokens is None) != (scored.split, False) or language.words > 1e8
        assert source.split != scored.split


def test_a_small_language_is_used_whole_in_fewer_slices_and_said_to_be_small():
    result = call("--language", "Ancash", "--gpu-memory", "12GB")
    assert "qwh_Latn" in error_of(result)
    result = call("--language", "qwh_Latn", "--gpu-memory", "12GB", "--hours", "4")
    assert result.exit_code == 0, result.output
    recipe = load_recipe("huaylas-ancash-quechua.yaml")
    assert recipe.data.target[0].tokens is None
    assert recipe.bam.slices == 2
    assert recipe.training.warmup_steps == 0.1
    assert "Bible translation" in result.stdout
    assert "520 thousand words" in result.stdout


def test_the_base_suits_the_card():
    parameters = []
    for gigabytes in (6, 12, 24):
        recipe = made("--language", "bg", "--gpu-memory", f"{gigabytes}GB", "--force")
        (base,) = [one for one in list_bases(recipes_folder()) if one.model == recipe.base]
        assert 0 < base.card_bytes <= gigabytes * 2**30
        assert base.many_languages
        assert not base.gated
        parameters.append(base.parameters)
    assert parameters == sorted(parameters)
    assert parameters[0] < parameters[-1]


def test_settings_follow_the_card():
    def settings(memory: str) -> tuple[int, bool]:
        recipe = made("--language", "bg", "--gpu-memory", memory, "--base", "qwen3-4b", "--force")
        training = recipe.training
        sequences = training.per_device_train_batch_size * training.gradient_accumulation_steps
        return sequences * recipe.data.sequence_length, training.checkpointing

    small, large = settings("12GB"), settings("80GB")
    assert small[0] == large[0]
    assert small[1]
    assert not large[1]


def test_a_base_that_does_not_fit_says_which_size_would():
    line = error_of(call("--language", "bg", "--gpu-memory", "4GB", "--base", "qwen3-8b"))
    assert re.search(r"Qwen3-8B-Base on 4\.0 GiB: expected .*Take a base of up to about [\d.]+ B parameters", line)
    assert not Path("bulgarian.yaml").exists()


def test_a_base_here_is_named_relative_to_the_recipe(tiny_base: Path):
    Path("models").symlink_to(tiny_base.parent)
    recipe = made(
        "recipes/x.yaml", "--language", "bg", "--gpu-memory", "8GB", "--base", f"models/{tiny_base.name}",
        file="recipes/x.yaml",
    )  # fmt: skip
    assert Path(recipe.base).resolve() == tiny_base.resolve()
    text = Path("recipes/x.yaml").read_text(encoding="utf-8")
    assert f"base: ../models/{tiny_base.name}" in text
    assert "(estimate)" in text  # by its own config, not by its size


@pytest.mark.parametrize(
    ("there", "base", "found"),
    [
        ((), "runs/german", "no such folder. Check the path; a run must have ended"),
        (("mine/first/recipe.yaml",), "mine/german", "no such folder"),
        (("runs/german/recipe.yaml",), "runs/german", "a run that is not finished. .*bam-lora status runs/german"),
        (("models/x/readme.txt",), "models/x", r"no config\.json in it"),
        (("models/x",), "models/x", r"no config\.json in it"),
    ],
)
def test_a_base_here_is_a_model_or_a_finished_run(there: tuple[str, ...], base: str, found: str):
    for name in there:
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text("{}")
    said = error_of(call("--language", "bg", "--gpu-memory", "12GB", "--base", base))
    expected = r"a model's folder, a finished run or an id on the Hub \(owner/name\)"
    assert re.search(f"--base {base}: expected {expected}, found {found}", said)
    assert not list(Path().glob("*.yaml"))


def test_a_finished_run_is_a_base_and_so_is_a_hub_id_beside_folders_of_other_things(tiny_base: Path):
    Path("runs/german").mkdir(parents=True)
    Path("runs/german/model").symlink_to(tiny_base)
    assert made("--language", "bg", "--gpu-memory", "8GB", "--base", "runs/german").base.endswith("/runs/german")
    Path("someone/notes").mkdir(parents=True)
    recipe = made("--language", "bg", "--gpu-memory", "8GB", "--base", "someone/some-model", "--force")
    assert recipe.base == "someone/some-model"


def test_a_hub_id_that_no_fragment_knows():
    recipe = made("--language", "bg", "--gpu-memory", "12GB", "--base", "someone/some-model")
    assert recipe.base == "someone/some-model"
    assert "the size of the base is not known here" in Path("bulgarian.yaml").read_text(encoding="utf-8")


def test_the_config_is_asked_for_once_on_the_hub(hub: PatchedHub, tiny_base: Path):
    hub.add_model("org/tiny", tiny_base)
    hub.add_model("org/gated", tiny_base, gated=True)
    made("--language", "bg", "--gpu-memory", "8GB", "--base", "org/tiny")
    text = Path("bulgarian.yaml").read_text(encoding="utf-8")
    assert "(estimate)" in text
    assert [one.path for one in hub.requests()] == ["/org/tiny/resolve/main/config.json"]
    made("--language", "bg", "--gpu-memory", "8GB", "--base", "org/gated", "--force")
    assert "the size of the base is not known here" in Path("bulgarian.yaml").read_text(encoding="utf-8")


def test_no_file_is_replaced_without_force(tmp_path: Path):
    Path("bulgarian.yaml").write_text("mine")
    arguments = ("--language", "bg", "--gpu-memory", "12GB")
    assert "bulgarian.yaml: expected nothing there yet, found a file" in error_of(call(*arguments))
    assert Path("bulgarian.yaml").read_text() == "mine"
    assert "found a folder" in error_of(call(tmp_path, *arguments, "--force"))
    made(*arguments, "--force")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "expected --language NAME and --gpu-memory SIZE .* no terminal"),
        (("--language", "bg"), "expected --gpu-memory SIZE"),
        (("--gpu-memory", "12GB"), "expected --language NAME, found no terminal"),
        (("--language", "bulgarain", "--gpu-memory", "12GB"), "Did you mean Bulgarian"),
        (("--language", "Serbian", "--gpu-memory", "12GB"), r"srp_Cyrl .* srp_Latn"),
        (("--language", "bg", "--gpu-memory", "lots"), "--gpu-memory: expected a size such as 12GB, .*, found 'lots'"),
        (("--language", "bg", "--gpu-memory", "-3"), "found '-3'"),
        (("--language", "bg", "--gpu-memory", "12GB", "--goal", "instuct"), "Did you mean instruct"),
        (("--language", "Manx", "--gpu-memory", "12GB", "--goal", "instruct"), "conversations in Manx .* found none"),
        (("--language", "bg", "--gpu-memory", "12GB", "--base", "qwen3-5b"), r"Did you mean qwen3-\db"),
        (("--language", "bg", "--gpu-memory", "12GB", "--base", "./nowhere"), "found no such folder"),
    ],
)
def test_mistakes_are_one_line_with_a_way_out(arguments: tuple[str, ...], words: str):
    assert re.search(words, error_of(call(*arguments)))
    assert not list(Path().glob("*.yaml"))


def test_no_card_is_a_cpu():
    assert [init_fit.read_card(text) for text in ("0", "cpu", "12GB")] == [None, None, Card(12 * 2**30)]


def test_a_gpu_that_is_there_needs_no_flag(monkeypatch: pytest.MonkeyPatch):
    found = Card(int(11.76 * 2**30)), "NVIDIA GeForce RTX 3060"
    monkeypatch.setattr(init_fit, "detected_card", lambda: found)
    assert made("--language", "bg").base == made("--language", "bg", "--gpu-memory", "12GB", "--force").base


def test_a_card_without_bfloat16_computes_in_another_type(monkeypatch: pytest.MonkeyPatch, tiny_base: Path):
    """Named or here: the recipe says so, and the command at its head writes the same again."""
    for base, type_ in (("qwen3-0.6b", "float16"), ("gemma-3-1b", "float32"), (str(tiny_base), "float16")):
        named = made("--language", "bg", "--gpu-memory", "T4", "--base", base, "--force")
        assert named.quantization.compute_dtype == type_
    text = Path("bulgarian.yaml").read_text(encoding="utf-8")
    assert "# the card has no bfloat16" in text
    assert "one T4 GPU with 15 GB" in text
    assert "--gpu-memory 'T4 14.7GB'" in text
    turing = Card(6 * 2**30, "Turing", bfloat16=False), "NVIDIA T1000"
    monkeypatch.setattr(init_fit, "detected_card", lambda: turing)
    found = made("--language", "bg", "--base", "qwen3-0.6b", "--force")
    assert found.quantization.compute_dtype == "float16"
    again = made("--language", "bg", "--base", "qwen3-0.6b", "--gpu-memory", turing[0].given, "--force")
    assert again == found
    ampere = made("--language", "bg", "--base", "qwen3-0.6b", "--gpu-memory", "12GB", "--force")
    assert ampere.quantization.compute_dtype == "bfloat16"


COMMAND = [sys.executable, "-m", "bam_lora", "init"]


def test_asking_on_a_terminal(tmp_path: Path):
    terminal = Terminal(COMMAND, tmp_path)
    terminal.answer("by name or code: ", "bulgarain")
    terminal.see("Did you mean Bulgarian")
    terminal.answer("by name or code: ", "Serbian")
    terminal.see("2  srp_Latn  Serbian, Latin script, 430 million words")
    terminal.answer("Number or name [1]: ", "9")
    terminal.see("expected a number from 1 to 2")
    terminal.answer("Number or name [1]: ", "srp_Latn")
    terminal.see("pretrain-approximate")
    terminal.answer("Number or name [1]: ", "2")
    terminal.answer("train on the CPU): ", "")
    terminal.answer("train on the CPU): ", "16 GB")
    terminal.answer("Hours it may take [no limit]: ", "eight")
    terminal.see("expected a number of hours")
    terminal.answer("Hours it may take [no limit]: ", "8")
    terminal.see("eurollm-9b")
    terminal.answer("Base [qwen3-", "qwen3-6b")
    terminal.see("Did you mean")
    terminal.answer("Base [qwen3-", "")
    terminal.see("bam-lora check serbian-latin.yaml")
    assert terminal.finish() == 0
    recipe = load_recipe(tmp_path / "serbian-latin.yaml")
    assert recipe.data.target[0].name == "srp_Latn"
    assert [one.path for one in recipe.data.replay] == ["Skylion007/openwebtext"]


@pytest.mark.parametrize(
    ("key", "status", "words"), [("\x03", 130, "interrupted"), ("\x04", 1, "the end of the input")]
)
def test_leaving_in_the_middle_writes_nothing(tmp_path: Path, key: str, status: int, words: str):
    terminal = Terminal(COMMAND, tmp_path)
    terminal.see("by name or code: ")
    assert terminal.finish(press=key) == status
    assert words in terminal.screen
    assert "Traceback" not in terminal.screen
    assert not list(tmp_path.iterdir())


def test_the_help_teaches():
    shown = call("--help").stdout
    for words in ("--language Bulgarian --gpu-memory 12GB", "--hours", "--force", "bam-lora check"):
        assert words in " ".join(shown.split())


def test_recipes_are_found_in_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from bam_lora import init_fragments

    package = tmp_path / "bam_lora"
    (package / "recipes" / "_shared" / "bases").mkdir(parents=True)
    monkeypatch.setattr(init_fragments, "__file__", str(package / "init_fragments.py"))
    assert recipes_folder() == package.resolve() / "recipes"
    (package / "recipes").rename(package / "elsewhere")
    with pytest.raises(UserError, match="expected the recipes, found none"):
        recipes_folder()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'recipes = "bam_lora/recipes"' in project


def test_asking_starts_without_torch():
    code = "import bam_lora.init, sys; print(sorted(name for name in ('torch', 'transformers') if name in sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(shown.replace("'", '"')) == []
