"""Small plots as inline SVG: axes with units, labels that keep clear of each other, text for those who cannot see.

Colours, line widths and fonts are classes of the page's style sheet (`s0` .. `s7` for series), so that light and dark
schemes need one picture. Drawn for 400 units of width: at phone size a unit is about a pixel, so text stays readable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 400.0, 290.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 16.0, 30.0, 44.0
# The style sheet makes text 11 units high, 12.5 on phones; this is a character of the widest of its fonts, in bold.
_CHARACTER, _LINE = 7.2, 13.0
SERIES_COLOURS, _DASHES = 8, 4
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
    broad line without a run's colour), "gap" (a dotted one).
    """

    name: str
    slot: int
    points: list[Point]
    line: bool = True
    marks: bool = True
    look: str = ""


@dataclass(frozen=True)
class Axes:
    """What the axes say; `zero` draws the lines x = 0 and y = 0; `corner` is a remark in the lower right corner."""

    x_label: str
    y_label: str
    x_format: Callable[[float], str] | None = None
    zero: bool = False
    corner: str = ""
    whole_x: bool = False


@dataclass
class _Frame:
    """Data ranges to picture units, and the boxes (left, top, right, bottom) that are taken."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def free(self, box: tuple[float, float, float, float]) -> bool:
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
        body.append(_text(right - 4, bottom - 4, axes.corner, "corner", "end"))
    body += [_line(frame, item) for item in series if item.line and len(item.points) > 1]
    marked = [(item, point) for item in series if item.marks for point in item.points]
    body += [_mark(frame, item, point) for item, point in marked]
    # The last point of a series matters most, so its label is the first to find a place; so do the last series.
    body += [_label(frame, item, point) for item, point in reversed(marked) if point.label]
    return Markup(
        '<svg class="plot" viewBox="0 0 {w:.0f} {h:.0f}" role="img" aria-labelledby="{i}-title {i}-desc">'
        '<title id="{i}-title">{t}</title><desc id="{i}-desc">{d}</desc>{b}</svg>'
    ).format(w=WIDTH, h=HEIGHT, i=ident, t=title, d=description, b=Markup("").join(body))


def swatch(slot: int | None, look: str = "", *, line: bool = True, hollow: bool = False) -> Markup:
    """The line and mark of a series for a legend, without a run's colour for None; decoration beside its name."""
    drawn = Markup('<path class="{}" d="M1 6H27"/>').format(_line_classes(slot, look)) if line else Markup("")
    mark = Markup("") if look == "band" else _shape(14, 6, slot, look, hollow=hollow)
    return Markup(
        '<svg class="swatch" viewBox="0 0 28 12" width="28" height="12" aria-hidden="true">{}{}</svg>'
    ).format(drawn, mark)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) within [low, high], at most `most` of them.

    Args:
        low: The smaller end.
        high: The larger end, above `low`.
        most: At least 2.
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1.0, 2.0, 2.5, 5.0, 10.0, 20.0, 50.0):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [index * step for index in range(first, last + 1)]
    raise AssertionError(f"no ticks for {low} .. {high}")


def tick_texts(values: Sequence[float]) -> list[str]:
    """All ticks with the same number of decimals, as many as their step needs."""
    if not values:
        return []
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    digits = next((d for d in range(9) if abs(round(step, d) - step) < 1e-6 * step), 9)
    return [f"{value + 0.0:.{digits}f}".replace("-", "−") for value in (round(v, digits) or 0.0 for v in values)]


def _ranges(series: Sequence[Series], axes: Axes) -> tuple[tuple[float, float], tuple[float, float]]:
    points = [point for item in series for point in item.points]
    xs = [point.x for point in points] + ([0.0] if axes.zero else [])
    ys = [point.y + sign * (point.error or 0.0) for point in points for sign in (-1, 1)]
    return _padded(xs), _padded(ys + ([0.0] if axes.zero else []))


def _padded(values: list[float]) -> tuple[float, float]:
    """The range of the values with some air; a single value gets a tenth of its size on either side."""
    low, high = min(values), max(values)
    air = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
    return low - air, high + air


