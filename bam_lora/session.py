"""The sittings of a run: how long each was, and how long all of them together."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bam_lora.limits import session_seconds
from bam_lora.machine import peak_rss_bytes
from bam_lora.stage_clock import StageClock
from bam_lora.store import read_record, write_record


class Session:
    """One start of the run: its times and peak memory, kept in `sessions.json` with those before it."""

    def __init__(self, path: Path, clock: StageClock, now: Callable[[], float] | None = None) -> None:
        record = read_record(path) or {"sessions": []}
        self._path = path
        self._stages = clock
        self._before: Sequence[dict[str, Any]] = record["sessions"]
        self._started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._now = now or time.monotonic
        self._clock = self._updated = self._now()
        self.update()

    @property
    def seconds(self) -> float:
        """Of all sittings so far, this one included; not the time that the run lay idle."""
        return session_seconds(self._before) + (self._now() - self._clock)

    @property
    def working_seconds(self) -> float:
        """The same without the preparing of data, which is done once."""
        before = sum(session.get("seconds_by_stage", {}).get("data", 0.0) for session in self._before)
        return self.seconds - float(before) - self._stages.so_far().get("data", 0.0)

    def update(self, every: float = 0.0) -> None:
        """Writes the session's figures so far; called after every step, so that a kill loses little.

        Args:
            every: Seconds since the last time below which nothing is written.
        """
        now = self._now()
        if now - self._updated < every:
            return
        self._updated, peaks = now, self._stages.peaks_so_far()
        session = {
            "started": self._started,
            "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(now - self._clock, 3),
            "seconds_by_stage": {name: round(seconds, 3) for name, seconds in self._stages.so_far().items()},
            "first_load_seconds": round(self._stages.first.get("load", 0.0), 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_gpu_bytes": max(peaks.values(), default=None),
            **({"peak_gpu_bytes_by_stage": peaks} if peaks else {}),
        }
        write_record(self._path, "sessions", {"sessions": [*self._before, session]})
