"""What the shell offers when Tab is pressed, and the order of the commands in the help. Loads nothing heavy.

A function here takes what is typed of a word and gives the words it can become. Where none is given, the shell itself
offers files: recipes and run directories are files.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperGroup

# In the order in which a beginner needs them; what is not named comes after, in the order of its registration.
_FIRST = ("quickstart", "doctor", "init", "check", "run", "status", "report", "export", "eval", "compare", "shrink")
# One line each in the list of commands; what is longer than a terminal has room for would be cut there.
_SHORT = {
    "quickstart": "Shows the whole loop on a tiny model: CPU, offline, minutes.",
    "doctor": "Looks whether this machine can run it.",
    "init": "Writes a recipe: asks, or takes flags.",
    "check": "Says what a recipe will do and need, and whether it can work.",
    "run": "Runs a recipe, or goes on where it was stopped.",
    "status": "Says where a run is and what is left.",
    "report": "Writes a run's report: what was learned, what was forgotten.",
    "export": "Gives a run as a LoRA adapter, or publishes it on the Hub.",
    "eval": "Scores a model on texts and benchmarks.",
    "compare": "Sets runs side by side: learned, forgotten, |ΔW|, cost.",
    "shrink": "Scores weaker versions of a finished run: λ·ΔW.",
    "merge": "Merges PEFT LoRA adapters into one, exactly.",
    "fold": "Adds PEFT LoRA adapters to a model's weights.",
    "schema": "Prints the recipe's JSON schema, for editors.",
}
_METHODS = ("linear", "slerp", "karcher", "model_stock", "ties", "dare_linear", "dare_ties", "breadcrumbs")
_STORIES = ("german", "bulgarian")


class BeginnersFirst(TyperGroup):
    """Commands in the order of a first run, not of their registration."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the commands, for the help and for completion."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command; in the list of commands it is described by a line that a terminal need not cut."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            command.short_help = _SHORT.get(cmd_name)
        return command


def methods(incomplete: str) -> list[str]:
    """Merge methods."""
    return _beginning(incomplete, _METHODS)


def story_languages(incomplete: str) -> list[str]:
    """Languages of the quickstart."""
    return _beginning(incomplete, _STORIES)


def languages(incomplete: str) -> list[str]:
    """Languages of FineWeb-2: names of one word, codes once two letters are there; at first those with recipes."""
    from bam_lora.init_fragments import language_folders, recipes_folder
    from bam_lora.languages import all_languages

    if not incomplete:
        return [folder.name.title() for folder in language_folders(recipes_folder()).values()]
    known = sorted(all_languages(), key=lambda one: -one.words)
    names = [one.plain_name for one in known if " " not in one.plain_name]
    codes = [one.config for one in known] if len(incomplete) > 1 else []
    return list(dict.fromkeys(_beginning(incomplete, (*names, *codes))))


def bases(incomplete: str) -> list[str]:
    """Bases that have a fragment."""
    from bam_lora.init_fragments import fragment_names

    return _beginning(incomplete, fragment_names("bases"))


def goals(incomplete: str) -> list[str]:
    """Goals of a recipe."""
    from bam_lora.init_fragments import fragment_names

    return _beginning(incomplete, fragment_names("goals"))


def _beginning(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.lower().startswith(incomplete.lower())]
