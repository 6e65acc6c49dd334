"""shrink.json: which points make which curve, and what does not fit a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from envelope_runs import bam, entry_of, read, scores, single
from report_runs import record

from bam_lora.errors import UserError
from bam_lora.report import compare


def test_checkpoints_are_a_curve_in_the_order_of_their_steps(tmp_path: Path) -> None:
    run = single(tmp_path / "single", shrink=None)
    donor = single(tmp_path / "donor", shrink={0.1: scores(1.7, 1.3), 0.2: scores(1.5, 1.2), 0.3: scores(1.55, 1.17)})
    by_scale = {item["scale"]: item["scores"] for item in read(donor / "shrink.json")["points"]}
    points = [
        {"kind": "checkpoint", "label": "step 1000", "scale": None, "delta_norm": 3.0, "scores": by_scale[0.2]},
        {"kind": "checkpoint", "label": "step 200", "scale": None, "delta_norm": 1.0, "scores": by_scale[0.1]},
        {"kind": "ema", "label": "0.99", "scale": None, "delta_norm": 2.0, "scores": by_scale[0.3]},
    ]
    record(run / "shrink.json", {"format": 1, "evaluation": "e" * 64, "points": points})
    entry = entry_of([run, bam(tmp_path / "bam", source=1.15)])
    # Half-way between the two checkpoints, not from the base straight to the later one, which would be lower. The
    # average of weights is a point on its own (1.55, 1.17).
    assert entry["envelope_source"] == pytest.approx(1.25)
    dominated = entry_of([run, bam(tmp_path / "worse/bam", source=1.175)])
    assert dominated["envelope_source"] == pytest.approx(1.17)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "guess"}, "point '0.5': expected one of shrink, checkpoint, ema, learned, found 'guess'"),
        ({"scale": None}, "point '0.5': expected a number as scale, found None"),
        ({"kind": "checkpoint", "label": "last"}, "point 'last': expected a step in the label of a checkpoint"),
        ({"scores": []}, "point '0.5': expected scores on the run's evaluation sets, found other sets"),
    ],
)
def test_a_shrink_record_that_does_not_fit_is_an_error(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    run = single(tmp_path / "single", shrink={0.5: scores(1.8, 1.18)})
    body = read(run / "shrink.json")
    body["points"][0] |= change
    record(run / "shrink.json", body)
    with pytest.raises(UserError) as error:
        compare([run, bam(tmp_path / "bam")])
    assert words in str(error.value)
    assert "shrink.json" in str(error.value)


def test_a_shrink_record_of_another_format(tmp_path: Path) -> None:
    run = single(tmp_path / "single")
    record(run / "shrink.json", {**read(run / "shrink.json"), "format": 2})
    with pytest.raises(UserError, match=r"shrink\.json: expected format 1, found 2"):
        compare([run, bam(tmp_path / "bam")])
