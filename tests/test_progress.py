"""What a log file shows of a run: plain lines, the numbers in them right."""

from __future__ import annotations

import io

import pytest

from bam_lora import progress
from bam_lora.progress import RunProgress, duration


def test_duration() -> None:
    assert [duration(seconds) for seconds in (0, 61.4, 3600, 36_061)] == ["0:00", "1:01", "1:00:00", "10:01:01"]


def test_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 1000.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    stream = io.StringIO()
    with RunProgress(stream, live=False, title="bam") as display:
        display.plan(10_000)
        display.stage("scoring base")
        for step in range(1, 11):
            clock["now"] += 5
            display.step("iteration 1/2, branch 1", step, 10, 2.5 if step > 1 else None, step * 500.0)
        display.branch_done(5_000)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[0:00] bam: scoring base"
    assert lines[-1] == (
        "[0:50] bam: iteration 1/2, branch 1, step 10/10, loss 2.500, 100 tokens/s, 0:50 left, 50 % of the run"
    )
    assert len(lines) == 5  # the first step, one every 20 seconds, the last
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    stream = io.StringIO()
    with RunProgress(stream, live=True) as display:
        display.plan(100)
        display.step("iteration 1/1, branch 1", 1, 2, 1.0, 50.0)
        display.say("base: german 4.4")
    assert "base: german 4.4" in stream.getvalue()


def test_a_download_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 1000.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    stream = io.StringIO()
    with RunProgress(stream, live=False) as display:
        display.download("org/tiny", 5_000, 5_000)
        for done in range(0, 17):
            display.download("org/model", done * 10**9, 16 * 10**9)
            clock["now"] += 5
    lines = stream.getvalue().splitlines()
    assert lines[-1] == "[1:20] downloading org/model: 16.00 of 16.00 GB"
    assert len(lines) == 5
