"""How far the branches of an iteration agree, and how much it adds, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from bam_lora.report import format as fmt
from bam_lora.report.figure import Figure, Report, Runs
from bam_lora.report.glyphs import short
from bam_lora.report.svg import Axes, Point, Series, plot, swatch

# With more layers than this the marks would hide the lines.
_MANY_LAYERS = 16
# A legend with more iterations than this names some of them: their colours are in an order.
_MANY_ITERATIONS = 8

Lines = Sequence[tuple[int, Sequence[dict[str, Any]]]]

_CAPTION = (
    "One line an iteration, early ones pale, late ones dark. |Δ|: Frobenius norm of what the iteration's merge adds to "
    "the weights of a layer. "
)
_COSINE = (
    "Cosine between the branches' deltas: 1 is full agreement, 0 none; a high one says that the branches have learned "
    "the same, and that little is lost by averaging. Mean over the weights of a layer, each counted once, and over the "
    "pairs of branches."
)


def layers_figure(report: Report, number: int, runs: Runs) -> Figure | None:
    """What each iteration adds to each layer, and the cosine between its branches there.

    Args:
        report: Of one run.
        number: Which one on the page.
        runs: All of them.
    """
    steps, cosines = (
        [(item["iteration"], item[key]) for item in report["iterations"] if item.get(key)]
        for key in ("norm_by_layer", "cosine_by_layer")
    )
    of = "" if runs.alone else f" of {report['name']}"
    panels = {}
    if steps:
        panels["step"] = _panel(steps, "merged_norm", "|Δ| added by an iteration", f"|Δ| by layer{of}", number, "step")
    if cosines:
        title = f"Cosine between branches by layer{of}"
        panels["cosine"] = _panel(cosines, "cosine", "cosine between branches", title, number, "cosine")
    if not panels:
        return None
    caption = _CAPTION + (_COSINE if cosines else "")
    return Figure(f"Layer by layer{of}", panels, _legend([one for one, _ in steps or cosines]), caption, report["name"])


def _panel(lines: Lines, key: str, label: str, title: str, number: int, name: str) -> Markup:
    # Layers lie side by side in the order of the weights; what stands outside the layers has a name and comes last.
    layers = list(dict.fromkeys(str(entry["layer"]) for _, line in lines for entry in line))
    look = "thin" if len(layers) > _MANY_LAYERS else ""
    series, spoken = [], []
    for order, (iteration, line) in enumerate(lines):
        texts = [f"layer {e['layer']}" if isinstance(e["layer"], int) else str(e["layer"]) for e in line]
        values = [fmt.signless(entry[key], 3) for entry in line]
        points = [
            Point(layers.index(str(entry["layer"])), entry[key], f"iteration {iteration}, {text}: {value}")
            for text, value, entry in zip(texts, values, line, strict=True)
        ]
        series.append(Series(f"iteration {iteration}", order, points, look=look, shade=_shade(order, len(lines))))
        course = ", ".join(f"{value} in {text}" for text, value in zip(texts, values, strict=True))
        spoken.append(f"Iteration {iteration}: {course}.")

    def layer_name(position: float) -> str:
        return short(layers[int(position)], 10) if position < len(layers) else ""

    axes = Axes("layer", label, layer_name, whole_x=True)
    return plot(series, axes, ident=f"plot-{name}-{number}", title=title, description=" ".join(spoken))


def _shade(order: int, count: int) -> float:
    return 1.0 if count == 1 else order / (count - 1)


def _legend(iterations: Sequence[int]) -> list[tuple[Markup, str]]:
    """The iterations beside their shades; of many, some from the first to the last."""
    count = len(iterations)
    if count == 1:
        return []
    steps = min(count, _MANY_ITERATIONS) - 1
    shown = [round(step * (count - 1) / steps) for step in range(steps + 1)]
    return [(swatch(order, shade=_shade(order, count)), f"iteration {iterations[order]}") for order in shown]
