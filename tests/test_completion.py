"""Tab, in real shells: commands, options, choices, files; and nothing heavy is loaded for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from terminal import ROOT, Terminal
from typer.testing import CliRunner

from bam_lora import cli_complete
from bam_lora.cli import app
from bam_lora.init_fragments import fragment_names
from bam_lora.languages import all_languages
from bam_lora.recipe_models import Method


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the command in bin/, its scripts, a recipe and a run."""
    made = tmp_path_factory.mktemp("completion")
    (made / "bin").mkdir()
    command = made / "bin" / "bam-lora"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m bam_lora "$@"\n')
    command.chmod(0o755)
    (made / "bulgarian.yaml").write_text("base: x\n")
    (made / "runs" / "bulgarian").mkdir(parents=True)
    chosen = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # else that of the shell we are in
    for shell in ("bash", "zsh", "fish"):
        shown = subprocess.run(
            [command, "--show-completion", shell], env=chosen, capture_output=True, text=True, check=True
        )
        (made / f"complete.{shell}").write_text(shown.stdout)
    return made


def environment(folder: Path) -> dict[str, str]:
    return {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PS1": "$ ", "HOME": str(folder)}


TYPED = [
    ("bam-lora rep", "bam-lora report "),
    ("bam-lora init --lang", "bam-lora init --language "),
    ("bam-lora init --language Bulga", "bam-lora init --language Bulgarian "),
    ("bam-lora init --goal inst", "bam-lora init --goal instruct "),
    ("bam-lora quickstart --language ger", "bam-lora quickstart --language german "),
    ("bam-lora fold --method kar", "bam-lora fold --method karcher "),
    ("bam-lora check bul", "bam-lora check bulgarian.yaml "),
    ("bam-lora status runs/bul", "bam-lora status runs/bulgarian/"),
]
FEW = TYPED[::3]  # a command, a choice, a file: what a shell's own script can do wrong; bash has them all


def test_bash(folder: Path):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    shell = Terminal([bash, "--norc", "--noprofile", "-i"], folder, environment(folder))
    shell.answer("$ ", "source complete.bash; bind 'set bell-style none'; echo rea''dy")
    shell.see("ready")
    for typed, completed in TYPED:
        shell.see("$ ")
        shell.type(typed + "\t")
        shell.see(completed, 30)
        shell.type("\x15\r")  # Ctrl-U: away with the line
    shell.answer("$ ", "exit")
    assert shell.finish() == 0


def test_fish(folder: Path):
    fish = shutil.which("fish")
    if fish is None:
        pytest.skip("fish is not installed")
    for typed, completed in FEW:
        asked = f"source complete.fish; complete --do-complete '{typed}'"
        run = subprocess.run(
            [fish, "--no-config", "-c", asked], cwd=folder, env={**os.environ, **environment(folder)},
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        assert completed.split()[-1] in [line.split("\t")[0] for line in run.stdout.splitlines()], run


def test_zsh(folder: Path):
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("zsh is not installed")
    shell = Terminal([zsh, "-f", "-i"], folder, environment(folder))
    shell.answer("$ ", "autoload -Uz compinit; compinit -u; source complete.zsh; unsetopt beep; echo rea''dy")
    shell.see("ready")
    for typed, completed in FEW:
        shell.see("$ ")
        shell.type(typed + "\t")
        shell.see(completed.split()[-1], 30)
        shell.type("\x15\r")
    shell.answer("$ ", "exit")
    shell.finish()


def complete(words: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """What a shell's script asks of the command."""
    given = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), "_BAM_LORA_COMPLETE": "complete_bash"}
    command = [sys.executable, *flags, "-m", "bam_lora"]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), **given}, capture_output=True, text=True, check=True
    )


def test_nothing_heavy_is_loaded():
    run = complete("bam-lora init --language Bulg", "-X", "importtime")
    assert "Bulgarian" in run.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines()}
    assert "typer" in loaded
    assert not loaded & {"torch", "transformers", "trl", "peft", "datasets", "huggingface_hub", "numpy"}


def test_choices_are_those_that_the_commands_take():
    assert set(cli_complete.methods("")) == set(get_args(Method))
    assert cli_complete.methods("DARE") == ["dare_linear", "dare_ties"]
    assert cli_complete.goals("pre") == ["pretrain-approximate", "pretrain-minimal"]
    assert set(cli_complete.bases("")) == set(fragment_names("bases"))
    assert cli_complete.story_languages("b") == ["bulgarian"]


def test_languages_are_completed_by_name_and_code():
    assert {"Bulgarian", "German"} <= set(cli_complete.languages(""))
    assert len(cli_complete.languages("")) < 60
    assert "bul_Cyrl" in cli_complete.languages("bul_")
    assert all(" " not in word for word in cli_complete.languages("s"))
    assert set(cli_complete.languages("sr")) <= {one.plain_name for one in all_languages()} | {
        one.config for one in all_languages()
    }


def test_the_help_has_the_commands_in_the_order_of_a_first_run():
    shown = CliRunner().invoke(app, ["--help"]).stdout.split("Commands:")[1]
    names = [line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line[2] != " "]
    first = ["init", "check", "run", "status", "report", "export"]
    assert [name for name in names if name in first] == first
    assert {"doctor", "merge", "fold", "schema"} <= set(names)
