"""Reads the pictures of a page back into the numbers they show."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from bam_lora.report import render_html


def svgs(page: str) -> dict[str, ElementTree.Element]:
    """The page's pictures by what their title's id begins with."""
    found = re.findall(r'<svg class="plot".*?</svg>', page, flags=re.DOTALL)
    parsed = [ElementTree.fromstring(text) for text in found]
    return {str(svg.get("aria-labelledby")).split("-title ")[0]: svg for svg in parsed}


def scale(svg: ElementTree.Element) -> tuple[Any, Any]:
    """Functions from picture units to data, from where the ticks stand."""
    ticks = [text for text in svg.iter("text") if text.get("class") == "tick"]
    axes = []
    for key, anchor, shift in (("x", "middle", 0.0), ("y", "end", 4.0)):
        chosen = [text for text in ticks if text.get("text-anchor") == anchor][:2]
        (a, u), (b, v) = [(float(t.get(key, 0)) - shift, number(t.text)) for t in chosen]
        axes.append(lambda place, a=a, u=u, b=b, v=v: u + (place - a) / (b - a) * (v - u))
    return axes[0], axes[1]


def number(text: str | None) -> float:
    digits, _, unit = re.sub("([%kMB])", r" \1", text or "").replace("−", "-").partition(" ")
    return float(digits) * {"": 1, "%": 0.01, "k": 1e3, "M": 1e6, "B": 1e9}[unit.strip()]


def marks(svg: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """What a pointer shows on a mark, up to its colon -> where it stands in data units."""
    x, y = scale(svg)
    result = {}
    for group in svg.iter("g"):
        shape = next(path for path in group.iter("path") if "mark" in str(path.get("class")))
        across, up = re.findall(r"-?[\d.]+", str(shape.get("transform")))[:2]
        result[group.findtext("title", "").partition(":")[0]] = (x(float(across)), y(float(up)))
    return result


def near(learned: float, forgotten: float) -> Any:
    """Pictures are drawn to a tenth of a unit, of 400."""
    return (pytest.approx(learned, abs=2e-3), pytest.approx(forgotten, abs=2e-4))


def drawn(report: dict[str, Any]) -> dict[str, ElementTree.Element]:
    return svgs(render_html([report], None))
