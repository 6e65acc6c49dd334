"""A plot of the page as an SVG file of its own: with its title, its legend, its style, on white; and as PNG."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from importlib import resources

from markupsafe import Markup

from bam_lora.report.glyphs import short, width_of
from bam_lora.report.svg import WIDTH, words_at

_MARGIN, _HEADING, _LINE = 8.0, 24.0, 18.0
_SWATCH, _BETWEEN, _CHARACTER = 32.0, 16.0, 6.8
# As many of the widest usual letters as there is room for.
_HEADING_LETTERS, _LEGEND_LETTERS = 40, 48
# A file is drawn larger than on the page, and a PNG with enough pixels for print at the width of a column.
_PIXELS_A_UNIT, _PNG_ZOOM = 1.5, 2.0
_SIZE = re.compile(r'viewBox="0 0 (\d+) (\d+)"')

Legend = Sequence[tuple[Markup, str]]


def standalone(plot: Markup, title: str, legend: Legend = ()) -> str:
    """Makes a file of a plot.

    Args:
        plot: An `<svg>` of the page.
        title: Written above it.
        legend: Swatches and what they mean, written under the title.

    Returns:
        A whole SVG document that needs no style sheet and no script; light, whatever the reader's scheme.
    """
    size = _SIZE.search(plot)
    assert size is not None, "a plot says its size"
    placed, below = _legend(legend)
    width, height = WIDTH + 2 * _MARGIN, float(size[2]) + below + _MARGIN
    inner = _with(plot, f'x="{_MARGIN}" y="{below}" width="{size[1]}" height="{size[2]}"')
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {w:.0f} {h:.0f}" '
        'width="{pw:.0f}" height="{ph:.0f}"><title>{t}</title><style>{s}</style>'
        '<rect width="100%" height="100%" fill="#ffffff"/>{heading}{legend}'
    ).format(
        w=width,
        h=height,
        pw=width * _PIXELS_A_UNIT,
        ph=height * _PIXELS_A_UNIT,
        t=title,
        s=Markup(_style()),
        heading=words_at(_MARGIN + 4, 20, short(title, _HEADING_LETTERS), "heading"),
        legend=placed,
    )
    return f"{head}{inner}</svg>\n"


def _with(svg: Markup, attributes: str) -> Markup:
    """The same element with further attributes."""
    return Markup(str(svg).replace("<svg ", f"<svg {attributes} ", 1))


def _legend(legend: Legend) -> tuple[Markup, float]:
    """The entries side by side, in as many lines as they need, and where the plot begins."""
    drawn, x, y = Markup(""), _MARGIN, _HEADING + _LINE
    for mark, whole in legend:
        name = short(whole, _LEGEND_LETTERS)
        width = _SWATCH + _CHARACTER * width_of(name)
        if x > _MARGIN and x + width > WIDTH + _MARGIN:
            x, y = _MARGIN, y + _LINE
        drawn += _with(mark, f'x="{x:.1f}" y="{y - 10:.1f}"')
        drawn += words_at(x + _SWATCH, y, name, "name")
        x += width + _BETWEEN
    return drawn, (y + 8 if legend else _HEADING + 4)


@functools.cache
def _style() -> str:
    """The plots' style sheet, the light colours in place of the variables, which many readers of SVG do not know."""
    folder = resources.files("bam_lora.report") / "templates"
    palette, style = ((folder / name).read_text(encoding="utf-8") for name in ("palette.css", "plot.css"))
    light = palette.partition("@media")[0]
    colours = dict(re.findall(r"(--\w+): (#\w+);", light)) | {"--page": "#ffffff"}
    plain = re.sub(r"var\((--\w+)\)", lambda match: colours[match[1]], style)
    return plain + ".plot text.heading { font-size: 14px; font-weight: 600; fill: #1b1d20; }\n"


def why_no_png() -> str:
    """What keeps PNG from being drawn here, and the remedy; empty if nothing does."""
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        return "PNG needs resvg-py. Install it with: pip install 'bam-lora[plots]'"
    if not _has_fonts():
        return "PNG needs a font of a usual name, and none is here. Install DejaVu Sans"
    return ""


def png(document: str) -> bytes:
    """Draws an SVG document as PNG; only where `why_no_png` finds nothing.

    Args:
        document: From `standalone`.
    """
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg_string=document, zoom=_PNG_ZOOM))


@functools.cache
def _has_fonts() -> bool:
    """False where resvg would leave text out, without a word, for want of a font."""
    import resvg_py

    family = re.search(r"font-family: ([^;]+);", _style())
    assert family is not None, "plot.css names the fonts"
    blank = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">{}</svg>'
    letter = f'<style>text {{ font-family: {family[1]} }}</style><text x="2" y="16">M</text>'
    drawn = (bytes(resvg_py.svg_to_bytes(svg_string=blank.format(inside))) for inside in (letter, ""))
    return next(drawn) != next(drawn)
