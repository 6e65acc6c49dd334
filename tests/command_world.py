"""The folder in which the commands of the documents run, as they are shown, each page on a day of its own.

What a command needs and does not exist is made first, by the command that the documents show for it (`makers`). What it
writes is taken away first if another page has written it. A command that has run, and whose results are still there,
does not run again.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from shown_commands import Shown
from typer.testing import CliRunner

from bam_lora.errors import UserError
from bam_lora.recipe import Recipe, changed_keys
from bam_lora.rundir import _EXTENSIBLE, _HARMLESS

WRITES = ("--output", "--write", "--html", "--plots")
INIT = ("bam-lora", "init")
ANSWERS = {"language": "Ukrainian", "memory": "12GB"}  # to what `init` asks; Enter to the rest


class Failed(AssertionError):
    """A command that does not do what its page says."""

    def __init__(self, shown: Shown, why: str, output: str = "") -> None:
        lines = shown.text.strip().splitlines()
        text = "\n    ".join(lines if len(lines) < 5 else [*lines[:4], "..."])
        super().__init__(f"{shown.place}:\n    {text}\n{why}\n{output.strip()}")


class World:
    """A folder with recipes, texts and adapters; `run` runs what is shown."""

    def __init__(self, folder: Path, makers: Mapping[str, Shown], load: Callable[..., Recipe]) -> None:
        self.folder = folder
        self.makers = makers  # what makes a path
        self.load = load  # a recipe, as it stands
        self.done: dict[tuple[str, str, str], tuple[str, ...]] = {}  # what ran, with what it wrote
        self.owners: dict[str, str] = {}  # the page that wrote a path
        self.recipes: dict[str, dict[str, Any]] = {}  # of the runs, as they stand
        self.names: dict[str, dict[str, Any]] = {}  # of the Python blocks, by page

    def run(self, shown: Shown) -> None:
        """Runs it in the folder, if it has not run.

        Raises:
            Failed: With the page, the line, the command and what it printed.
        """
        python = shown.kind == "python"
        key = (shown.kind, *((shown.page, shown.text) if python else ("", " ".join(shown.words))))
        if key in self.done:
            return
        with contextlib.chdir(self.folder), _settings(shown.settings), _told(shown):
            self._make_what_it_needs(shown)
            writes = tuple(path for path, maker in self.makers.items() if maker is shown) or self._written(shown)
            recipes = [path for path in self.owners if path.endswith(".yaml")]  # `init` names its file by the language
            for path in recipes if shown.words[:2] == INIT else writes:
                self._clear(path, shown.page)
            if python:
                self._python(shown)
            else:
                self._command(shown)
            for path in writes:
                if not Path(path).exists():
                    raise Failed(shown, f"did not write {path}")
            if shown.words[:2] == INIT:
                writes = tuple(path.name for path in Path().glob("*.yaml") if path.name not in self.owners)
        self.owners.update(dict.fromkeys(writes, shown.page))
        self.done[key] = writes

    def _make_what_it_needs(self, shown: Shown) -> None:
        needs = re.findall(r'"([^"\s]+)"', shown.text) if shown.kind == "python" else list(shown.words)
        if shown.words[:2] in (("bam-lora", "run"), ("bam-lora", "check")):
            self._make(shown.words[2], shown)
            needs.append(self._recipe(shown).base)
        for word in needs:
            for path in (word, *_parents(word)):
                self._make(path, shown)

    def _make(self, path: str, shown: Shown) -> None:
        maker = self.makers.get(path)
        if maker is not None and not Path(path).exists() and path not in self._written(shown):
            self.run(maker)

    def _written(self, shown: Shown) -> tuple[str, ...]:
        """Where a command writes; not where it adds to a run that it names."""
        words = shown.words
        if words[:2] == ("bam-lora", "run"):
            return () if "--extend" in words else (self._recipe(shown).output,)
        found = [words[at + 1] for at, word in enumerate(words[:-1]) if word in WRITES]
        return tuple(found)

    def _clear(self, path: str, page: str) -> None:
        """Takes away what another page has written there."""
        if self.owners.get(path, page) == page:
            return
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
        self.done = {key: writes for key, writes in self.done.items() if path not in (*writes, *key[-1].split())}
        self.recipes.pop(path, None)
        del self.owners[path]

    def _recipe(self, shown: Shown) -> Recipe:
        """The recipe of `run` and `check` with its overrides, as it stands."""
        words = shown.words
        after = {option: [words[at + 1] for at, word in enumerate(words[:-1]) if word == option]
                 for option in ("--set", "--output")}  # fmt: skip
        return self.load(words[2], after["--set"], *after["--output"][:1])

    def _command(self, shown: Shown) -> None:
        words = shown.words
        if words[:2] == ("bam-lora", "run"):
            self._keep_to_the_recipe(shown)
        if words[0] == "bam-lora":
            with _aside(Path(self._recipe(shown).output)) if "--extend" in words else contextlib.nullcontext():
                _bam_lora(shown)
        elif words[:2] == ("python", "-m"):
            _module(shown)
        elif words[0] == "hf":
            _hf(shown)
        else:
            raise Failed(shown, "is neither run by the tests nor in the table of what they do not run")

    def _keep_to_the_recipe(self, shown: Shown) -> None:
        """A run goes on only with the recipe that it began with: the cut recipes may be alike where these are not."""
        recipe = self._recipe(shown)
        now, before = recipe.resolved(), self.recipes.get(recipe.output)
        allowed = (*_HARMLESS, *(_EXTENSIBLE if "--extend" in shown.words else ()))
        changed = [key for key in changed_keys(before or now, now) if not key.startswith(allowed)]
        if changed:
            raise Failed(shown, f"{recipe.output} began with other values for {', '.join(changed)}")
        self.recipes.setdefault(recipe.output, now)

    def _python(self, shown: Shown) -> None:
        names = self.names.setdefault(shown.page, {"__name__": "shown"})
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                exec(compile("\n" * (shown.line - 1) + shown.text, shown.page, "exec"), names)
        except Exception as error:
            raise Failed(shown, f"{type(error).__name__}: {error}", printed.getvalue()) from error


def _parents(word: str) -> Iterator[str]:
    """The folders above a path, without the topmost `.`."""
    return (parent.as_posix() for parent in Path(word).parents if parent != Path())


@contextlib.contextmanager
def _settings(values: Mapping[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@contextlib.contextmanager
def _told(shown: Shown) -> Iterator[None]:
    """A recipe that cannot be read is the command's failure."""
    try:
        yield
    except UserError as error:
        raise Failed(shown, f"error: {error}") from error


