"""What a new user reads first: help that fits the terminal, and a next step at the end of every screen."""

from __future__ import annotations

import errno
import re
import shlex
from pathlib import Path

import pytest
from conftest import ENGLISH, GERMAN, write_jsonl
from hub_fixtures import PatchedHub
from terminal import Terminal
from typer.testing import CliRunner, Result

from bam_lora import init_fit
from bam_lora.base import load_tokenizer
from bam_lora.check_tokens import replay_findings, replay_tokens
from bam_lora.cli import app
from bam_lora.cli_next import after_check, after_run
from bam_lora.errors import UserError, no_run
from bam_lora.memory import readable_bytes
from bam_lora.recipe import load_recipe

NAMES = [one.name or one.callback.__name__ for one in app.registered_commands if one.callback]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=80)


@pytest.mark.parametrize("name", ["", *NAMES])
def test_help_fits_a_terminal_of_eighty_columns(name: str) -> None:
    text = call(*filter(None, [name]), "--help").stdout
    assert text.startswith("Usage: ")
    assert "\\b" not in text
    assert "recipes/" not in text  # an installed package has no such folder beside the user
    for line in text.splitlines():
        assert len(line) <= 80, line
        assert name or line.startswith("Usage: ") or not line.endswith("..."), line


def test_a_missing_recipe_says_where_there_are_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "found no such file. Check the path, or write a recipe with `bam-lora init`." in call("run", "x.yaml").stderr
    packaged = call("check", "recipes/german/pretrain.yaml").stderr
    place = Path(packaged.strip().rpartition(" is ")[2].removesuffix("."))
    assert place.is_file()
    assert place.parts[-3:] == ("recipes", "german", "pretrain.yaml")
    Path("german.yaml").write_text("base: x\n")
    assert "Recipes in that folder: german.yaml." in call("check", "germn.yaml").stderr
    Path("mine.yaml").write_text("extends: other.yaml\n")
    assert "relative to the file that names it" in call("check", "mine.yaml").stderr


@pytest.mark.parametrize("name", ["status", "report", "shrink"])
def test_a_folder_that_is_no_run(name: str, tmp_path: Path) -> None:
    missing = tmp_path / "runs" / "germn"
    assert "found no such folder. Give the folder that `bam-lora run` has written." in call(name, missing).stderr
    (tmp_path / "runs" / "german").mkdir(parents=True)
    (tmp_path / "runs" / "german" / "plan.json").write_text("{}")
    assert f"Runs near it: {tmp_path / 'runs' / 'german'}." in call(name, missing).stderr
    assert f"Runs near it: {tmp_path / 'runs' / 'german'}." in str(no_run(tmp_path / "runs"))


def test_export_of_nothing(tmp_path: Path) -> None:
    assert "expected a run directory, found no such folder" in call("export", tmp_path / "x", "--output", "y").stderr
    assert "found neither. Say where the adapter or the model should go." in call("export", tmp_path).stderr


def test_a_question_is_no_sentence() -> None:
    assert str(UserError.of("x", expected="a", found="b", remedy="Did you mean c?")).endswith(
        "found b. Did you mean c?"
    )
    assert call("init", "--language", "Germn", "--gpu-memory", "0").stderr.strip().endswith("Did you mean German?")


def test_the_next_command_can_be_typed() -> None:
    recipe = Path("my recipe.yaml")
    text = after_check(recipe, ["bam.slices=4"], Path("a b"), fit=False, written=None, measured=False)
    _, _, command = text.splitlines()[0].partition("Next: ")
    assert shlex.split(command) == [
        "bam-lora", "run", "my recipe.yaml", "--set", "bam.slices=4", "--output", "a b",
    ]  # fmt: skip
    assert text.splitlines()[1].endswith("--measure")
    chosen = after_check(recipe, [], None, fit=True, written=None, measured=True)
    assert "--fit --write 'fitted-my recipe.yaml'" in chosen
    written = after_check(recipe, [], None, fit=True, written=Path("f.yaml"), measured=True)
    assert written == "Nothing stands in the way. Next: bam-lora run f.yaml"


