"""The one exception a user is meant to see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_SHOWN = 3


class UserError(ValueError):
    """Something the user can put right. Its text is one line: what, expected, found, remedy.

    The command line prints it and exits with status 1; our own bugs are assertions and keep their traceback.
    """

    @classmethod
    def of(cls, what: str, *, expected: str, found: str, remedy: str) -> UserError:
        """Builds the usual line.

        Args:
            what: The file, key or tensor it is about.
            expected: What should have been there.
            found: What was there instead.
            remedy: What to do about it: a sentence without the closing full stop, or a whole question.

        Returns:
            The error, to be raised by the caller.
        """
        return cls(f"{what}: expected {expected}, found {found}. {remedy}{'' if remedy.endswith('?') else '.'}")


def no_run(folder: Path) -> UserError:
    """The error for a folder that is no run directory: it names runs that are near it."""
    found = "no recipe.yaml in it" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
    near = sorted(str(plan.parent) for place in (folder, folder.parent) for plan in place.glob("*/plan.json"))
    remedy = f"Runs near it: {some(near)}" if near else "Give the folder that `bam-lora run` has written"
    return UserError.of(str(folder), expected="a run directory", found=found, remedy=remedy)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has left everything in a state that resumes."""


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
