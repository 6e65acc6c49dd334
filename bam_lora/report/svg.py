"""Small plots as inline SVG: axes with units, labels that keep clear of each other, text for those who cannot see.

Colours, line widths and fonts are classes of the style sheet plot.css (`s0` .. `s7` for series, `r0` .. `r7` for those
in an order), so that light and dark schemes need one picture. Marks carry their exact numbers (`data-x`, `data-y`).
Drawn for 400 units of width: at phone size a unit is about a pixel, so text stays readable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup, escape

from bam_lora.report.glyphs import width_of
from bam_lora.report.ticks import padded, tick_texts, ticks

WIDTH, HEIGHT = 400.0, 290.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 16.0, 30.0, 44.0
# The style sheet makes text 11 units high, 12.5 on phones; this is a character of the widest of its fonts, in bold.
_CHARACTER, _LINE = 8.0, 13.0
SERIES_COLOURS, _DASHES, SHADES = 8, 4, 8
_NEUTRAL = ("band", "gap")


@dataclass(frozen=True)
class Point:
    """One mark in data units; `error` is half the length of the vertical bar, `text` what a pointer shows."""

    x: float
    y: float
    text: str
    label: str = ""
    error: float | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """Points of one colour and shape; `slot` chooses both, so a run looks the same in every plot.

    `look` sets a series apart from the runs' own: "thin" (thin line, small marks), "plus" (small crosses), "band" (a
    broad line without a run's colour), "gap" (a dotted one). `shade`, from 0 to 1, colours series that stand in an
    order, such as iterations: early ones pale, late ones dark.
    """

    name: str
    slot: int
    points: list[Point]
    line: bool = True
    marks: bool = True
    look: str = ""
    shade: float | None = None


@dataclass(frozen=True)
class Axes:
    """What the axes say.

    `zero` draws the lines x = 0 and y = 0; `corner` is a remark in the lower right corner; `rules` are places on the
    x axis with a thin line upwards.
    """

    x_label: str
    y_label: str
    x_format: Callable[[float], str] | None = None
    zero: bool = False
    corner: str = ""
    whole_x: bool = False
    rules: tuple[float, ...] = ()


@dataclass
class _Frame:
    """Data ranges to picture units, and the boxes (left, top, right, bottom) that are taken."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    # Places along the lines, which a label covers only where no other place is free.
    along: list[tuple[float, float]] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def crossed(self, box: tuple[float, float, float, float]) -> bool:
        """Whether a line runs through a box."""
        return any(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in self.along)

    def free(self, box: tuple[float, float, float, float]) -> bool:
        """Whether a box lies within the axes and on nothing else."""
        inside = box[0] >= _LEFT and box[2] <= WIDTH - 2 and box[1] >= _TOP - 6 and box[3] <= HEIGHT - _BOTTOM
        return inside and not any(
            box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in self.boxes
        )


def plot(series: Sequence[Series], axes: Axes, *, ident: str, title: str, description: str) -> Markup:
    """Draws one plot.

    Args:
        series: What to draw; at least one point in all.
        axes: Labels of the axes.
        ident: Unique on the page, used for the ids of title and description.
        title: The plot's name for those who cannot see it.
        description: What it shows, numbers included.

    Returns:
        An `<svg>` element; all texts are escaped.
    """
    frame = _Frame(*_ranges(series, axes))
    body = [*_x_axis(frame, axes), *_y_axis(frame, axes)]
    if axes.corner:
        right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
        frame.boxes.append((right - 6 - _CHARACTER * len(axes.corner), bottom - 16, right, bottom))
        body.append(words_at(right - 4, bottom - 4, axes.corner, "corner", "end"))
    body += [
        Markup('<path class="rule" d="M{:.1f} {}V{}"/>').format(frame.x(value), _TOP, HEIGHT - _BOTTOM)
        for value in axes.rules
    ]
    body += [_line(frame, item) for item in series if item.line and len(item.points) > 1]
    marked = [(item, point) for item in series if item.marks for point in item.points]
    body += [_mark(frame, item, point) for item, point in marked]
    # The last point of a series matters most, so its label is the first to find a place; so do the last series.
    body += [_label(frame, item, point) for item, point in reversed(marked) if point.label]
    return Markup(
        '<svg class="plot" viewBox="0 0 {w:.0f} {h:.0f}" role="img" aria-labelledby="{i}-title {i}-desc">'
        '<title id="{i}-title">{t}</title><desc id="{i}-desc">{d}</desc>{b}</svg>'
    ).format(w=WIDTH, h=HEIGHT, i=ident, t=title, d=description, b=Markup("").join(body))


