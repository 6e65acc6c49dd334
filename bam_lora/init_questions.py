"""Questions on a terminal: numbered lists and lines, plain enough for any terminal; Enter takes what is in brackets."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TypeVar

from bam_lora.errors import UserError

Answer = TypeVar("Answer")


def on_terminal() -> bool:
    """Whether a person can be asked: what is read and what is shown are a terminal."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def show(text: str = "") -> None:
    """A line on the screen, at once."""
    print(text, flush=True)  # noqa: T201 - this is the conversation


def ask_again(question: str, read: Callable[[str], Answer], default: str | None = None) -> Answer:
    """Asks until an answer is understood.

    Args:
        question: Without its mark at the end.
        read: Makes the answer of the text; a UserError is shown, and the question comes again.
        default: What Enter means; None: Enter is no answer.

    Returns:
        What `read` made of it.

    Raises:
        UserError: If the input ends.
    """
    prompt = f"{question}{f' [{default}]' if default is not None else ''}: "
    while True:
        try:
            given = input(prompt).strip()
        except EOFError:
            show()
            raise UserError.of(
                "init", expected="an answer", found="the end of the input", remedy="Answer, or give flags (--help)"
            ) from None
        if not given and default is None:
            show("  This one has no default: type an answer (Ctrl-C leaves; nothing is written yet).")
            continue
        try:
            return read(given or (default or ""))
        except UserError as error:
            show(f"  {error}")


def show_list(options: Sequence[tuple[str, str]]) -> None:
    """Shows numbered names with their descriptions, which go on under themselves where a line of the terminal ends."""
    width = max(len(name) for name, _ in options)
    columns = shutil.get_terminal_size().columns
    indent = width + 8 if columns - width > 40 else 8  # on a phone the description begins near the edge
    for number, (name, about) in enumerate(options, 1):
        line = f"  {number:2}  {name:{width}}  {about}".rstrip()
        show(textwrap.fill(line, max(40, columns), subsequent_indent=" " * indent, break_on_hyphens=False))


def choose(question: str, options: Sequence[tuple[str, str]], default: int = 0) -> int:
    """Shows a numbered list and asks for one of it.

    Args:
        question: What the list is about.
        options: Name and description of each.
        default: Index of the one that Enter takes.

    Returns:
        The index of the one that was chosen, by its number or its name.
    """
    show(f"{question}:")
    show_list(options)
    names = [name for name, _ in options]

    def read(text: str) -> int:
        if text.isdecimal() and 1 <= int(text) <= len(options):
            return int(text) - 1
        if text in names:
            return names.index(text)
        raise UserError.of(
            repr(text), expected=f"a number from 1 to {len(options)}", found="none of the list", remedy="Choose one"
        )

    return ask_again("Number or name", read, str(default + 1))
