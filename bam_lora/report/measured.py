"""What of a run was measured: its base, its final model, and the curves that `shrink.json` adds to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.report.curve import Curve, Point
from bam_lora.report.noise import pooled
from bam_lora.report.records import iteration_folder, read_record, read_shrink

_KINDS = ("shrink", "checkpoint", "ema", "learned")
# A model scored twice is not two points: the base is λ = 0, the final model λ = 1.
_BASE_SCALE, _FINAL_SCALE = 0.0, 1.0


@dataclass(frozen=True)
class Measured:
    """A run with the points that count in a comparison at equal target scores; None where nothing was measured."""

    report: dict[str, Any]
    base: Point | None
    final: Point | None
    curves: tuple[Curve, ...]
    # Nothing between base and final model was measured by shrinking the delta.
    coarse: bool

    @property
    def name(self) -> str:
        """The run's name in the comparison."""
        return str(self.report["name"])

    @property
    def seed(self) -> Any:
        """The seed in the run's recipe."""
        return self.report["seeds"]["run"]


def read_measured(run: Path, report: dict[str, Any], final: Sequence[Mapping[str, Any]]) -> Measured:
    """Reads the points of a run.

    Args:
        run: The run directory.
        report: Its report.
        final: The score entries of its newest merged model, from eval.json; empty if there are none.

    Raises:
        UserError: If a record is damaged, or `shrink.json` does not belong to the run's evaluation.
    """
    evaluation = read_record(iteration_folder(run, 0) / "eval.json") or {"scores": []}
    points = read_shrink(run / "shrink.json") or []
    points = _checked(run / "shrink.json", points, final) if final else []
    base, last = point(evaluation["scores"]), point(final)
    curves = () if base is None or last is None else _curves(str(report["name"]), base, last, points)
    coarse = all(item["kind"] != "shrink" for item in points)
    return Measured(report, base, last, curves, coarse)


def point(scores: Sequence[Mapping[str, Any]]) -> Point | None:
    """A model's place in the plane, or None if it was not scored on both languages."""
    (target, _), (source, _) = (pooled(scores, role) for role in ("target", "source"))
    return None if target is None or source is None else Point(target, source, tuple(scores))


def _curves(name: str, base: Point, final: Point, points: Sequence[Mapping[str, Any]]) -> tuple[Curve, ...]:
    """The shrink curve, the checkpoints from the base on, the averages, the learned weights; else single points."""
    placed = {kind: [_placed(item) for item in points if item["kind"] == kind] for kind in _KINDS}
    shrink = [(_BASE_SCALE, base), (_FINAL_SCALE, final)]
    inner = [(scale, place) for scale, place in placed["shrink"] if scale not in (_BASE_SCALE, _FINAL_SCALE)]
    curves = [[base], [final]]
    if inner:
        # Without a model in between, the line from base to final model would be a guess about λ, not a measurement.
        curves = [[place for _, place in sorted([*shrink, *inner], key=lambda pair: pair[0])]]
    if placed["checkpoint"]:
        steps = sorted(placed["checkpoint"], key=lambda pair: pair[0])
        curves.append([base, *(place for _, place in steps)])
    curves += [[place for _, place in placed[kind]] for kind in ("ema", "learned") if placed[kind]]
    return tuple(Curve(name, tuple(places)) for places in curves)


def _placed(item: Mapping[str, Any]) -> tuple[float, Point]:
    """A point of the record with what it is sorted by: λ, or the step in a checkpoint's label."""
    place = point(item["scores"])
    assert place is not None, "the sets of the point were compared with those of the run"
    if item["kind"] == "shrink":
        return float(item["scale"]), place
    step = re.search(r"\d+", item["label"])
    return float(step[0]) if step else 0.0, place


def _checked(path: Path, points: list[dict[str, Any]], final: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points, if each has a known kind, its place in the order, and the run's evaluation sets."""
    for item in points:
        expected = found = None
        if item["kind"] not in _KINDS:
            expected, found = f"one of {', '.join(_KINDS)}", repr(item["kind"])
        elif item["kind"] == "shrink" and not isinstance(item["scale"], int | float):
            expected, found = "a number as scale", repr(item["scale"])
        elif item["kind"] == "checkpoint" and not re.search(r"\d", item["label"]):
            expected, found = "a step in the label of a checkpoint", repr(item["label"])
        elif _sets(item["scores"]) != _sets(final):
            expected, found = "scores on the run's evaluation sets", "other sets, or other text under the same names"
        if expected and found:
            remedy = "Delete the file and make it again with `bam-lora shrink`"
            raise UserError.of(f"{path}, point {item['label']!r}", expected=expected, found=found, remedy=remedy)
    return points


def _sets(scores: Sequence[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    return {(score["set"], score["role"], score["documents"], score["bytes"]) for score in scores}
