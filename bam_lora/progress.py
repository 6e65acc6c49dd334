"""One progress display for the whole run: a live bar on a terminal, plain lines with the time in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_LOG_EVERY_SECONDS = 20.0
_SPEED_WINDOW_SECONDS = 120.0
_WORTH_A_LINE_BYTES = 10_000_000


class RunProgress:
    """Tells the user where the run is: iteration, branch, step, loss, tokens per second, time left.

    Everything goes to stderr, so that results on stdout can be piped. Time left counts training only; it is what
    the tokens still to be trained take at the speed of the last two minutes.
    """

    def __init__(self, stream: IO[str] | None = None, *, live: bool | None = None, title: str = "") -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal if live is None else live
        self._title = f"{title}: " if title else ""
        self._started = time.monotonic()
        self._last_line = 0.0
        self._total_tokens = 0
        self._done_tokens = 0.0
        self._speed: list[tuple[float, float]] = []
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[note]}"),
            console=self._console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task(self._title + "starting", total=None, note="")

    def __enter__(self) -> RunProgress:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays on the screen or in the log."""
        self._console.print(text if self._live else f"[{self._clock()}] {self._title}{text}", markup=False)

    def plan(self, total_tokens: int) -> None:
        """Sets the number of tokens that the whole run trains on."""
        self._total_tokens = total_tokens
        self._bar.update(self._task, total=total_tokens)

    def stage(self, text: str) -> None:
        """What is being done now, when it is not training."""
        if self._live:
            self._bar.update(self._task, description=self._title + text, note="")
        else:
            self.say(text)

    def download(self, name: str, done: int, total: int) -> None:
        """How many bytes of what the run needs have come; small things are not worth a line."""
        if total < _WORTH_A_LINE_BYTES:
            return
        text = f"downloading {name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB"
        now = time.monotonic()
        if self._live:
            self._bar.update(self._task, description=self._title + text, note="")
        elif now - self._last_line >= _LOG_EVERY_SECONDS or done == total:
            self._last_line = now
            self.say(text)

    def branch_done(self, done_tokens: int) -> None:
        """Tokens of the run that are trained for good; the speed is measured afresh."""
        self._done_tokens = done_tokens
        self._speed = []
        self._bar.update(self._task, completed=done_tokens)

    def step(self, label: str, step: int, steps: int, loss: float | None, done_tokens: float) -> None:
        """One optimizer step of a branch. `done_tokens` counts from the start of the run."""
        now = time.monotonic()
        self._done_tokens = done_tokens
        self._speed = [(t, n) for t, n in self._speed if now - t < _SPEED_WINDOW_SECONDS] + [(now, done_tokens)]
        note = self._note(step, steps, loss)
        if self._live:
            self._bar.update(
                self._task, description=self._title + label, completed=done_tokens, total=self._total_tokens, note=note
            )
        elif now - self._last_line >= _LOG_EVERY_SECONDS or step == steps:
            self._last_line = now
            self.say(f"{label}, {note}")

    def _note(self, step: int, steps: int, loss: float | None) -> str:
        parts = [f"step {step}/{steps}"]
        if loss is not None:
            parts.append(f"loss {loss:.3f}")
        (first, before), (last, after) = self._speed[0], self._speed[-1]
        if last > first and after > before:
            speed = (after - before) / (last - first)
            parts.append(f"{speed:,.0f} tokens/s")
            parts.append(f"{duration((self._total_tokens - after) / speed)} left")
        if self._total_tokens:
            parts.append(f"{100 * self._done_tokens / self._total_tokens:.0f} % of the run")
        return ", ".join(parts)

    def _clock(self) -> str:
        return duration(time.monotonic() - self._started)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