def swatch(
    slot: int | None, look: str = "", *, line: bool = True, hollow: bool = False, shade: float | None = None
) -> Markup:
    """The line and mark of a series for a legend, without a run's colour for None; decoration beside its name."""
    drawn = Markup('<path class="{}" d="M1 6H27"/>').format(_line_classes(slot, look, shade)) if line else Markup("")
    mark = Markup("") if look == "band" else _shape(14, 6, slot, look, hollow=hollow, shade=shade)
    return Markup(
        '<svg class="swatch" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">{}{}</svg>'
    ).format(drawn, mark)


def _ranges(series: Sequence[Series], axes: Axes) -> tuple[tuple[float, float], tuple[float, float]]:
    points = [point for item in series for point in item.points]
    xs = [point.x for point in points] + ([0.0] if axes.zero else [])
    ys = [point.y + sign * (point.error or 0.0) for point in points for sign in (-1, 1)]
    return padded(xs), padded(ys + ([0.0] if axes.zero else []))


def _x_axis(frame: _Frame, axes: Axes) -> list[Markup]:
    bottom = HEIGHT - _BOTTOM
    for most in range(7, 1, -1):
        values = ticks(*frame.x_range, most)
        if axes.whole_x:
            values = [value for value in values if value == int(value) and value >= 0]
        texts = [axes.x_format(v) for v in values] if axes.x_format else tick_texts(values)
        if sum(width_of(text) + 2 for text in texts) * _CHARACTER <= WIDTH - _LEFT - _RIGHT:
            break
    parts = [Markup('<path class="axis" d="M{} {}H{}"/>').format(_LEFT, bottom, WIDTH - _RIGHT)]
    for value, text in zip(values, texts, strict=True):
        if not text:
            continue  # a place on the axis that stands for nothing
        x = frame.x(value)
        parts.append(Markup('<path class="axis" d="M{:.1f} {}v4"/>').format(x, bottom))
        # A long text under the last tick would leave the picture.
        half = width_of(text) * _CHARACTER / 2
        parts.append(words_at(min(x, WIDTH - 2 - half), bottom + 16, text, "tick", "middle"))
    if axes.zero and frame.x_range[0] < 0 < frame.x_range[1]:
        parts.append(Markup('<path class="zero" d="M{:.1f} {}V{}"/>').format(frame.x(0), _TOP, bottom))
    parts.append(words_at((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, axes.x_label, "name", "middle"))
    return parts


def _y_axis(frame: _Frame, axes: Axes) -> list[Markup]:
    values = ticks(*frame.y_range, 6)
    parts = [words_at(4, 14, axes.y_label, "name")]
    for value, text in zip(values, tick_texts(values), strict=True):
        y = frame.y(value)
        kind = "zero" if axes.zero and value == 0 else "grid"
        parts.append(Markup('<path class="{}" d="M{} {:.1f}H{}"/>').format(kind, _LEFT, y, WIDTH - _RIGHT))
        parts.append(words_at(_LEFT - 6, y + 4, text, "tick", "end"))
    return parts


def _line(frame: _Frame, item: Series) -> Markup:
    places = [(frame.x(point.x), frame.y(point.y)) for point in item.points]
    frame.along += [place for start, end in pairwise(places) for place in _between(start, end)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    look = item.look if item.marks or item.look else "thin"
    return Markup('<path class="{}" d="M{}"/>').format(_line_classes(item.slot, look, item.shade), path)


def _between(start: tuple[float, float], end: tuple[float, float]) -> Iterator[tuple[float, float]]:
    """Places on a straight line, no further apart than a character is wide."""
    steps = int(max(abs(end[0] - start[0]), abs(end[1] - start[1])) / 6) + 1
    for step in range(steps + 1):
        share = step / steps
        yield start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _colour(slot: int | None, shade: float | None) -> str:
    if shade is not None:
        return f"r{round(shade * (SHADES - 1))}"
    return "neutral" if slot is None else f"s{slot % SERIES_COLOURS}"


def _line_classes(slot: int | None, look: str, shade: float | None = None) -> str:
    if look in _NEUTRAL:
        return f"line {look}"
    dashes = "" if slot is None or shade is not None else f" d{slot % _DASHES}"
    return f"line{' thin' if look == 'thin' else ''} {_colour(slot, shade)}{dashes}"


def _mark(frame: _Frame, item: Series, point: Point) -> Markup:
    x, y = frame.x(point.x), frame.y(point.y)
    half = 3 if item.look else 5
    frame.boxes.append((x - half, y - half, x + half, y + half))
    bar = Markup("")
    if point.error:
        ends = frame.y(point.y + point.error), frame.y(point.y - point.error)
        path = f"M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}M{x - 3:.1f} {ends[0]:.1f}h6M{x - 3:.1f} {ends[1]:.1f}h6"
        bar = Markup('<path class="bar {}" d="{}"/>').format(_colour(item.slot, item.shade), path)
    shape = _shape(x, y, item.slot, item.look, hollow=point.hollow, shade=item.shade)
    marked = Markup('<g data-x="{!r}" data-y="{!r}"><title>{}</title>{}{}</g>')
    return marked.format(point.x, point.y, point.text, bar, shape)


# Circle, square, triangle, diamond, cross in turn, around the origin: runs differ by more than their colour.
_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.6 -3.6h7.2v7.2h-7.2z",
    "M0 -4.6l4.6 8h-9.2z",
    "M0 -5l5 5l-5 5l-5 -5z",
    "M-1.4 -4.5h2.8v3.1h3.1v2.8h-3.1v3.1h-2.8v-3.1h-3.1v-2.8h3.1z",
)


def _shape(x: float, y: float, slot: int | None, look: str, *, hollow: bool, shade: float | None = None) -> Markup:
    path = {"gap": "M-5 0h10", "plus": "M-4 0h8M0 -4v8"}.get(look, _SHAPES[(slot or 0) % len(_SHAPES)])
    colour = "neutral" if look in _NEUTRAL else _colour(slot, shade)
    return Markup('<path class="mark {}{}" transform="translate({:.1f} {:.1f}){}" d="{}"/>').format(
        colour, " hollow" if hollow else "", x, y, " scale(0.65)" if look == "thin" else "", path
    )


def _label(frame: _Frame, item: Series, point: Point) -> Markup:
    """Beside the mark where nothing else is; left out where there is no room (the pointer still shows it)."""
    x, y, width = frame.x(point.x), frame.y(point.y), _CHARACTER * width_of(point.label)
    shifts = [(9.0, 4.0), (-9.0 - width, 4.0), (-width / 2, -10.0), (-width / 2, 18.0), (9.0, -8.0), (9.0, 16.0)]
    shifts += [(-9.0 - width, -8.0), (-9.0 - width, 16.0)]
    boxes = {(x + dx, y + dy): (x + dx, y + dy - _LINE + 2, x + dx + width, y + dy + 2) for dx, dy in shifts}
    free = [place for place, box in boxes.items() if frame.free(box)]
    clear = [place for place in free if not frame.crossed(boxes[place])]
    # The labels that matter less rather stay away than lie over a line.
    if not clear and (item.look or not free):
        return Markup("")
    place = (clear or free)[0]
    frame.boxes.append(boxes[place])
    light = " light" if item.look else ""
    return words_at(*place, point.label, f"label{light} {_colour(item.slot, item.shade)}")


def words_at(x: float, y: float, words: str, kind: str, anchor: str = "start") -> Markup:
    """A text at a place, of the class `kind`; escaped."""
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(
        x, y, kind, anchor, escape(words)
    )
