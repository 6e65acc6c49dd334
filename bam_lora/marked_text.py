"""Text with some of it marked: by colour and underline on a terminal, by brackets elsewhere."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
from collections.abc import Sequence

from bam_lora.terminal_text import escaped

OPEN, CLOSE = "⟦", "⟧"
NEW_LINE = "↵"
_WIDTH, _COLUMNS = 88, 102
_PIECES = 9
_LINES, _LAST = 16, 3
_WORD = re.compile(rf"{NEW_LINE}|[^\s{NEW_LINE}]*\s*")
Piece = tuple[str, bool]
"""A part of a text, and whether it is marked."""


def wants_colour() -> bool:
    """Whether stdout is a terminal that shows colours and its user wants them."""
    from rich.console import Console

    console = Console()
    return sys.stdout.isatty() and console.color_system is not None and not console.no_color


def columns() -> int:
    """Columns for a row of the data with what stands before it: the terminal's, 102 in a file or on a wide one."""
    if not sys.stdout.isatty():
        return _COLUMNS
    return max(40, min(_COLUMNS, shutil.get_terminal_size().columns - 2))  # room for the marks


def shorten(pieces: Sequence[Piece], head: int, tail: int) -> list[Piece]:
    """The pieces with the middle of long ones left out, and of many pieces all but the first and the last.

    What is left out is counted in its place: `[…1,234 characters…]`.
    """
    if len(pieces) > _PIECES:
        left_out = len(pieces) - _PIECES
        pieces = [*pieces[: _PIECES - 1], (f"[…{left_out} parts…]", False), pieces[-1]]
    return [(_cut(text, head, tail), marked) for text, marked in pieces]


def _cut(text: str, head: int, tail: int) -> str:
    left_out = len(text) - head - tail
    return text if left_out < 24 else f"{text[:head]}[…{left_out:,} characters…]{text[-tail:]}"


def draw(pieces: Sequence[Piece], *, colour: bool, width: int = _WIDTH) -> list[str]:
    """The pieces as lines for a terminal, the middle of many left out; nothing in them can steer it.

    Args:
        pieces: Text as it is, in order.
        colour: Mark by colour and underline, else by `⟦` and `⟧`.
        width: Columns of a line, marks not counted.
    """
    from rich.cells import cell_len

    lines: list[list[Piece]] = [[]]
    used = 0
    for text, marked in _visible(pieces):
        for word in filter(None, _WORD.findall(text)):
            for part in _fitting(word, width):
                size = cell_len(part)
                if used and used + cell_len(part.rstrip()) > width:
                    lines[-1][-1] = (lines[-1][-1][0].rstrip(), lines[-1][-1][1])
                    lines.append([])
                    used = 0
                lines[-1].append((part, marked))
                used += size
            if word == NEW_LINE:
                lines.append([])
                used = 0
    if not lines[-1]:
        lines.pop()
    if len(lines) > _LINES:
        left_out = len(lines) - _LINES + 1
        lines[_LINES - _LAST - 1 : -_LAST] = [[(f"[…{left_out} lines…]", False)]]
    return _coloured(lines) if colour else _bracketed(lines)


def _visible(pieces: Sequence[Piece]) -> list[Piece]:
    """Line breaks as a sign, all else that is not for a terminal as escapes; brackets of the text's own, too."""
    shown = []
    for text, marked in pieces:
        parts = (escaped(part) for part in text.replace("\r\n", "\n").split("\n"))
        own = NEW_LINE.join(parts).replace(OPEN, "\\u27e6").replace(CLOSE, "\\u27e7")
        shown.append((own, marked))
    return shown


def _fitting(word: str, width: int) -> list[str]:
    """A word in parts that fit a line: of text without spaces, or of wide characters."""
    from rich.cells import chop_cells

    return chop_cells(word, width) if len(word) * 2 > width else [word]


def _bracketed(lines: Sequence[Sequence[Piece]]) -> list[str]:
    """A mark may go on in the next line."""
    flat = [marked for line in lines for _, marked in line]
    before, after = iter([False, *flat]), iter([*flat[1:], False])
    return [
        "".join(
            (OPEN if marked and not was else "") + text + (CLOSE if marked and not will else "")
            for (text, marked), was, will in zip(line, before, after, strict=False)
        )
        for line in lines
    ]


def _coloured(lines: Sequence[Sequence[Piece]]) -> list[str]:
    from rich.color import ColorSystem
    from rich.style import Style

    style = Style(color="green", underline=True)
    return [
        "".join(
            style.render(text, color_system=ColorSystem.STANDARD) if marked else text
            for marked, text in (
                (marked, "".join(part for part, _ in group))
                for marked, group in itertools.groupby(line, key=lambda piece: piece[1])
            )
        )
        for line in lines
    ]