@contextlib.contextmanager
def _aside(run: Path) -> Iterator[None]:
    """Puts a run back as it was: an extension is a turn in the story, and the pages go on with the run before it."""
    kept = Path("kept")
    shutil.copytree(run, kept)
    try:
        yield
    finally:
        shutil.rmtree(run)
        kept.rename(run)


def _bam_lora(shown: Shown) -> None:
    from bam_lora.cli import app

    arguments = [word for word in shown.words[1:] if word != "--verbose"]
    with pytest.MonkeyPatch.context() as patch:
        if arguments[0] == "init" and "--yes" not in arguments:
            patch.setattr("bam_lora.init.on_terminal", lambda: True)
            patch.setattr(builtins, "input", answer)
        result = CliRunner().invoke(app, arguments)
    if result.exit_code != 0:
        why = f"exit status {result.exit_code}" + (f", {result.exception!r}" if result.exception else "")
        raise Failed(shown, why, result.output)


def answer(question: str) -> str:
    """What the reader answers to `init`."""
    return next((given for word, given in ANSWERS.items() if word in question.lower()), "")


def _module(shown: Shown) -> None:
    """`python -m MODULE ...`, in this process."""
    words, printed = shown.words, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*found in sys.modules after import", RuntimeWarning)  # other tests use it
        patch.setattr(sys, "argv", [words[2], *words[3:]])
        try:
            runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise Failed(shown, f"exit status {end.code}", printed.getvalue()) from end


def _hf(shown: Shown) -> None:
    """The Hub's own command, in a process of its own: it asks the same local Hub."""
    command = [str(Path(sys.executable).with_name("hf")), *shown.words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if done.returncode != 0:
        raise Failed(shown, f"exit status {done.returncode}", done.stdout + done.stderr)
