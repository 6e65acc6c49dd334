"""A grid of coloured cells as inline SVG: one number a cell, above or below a middle.

Colours are classes of the page's style sheet; how strong a colour is says how far a number lies from the middle, so
that light and dark schemes need one picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bam_lora.report.glyphs import short, width_of
from bam_lora.report.svg import WIDTH

# As in the plots: text is 11 units high, 12.5 on phones; slanted names of columns rise and run 0.71 of their length.
_CHARACTER, _SLANT = 6.6, 0.71
_NAME_CHARACTERS = 14
_WIDEST_CELL, _TEXT_WIDTH = 56.0, 34.0
# Rows are high enough for a number; those of very deep models are not, or the picture would not fit on a screen.
_ROW, _LOW_ROW, _MOST_HIGH_ROWS = 16.0, 8.0, 48
# Numbers are written over the cells, so the strongest colour leaves them readable.
_STRONGEST = 0.5


@dataclass(frozen=True)
class HeatCell:
    """How far a number lies from the middle, in [-1, 1]; what is written in the cell; what a pointer shows."""

    strength: float
    text: str
    tooltip: str


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], HeatCell],
    *,
    ident: str,
    title: str,
    description: str,
) -> Markup:
    """Draws the grid under its title; places without a cell stay empty.

    Args:
        rows: Names of the rows, from the top.
        columns: Names of the columns.
        cells: {(row, column): cell}.
        ident: Unique on the page, used for the ids of title and description.
        title: The picture's name, also drawn above it.
        description: What it shows, numbers included, for those who cannot see it.

    Returns:
        An `<svg>` element; all texts are escaped.
    """
    row_texts, column_texts = ([short(name, _NAME_CHARACTERS) for name in names] for names in (rows, columns))
    left = 10 + _CHARACTER * max(map(width_of, row_texts))
    slanted = 6 + _SLANT * _CHARACTER * max(map(width_of, column_texts))
    top = 24 + slanted
    width = min(_WIDEST_CELL, (WIDTH - left - slanted) / len(columns))
    height = _ROW if len(rows) <= _MOST_HIGH_ROWS else _LOW_ROW
    every = 1 if height == _ROW else 2
    body = [_text(left, 14, title, "name", "start")]
    body += [_slanted(left + (column + 0.4) * width, top - 6, text) for column, text in enumerate(column_texts)]
    for row, text in enumerate(row_texts):
        if row % every == 0:
            body.append(_text(left - 6, top + (row + 0.5) * height + 4, text, "tick", "end"))
    for (row, column), cell in cells.items():
        body.append(_cell(left + column * width, top + row * height, width, height, cell))
    return Markup(
        '<svg class="plot" viewBox="0 0 {w:.0f} {h:.0f}" role="img" aria-labelledby="{i}-title {i}-desc">'
        '<title id="{i}-title">{t}</title><desc id="{i}-desc">{d}</desc>{b}</svg>'
    ).format(w=WIDTH, h=top + height * len(rows) + 4, i=ident, t=title, d=description, b=Markup("").join(body))


def heat_swatch(strength: float) -> Markup:
    """A cell of that strength for the legend; decoration beside its meaning."""
    return Markup('<svg class="swatch" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">{}</svg>').format(
        _box(6, 0, 16, 12, strength)
    )


def _box(x: float, y: float, width: float, height: float, strength: float) -> Markup:
    kind = "more" if strength > 0 else "less"
    return Markup(
        '<rect class="cell {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.3f}"/>'
    ).format(kind, x, y, width, height, _STRONGEST * min(1.0, abs(strength)))


def _cell(x: float, y: float, width: float, height: float, cell: HeatCell) -> Markup:
    text = Markup("")
    if height == _ROW and width >= _TEXT_WIDTH:
        text = _text(x + width / 2, y + height / 2 + 4, cell.text, "value", "middle")
    box = _box(x, y, width, height, cell.strength)
    return Markup("<g><title>{}</title>{}{}</g>").format(cell.tooltip, box, text)


def _slanted(x: float, y: float, text: str) -> Markup:
    turned = '<text transform="translate({:.1f} {:.1f}) rotate(-45)" class="tick">{}</text>'
    return Markup(turned).format(x, y, text)


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(x, y, kind, anchor, text)