def test_after_a_run(tmp_path: Path) -> None:
    assert after_run(tmp_path).endswith(f"What is left: bam-lora status {tmp_path}")
    (tmp_path / "model").mkdir()
    assert f"bam-lora export {tmp_path} --push NAME" in after_run(tmp_path)


def test_sizes_have_a_unit_that_shows_them() -> None:
    assert [readable_bytes(one) for one in (11_800, 5_000_000, 2_050_000_000)] == ["0.0 MB", "5.0 MB", "2.05 GB"]


def recipe_file(folder: Path, base: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"base: {base}\noutput: run\nbam: {{slices: 2, branches: 2}}\nlora: {{r: 4}}\n"
        "training: {per_device_train_batch_size: 2}\n"
        "data: {target: [{path: german.jsonl}], sequence_length: 64}\n"
    )
    return path


def test_check_ends_with_the_next_command(tmp_path: Path, tiny_base: Path) -> None:
    write_jsonl(tmp_path / "german.jsonl", GERMAN)
    path = recipe_file(tmp_path, tiny_base)
    checked = call("check", path)
    assert checked.exit_code == 0, checked.output
    assert checked.stdout.splitlines()[-2] == f"Nothing stands in the way. Next: bam-lora run {path}"


def test_check_counts_the_replay_text_of_files(tmp_path: Path, tiny_base: Path) -> None:
    write_jsonl(tmp_path / "german.jsonl", GERMAN)
    replay = write_jsonl(tmp_path / "english.jsonl", ENGLISH)
    sources = [f"data.replay=[{{path: {replay}}}]", "data.replay_share=0.2"]
    recipe = load_recipe(recipe_file(tmp_path, tiny_base), sources)
    tokenizer = load_tokenizer(tiny_base)
    assert replay_findings(recipe, tokenizer, 1000) == ([], [])
    held = replay_tokens(recipe, tokenizer)
    assert held is not None
    (problem,), notes = replay_findings(recipe, tokenizer, held * 10)
    assert notes == []
    words = r"data\.replay: expected about [\d,]+ tokens.*found about [\d,]+\. Add .*replay_share to 0\.1,"
    assert re.search(words, str(problem)), problem
    problems, (note,) = replay_findings(recipe, tokenizer, round(held * 5 * 1.01))
    assert problems == []
    assert "about as many tokens as the run needs of it" in note


def test_a_base_that_the_hub_does_not_have(
    hub: PatchedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init_fit, "detected_card", lambda: None)
    hub.add_model("org/there", tiny_base, gated=True)
    wanted = ("init", "--language", "German", "--gpu-memory", "12GB", "--base")
    for memory in ("12GB", "0"):
        wrong = call("init", "--language", "German", "--gpu-memory", memory, "--base", "org/nope").stderr
        assert "--base org/nope: expected a model on the Hub, found none of that name" in wrong
    assert not list(tmp_path.glob("*.yaml"))
    assert call(*wanted, "org/there").exit_code == 0  # gated: it is there


def test_questions_on_a_narrow_terminal(tmp_path: Path) -> None:
    import sys

    asked = Terminal([sys.executable, "-m", "bam_lora", "init"], tmp_path, {"COLUMNS": "80", "HF_HUB_OFFLINE": "1"})
    asked.answer("by name or code: ", "Maltese")
    goals = asked.answer("name [1]: ", "")
    assert all(len(line) <= 80 for line in goals.replace("\r", "").splitlines())
    asked.answer("train on the CPU): ", "")
    assert "type an answer" in asked.see("train on the CPU): ")
    asked.finish("\x03")


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Path, text: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(place.with_name(".tmp-1-maltese.yaml")))

    monkeypatch.setattr("bam_lora.init.write_text", refuse)
    refused = call("init", tmp_path / "maltese.yaml", "--language", "Maltese", "--gpu-memory", "0")
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"error: {tmp_path}: Permission denied. Work in a folder of your own")
