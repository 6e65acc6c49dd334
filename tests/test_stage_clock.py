"""Times by stage: nested stages exclude one another, and a run's stages lie within its wall time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bam_lora.session import Session
from bam_lora.stage_clock import StageClock
from bam_lora.store import read_record


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its last entry."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[-1])
    return now


def test_a_stage_within_another_takes_its_time_from_it(ticks: list[float]) -> None:
    clock = StageClock()
    ticks.append(103.0)  # before any stage: nobody's
    with clock.stage("merge"):
        ticks.append(104.0)
        with clock.stage("load"):
            ticks.append(106.0)
        ticks.append(106.5)
    ticks.append(110.0)
    with clock.stage("load"):
        ticks.append(118.0)
    assert clock.seconds == {"merge": 1.5, "load": 10.0}
    assert clock.first == {"merge": 3.5, "load": 2.0}


def test_a_stage_that_fails_is_counted_and_left(ticks: list[float]) -> None:
    clock = StageClock()

    def fail() -> None:
        with clock.stage("train"):
            ticks.append(104.0)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    ticks.append(109.0)
    with clock.stage("fold"):
        ticks.append(110.0)
    assert clock.seconds == {"train": 4.0, "fold": 1.0}


def test_sessions_keep_the_stages_of_each(ticks: list[float], tmp_path: Path) -> None:
    path = tmp_path / "sessions.json"
    for seconds in (2.0, 5.0):
        clock = StageClock()
        session = Session(path, clock)
        with clock.stage("load"):
            ticks.append(ticks[-1] + seconds)
        ticks.append(ticks[-1] + 1.0)
        session.update()
    record = read_record(path)
    assert record is not None
    first, second = record["sessions"]
    assert (first["seconds"], first["seconds_by_stage"], first["first_load_seconds"]) == (3.0, {"load": 2.0}, 2.0)
    assert (second["seconds"], second["seconds_by_stage"], second["first_load_seconds"]) == (6.0, {"load": 5.0}, 5.0)
