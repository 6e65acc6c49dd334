"""Bars made of parts, as inline SVG: one bar a row, its length the sum of its parts.

Colours are classes of the style sheet plot.css; every part carries its exact number (`data-value`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bam_lora.report.glyphs import short, width_of
from bam_lora.report.svg import WIDTH, words_at
from bam_lora.report.ticks import ticks

# As in the plots: text is 11 units high, 12.5 on phones.
_CHARACTER = 7.2
_BAR, _PITCH, _TOP, _BOTTOM, _LEFT, _RIGHT = 22.0, 34.0, 6.0, 24.0, 4.0, 26.0
_NAME_CHARACTERS = 14


@dataclass(frozen=True)
class Part:
    """A part of a bar: its colour, how long it is, what is written in it where it fits, what a pointer shows."""

    slot: int
    value: float
    label: str
    text: str


def bars(
    rows: Sequence[tuple[str, Sequence[Part]]],
    axis: Callable[[float], str],
    *,
    unit: float = 1.0,
    ident: str,
    title: str,
    description: str,
    named: bool,
) -> Markup:
    """Draws the bars.

    Args:
        rows: (name, parts) from the top; at least one part in all.
        axis: A tick's value, in units, as text.
        unit: Of the axis, so that its ticks are round.
        ident: Unique on the page, used for the ids of title and description.
        title: The picture's name for those who cannot see it.
        description: What it shows, numbers included.
        named: Whether the rows' names are drawn.

    Returns:
        An `<svg>` element; all texts are escaped.
    """
    names = [short(name, _NAME_CHARACTERS) if named else "" for name, _ in rows]
    left = _LEFT + (8 + _CHARACTER * max(map(width_of, names)) if named else 0)
    longest = max(sum(part.value for part in parts) for _, parts in rows)
    scale = (WIDTH - left - _RIGHT) / longest
    bottom = _TOP + _PITCH * len(rows)
    body = _axis(axis, longest / unit, scale * unit, left, bottom)
    for row, (name, (_, parts)) in enumerate(zip(names, rows, strict=True)):
        top = _TOP + row * _PITCH + (_PITCH - _BAR) / 2
        if name:
            body.append(words_at(left - 8, top + _BAR / 2 + 4, name, "name", "end"))
        body += _row(parts, scale, left, top)
    return Markup(
        '<svg class="plot" viewBox="0 0 {w:.0f} {h:.0f}" role="img" aria-labelledby="{i}-title {i}-desc">'
        '<title id="{i}-title">{t}</title><desc id="{i}-desc">{d}</desc>{b}</svg>'
    ).format(w=WIDTH, h=bottom + _BOTTOM, i=ident, t=title, d=description, b=Markup("").join(body))


def part_swatch(slot: int) -> Markup:
    """A part's colour for the legend; decoration beside its name."""
    box = Markup('<rect class="share s{}" x="6" y="0" width="16" height="12"/>').format(slot)
    return Markup('<svg class="swatch" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">{}</svg>').format(
        box
    )


def _axis(show: Callable[[float], str], longest: float, scale: float, left: float, bottom: float) -> list[Markup]:
    values = [0.0, longest]
    for most in range(6, 1, -1):
        values = ticks(0.0, longest, most)
        if sum(width_of(show(value)) + 2 for value in values) * _CHARACTER <= WIDTH - left - _RIGHT:
            break
    body = [Markup('<path class="axis" d="M{:.1f} {:.1f}H{:.1f}"/>').format(left, bottom, left + longest * scale)]
    for value in values:
        x, half = left + value * scale, width_of(show(value)) * _CHARACTER / 2
        body.append(Markup('<path class="axis" d="M{:.1f} {:.1f}v4"/>').format(x, bottom))
        place = min(max(x, 2 + half), WIDTH - 2 - half)
        body.append(words_at(place, bottom + 16, show(value), "tick", "middle"))
    return body


def _row(parts: Sequence[Part], scale: float, left: float, top: float) -> list[Markup]:
    body, x = [], left
    for part in parts:
        width = part.value * scale
        inner = Markup("")
        if width >= _CHARACTER * width_of(part.label) + 6:
            inner = words_at(x + width / 2, top + _BAR / 2 + 4, part.label, "inside", "middle")
        shape = Markup('<rect class="share s{}" x="{:.1f}" y="{:.1f}" width="{:.2f}" height="{:.1f}"/>')
        drawn = shape.format(part.slot, x, top, width, _BAR)
        body.append(
            Markup('<g data-value="{!r}"><title>{}</title>{}{}</g>').format(part.value, part.text, drawn, inner)
        )
        x += width
    return body