def _x_axis(frame: _Frame, axes: Axes) -> list[Markup]:
    bottom = HEIGHT - _BOTTOM
    for most in range(7, 1, -1):
        values = ticks(*frame.x_range, most)
        if axes.whole_x:
            values = [value for value in values if value == int(value) and value >= 0]
        texts = [axes.x_format(v) for v in values] if axes.x_format else tick_texts(values)
        if sum(len(text) + 2 for text in texts) * _CHARACTER <= WIDTH - _LEFT - _RIGHT:
            break
    parts = [Markup('<path class="axis" d="M{} {}H{}"/>').format(_LEFT, bottom, WIDTH - _RIGHT)]
    for value, text in zip(values, texts, strict=True):
        x = frame.x(value)
        parts.append(Markup('<path class="axis" d="M{:.1f} {}v4"/>').format(x, bottom))
        # A long text under the last tick would leave the picture.
        half = len(text) * _CHARACTER / 2
        parts.append(_text(min(x, WIDTH - 2 - half), bottom + 16, text, "tick", "middle"))
    if axes.zero and frame.x_range[0] < 0 < frame.x_range[1]:
        parts.append(Markup('<path class="zero" d="M{:.1f} {}V{}"/>').format(frame.x(0), _TOP, bottom))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, axes.x_label, "name", "middle"))
    return parts


def _y_axis(frame: _Frame, axes: Axes) -> list[Markup]:
    values = ticks(*frame.y_range, 6)
    parts = [_text(4, 14, axes.y_label, "name")]
    for value, text in zip(values, tick_texts(values), strict=True):
        y = frame.y(value)
        kind = "zero" if axes.zero and value == 0 else "grid"
        parts.append(Markup('<path class="{}" d="M{} {:.1f}H{}"/>').format(kind, _LEFT, y, WIDTH - _RIGHT))
        parts.append(_text(_LEFT - 6, y + 4, text, "tick", "end"))
    return parts


def _line(frame: _Frame, item: Series) -> Markup:
    path = "L".join(f"{frame.x(point.x):.1f} {frame.y(point.y):.1f}" for point in item.points)
    look = item.look if item.marks or item.look else "thin"
    return Markup('<path class="{}" d="M{}"/>').format(_line_classes(item.slot, look), path)


def _line_classes(slot: int | None, look: str) -> str:
    if look in _NEUTRAL:
        return f"line {look}"
    colour = "neutral" if slot is None else f"s{slot % SERIES_COLOURS} d{slot % _DASHES}"
    return f"line{' thin' if look == 'thin' else ''} {colour}"


def _mark(frame: _Frame, item: Series, point: Point) -> Markup:
    x, y = frame.x(point.x), frame.y(point.y)
    half = 3 if item.look else 5
    frame.boxes.append((x - half, y - half, x + half, y + half))
    bar = Markup("")
    if point.error:
        ends = frame.y(point.y + point.error), frame.y(point.y - point.error)
        path = f"M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}M{x - 3:.1f} {ends[0]:.1f}h6M{x - 3:.1f} {ends[1]:.1f}h6"
        bar = Markup('<path class="bar s{}" d="{}"/>').format(item.slot % SERIES_COLOURS, path)
    shape = _shape(x, y, item.slot, item.look, hollow=point.hollow)
    return Markup("<g><title>{}</title>{}{}</g>").format(point.text, bar, shape)


# Circle, square, triangle, diamond, cross in turn, around the origin: runs differ by more than their colour.
_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.6 -3.6h7.2v7.2h-7.2z",
    "M0 -4.6l4.6 8h-9.2z",
    "M0 -5l5 5l-5 5l-5 -5z",
    "M-1.4 -4.5h2.8v3.1h3.1v2.8h-3.1v3.1h-2.8v-3.1h-3.1v-2.8h3.1z",
)


def _shape(x: float, y: float, slot: int | None, look: str, *, hollow: bool) -> Markup:
    path = {"gap": "M-5 0h10", "plus": "M-4 0h8M0 -4v8"}.get(look, _SHAPES[(slot or 0) % len(_SHAPES)])
    colour = "neutral" if slot is None or look in _NEUTRAL else f"s{slot % SERIES_COLOURS}"
    return Markup('<path class="mark {}{}" transform="translate({:.1f} {:.1f}){}" d="{}"/>').format(
        colour, " hollow" if hollow else "", x, y, " scale(0.65)" if look == "thin" else "", path
    )


def _label(frame: _Frame, item: Series, point: Point) -> Markup:
    """Beside the mark where nothing else is; left out where there is no room (the pointer still shows it)."""
    x, y, width = frame.x(point.x), frame.y(point.y), _CHARACTER * len(point.label)
    for dx, dy in ((9.0, 4.0), (-9.0 - width, 4.0), (-width / 2, -10.0), (-width / 2, 18.0), (9.0, -8.0), (9.0, 16.0)):
        box = (x + dx, y + dy - _LINE + 2, x + dx + width, y + dy + 2)
        if frame.free(box):
            frame.boxes.append(box)
            light = " light" if item.look else ""
            return _text(x + dx, y + dy, point.label, f"label{light} s{item.slot % SERIES_COLOURS}")
    return Markup("")


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(
        x, y, kind, anchor, escape(text)
    )
