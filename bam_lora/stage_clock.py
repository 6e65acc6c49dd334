"""How long each stage of a run takes in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from bam_lora.gpu_memory import begin_gpu_peak, gpu_peak_bytes


class StageClock:
    """Seconds by stage. A stage within another takes its time from that one, so nothing is counted twice.

    Attributes:
        seconds: Of each stage so far, the one that is going on left out.
        first: Seconds of the first time that each stage was gone through, stages within it included.
        gpu_peaks: The most GPU memory that torch held in each stage, in bytes, stages within it left out; empty without
            a GPU.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.gpu_peaks: dict[str, int] = {}
        self._stages: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time in the `with` block for a stage."""
        started = self._settle()
        self._note_peak()
        self._stages.append(name)
        begin_gpu_peak()
        try:
            yield
        finally:
            ended = self._settle()
            self._note_peak()
            self._stages.pop()
            begin_gpu_peak()
            self.first.setdefault(name, ended - started)

    def so_far(self) -> dict[str, float]:
        """Seconds of each stage so far, with those of the one that is going on."""
        self._settle()
        return dict(self.seconds)

    def peaks_so_far(self) -> dict[str, int]:
        """`gpu_peaks`, with that of the stage that is going on."""
        self._note_peak()
        return dict(self.gpu_peaks)

    def _note_peak(self) -> None:
        peak = gpu_peak_bytes() if self._stages else None
        if peak is not None:
            self.gpu_peaks[self._stages[-1]] = max(peak, self.gpu_peaks.get(self._stages[-1], 0))

    def _settle(self) -> float:
        """Gives the time since the last change to the stage that is going on; returns the time."""
        now = time.monotonic()
        if self._stages:
            name = self._stages[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now
        return now
