"""How far the branches of an iteration agree, layer by layer."""

from __future__ import annotations

from bam_lora.report import format as fmt
from bam_lora.report.figure import Figure, Report, Runs, short
from bam_lora.report.svg import Axes, Point, Series, plot, swatch

# With more layers than this the marks would hide the lines.
_MANY_LAYERS = 16


def cosine_figure(report: Report, number: int, runs: Runs) -> Figure | None:
    """Cosine between the branches' deltas over the layers, one line an iteration; None without two branches.

    Args:
        report: Of one run.
        number: Which one on the page.
        runs: All of them.
    """
    lines = [(item["iteration"], item["cosine_by_layer"]) for item in report["iterations"] if item["cosine_by_layer"]]
    if not lines:
        return None
    # Layers lie side by side in the order of the weights; what stands outside the layers has a name and comes last.
    layers = list(dict.fromkeys(str(entry["layer"]) for _, line in lines for entry in line))
    look = "thin" if len(layers) > _MANY_LAYERS else ""
    series, spoken = [], []
    for slot, (iteration, line) in enumerate(lines):
        texts = [f"layer {e['layer']}" if isinstance(e["layer"], int) else str(e["layer"]) for e in line]
        values = [fmt.signless(entry["cosine"], 3) for entry in line]
        points = [
            Point(layers.index(str(entry["layer"])), entry["cosine"], f"iteration {iteration}, {text}: {value}")
            for text, value, entry in zip(texts, values, line, strict=True)
        ]
        series.append(Series(f"iteration {iteration}", slot, points, look=look))
        course = ", ".join(f"{value} in {text}" for text, value in zip(texts, values, strict=True))
        spoken.append(f"Iteration {iteration}: {course}.")

    def layer_name(position: float) -> str:
        return short(layers[int(position)], 10) if position < len(layers) else ""

    name = "Cosine between branches" if runs.alone else f"Cosine between branches of {report['name']}"
    axes = Axes("layer", "cosine between branches", layer_name, whole_x=True)
    drawn = plot(series, axes, ident=f"plot-cosine-{number}", title=name, description=" ".join(spoken))
    legend = [(swatch(line.slot, look), line.name) for line in series] if len(series) > 1 else []
    caption = (
        "Between the branches' deltas: 1 is full agreement, 0 none. Mean over the weights of a layer, each counted "
        "once, and over the pairs of branches."
    )
    return Figure(name, [drawn], legend, caption)
