"""The answers that a new recipe needs, one function each: from a flag, by asking, or the default."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Container, Sequence
from pathlib import Path

from bam_lora import init_fit
from bam_lora.cards import Card
from bam_lora.commented_yaml import Commented, Entry, Tree, put, scalar
from bam_lora.errors import UserError
from bam_lora.init_fragments import Base, Goal, language_data, language_folders, list_goals
from bam_lora.init_questions import ask_again, choose, show
from bam_lora.languages import Language, choose_language, find_languages, likeliest, unknown_language

_LISTED = 15
_NO_LIMIT = "no limit"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Of a base that no fragment describes: as those of the recipes.
_DEFAULTS = {
    "lora": {"r": "64", "alpha": "128", "target_modules": "all-linear"},
    "quantization": {"bits": "4", "type": "nf4", "double": "true", "compute_dtype": "bfloat16"},
}


def language(given: str | None, folder: Path, asking: bool) -> Language:
    """The language; a name that means several is asked about, or settled or refused where nobody can be asked."""
    known = language_folders(folder)
    if given is not None and not asking:
        return choose_language(given, known)
    if given is not None:
        return _one_of(find_languages(given) or _unknown(given), known)
    question = "Language to teach, by name or code"
    return _one_of(ask_again(question, lambda text: find_languages(text) or _unknown(text)), known)


def _unknown(text: str) -> list[Language]:
    raise unknown_language(text)


def _one_of(found: list[Language], known: Container[str]) -> Language:
    if len(found) == 1:
        return found[0]
    listed = found[:_LISTED]
    meant = likeliest(found, known) or found[0]
    default = listed.index(meant) if meant in listed else 0
    return listed[choose("There are several", [(one.config, one.describe()) for one in listed], default)]


def goal(given: str | None, folder: Path, learned: Language, asking: bool) -> Goal:
    """The goal; conversations only where the language has some."""
    goals = list_goals(folder)
    names = [one.name for one in goals]
    if given is not None and given not in names:
        near = difflib.get_close_matches(given, names, n=1, cutoff=0.4)
        remedy = f"Did you mean {near[0]}?" if near else "Choose one"
        one = f"one of {', '.join(names)}"
        raise UserError.of(f"--goal {given}", expected=one, found="no such goal", remedy=remedy)
    chat = language_data(folder, learned, chat=True) is not None
    if given is not None:
        chosen = goals[names.index(given)]
        if chosen.chat and not chat:
            raise UserError.of(
                f"--goal {given}",
                expected=f"a set of conversations in {learned.plain_name} that the recipes know",
                found="none",
                remedy="Start with continued pretraining, or write data.target yourself (docs/recipe.md)",
            )
        return chosen
    possible = [one for one in goals if chat or not one.chat]
    if not asking:
        return possible[0]
    return possible[choose("What for", [(one.name, one.file.title) for one in possible])]


def card(given: str | None, asking: bool) -> Card | None:
    """The card that it will run on; None for the CPU."""
    if given is not None:
        return init_fit.read_card(given)
    found = init_fit.detected_card()
    if found is not None and not asking:
        return found[0]
    if found is not None:
        show(f"GPU here: {found[1]}")
    default = found[0].given if found is not None else None
    return ask_again(
        "Memory of the GPU it will run on, such as 12GB (one before RTX 30: its name, such as T4; 0: train on the CPU)",
        init_fit.read_card,
        default,
    )


def hours(given: float | None, asking: bool) -> float | None:
    """The time there is, in hours; None for no limit."""
    if given is not None:
        return _read_hours(f"{given:g}", "--hours")
    if not asking:
        return None
    return ask_again("Hours it may take", _read_hours, _NO_LIMIT)


def _read_hours(text: str, what: str = "hours") -> float | None:
    if text == _NO_LIMIT:
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e5:
        raise UserError.of(what, expected="a number of hours", found=repr(text), remedy="Write one such as 8")
    return number


def named_base(given: str, bases: Sequence[Base], file: Path) -> Base:
    """The base with a name: of a fragment, a folder or run here, or an id on the Hub.

    Args:
        given: The name.
        bases: The fragments.
        file: The recipe, which a folder's name is relative to.
    """
    for base in bases:
        if given in (base.name, base.model):
            return base
    require_printable("--base", given)
    local = _expanded(given)
    if local.exists() or given.startswith((".", "/", "~")) or _is_among_runs(local):
        _require_model(given, local)
        path = os.path.relpath(local, file.absolute().parent)
        return _plain_base(local.resolve().name, path if path.startswith(".") else f"./{path}")
    if _HUB_ID.fullmatch(given):
        return _plain_base(given.rpartition("/")[2], given)
    names = [base.name for base in bases]
    near = difflib.get_close_matches(given, names, n=2, cutoff=0.5)
    remedy = f"Did you mean {' or '.join(near)}?" if near else f"Names: {', '.join(names)}"
    raise UserError.of(
        f"--base {given}",
        expected="a name of the list, an id on the Hub (owner/name) or a folder",
        found="none",
        remedy=remedy,
    )


def _is_among_runs(path: Path) -> bool:
    """Whether what is not there would be a run's folder: `runs/bulgarian` could be an id on the Hub just as well."""
    parent = path.parent
    return parent != Path() and (parent.name == "runs" or any(parent.glob("*/recipe.yaml")))


def _require_model(given: str, local: Path) -> None:
    """Refuses what is neither a model's folder nor a finished run: `check` could not read it."""
    if any((folder / "config.json").is_file() for folder in (local / "model", local)):
        return
    expected = "a model's folder, a finished run or an id on the Hub (owner/name)"
    if not local.exists():
        found, remedy = "no such folder", "Check the path; a run must have ended before another can start from it"
    elif (local / "recipe.yaml").is_file():
        found, remedy = "a run that is not finished", f"Finish it first; `bam-lora status {given}` says what is left"
    else:
        found, remedy = "no config.json in it", "Check the path"
    raise UserError.of(f"--base {given}", expected=expected, found=found, remedy=remedy)


def require_printable(what: str, name: str) -> None:
    """Refuses what a line of YAML, a comment included, cannot hold: a line break would begin a line of the recipe."""
    if not name.isprintable():
        raise UserError.of(
            what, expected="a name of printable characters", found=repr(name), remedy="Rename it, or make a link to it"
        )


def _expanded(given: str) -> Path:
    """The path, with the home of a user in the place of `~`; a folder may also be called so."""
    try:
        return Path(given).expanduser()
    except RuntimeError:  # there is no such user
        return Path(given)


def _plain_base(title: str, path: str) -> Base:
    tree: Tree = {}
    put(tree, "base", scalar(path))
    for section, values in _DEFAULTS.items():
        tree[section] = Entry({key: Entry(value) for key, value in values.items()}, flow=True)
    put(tree, "training.learning_rate", "2.0e-4")
    put(tree, "evaluation.precision", "4bit")
    return Base(path, Commented([title], tree))
