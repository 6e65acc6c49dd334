"""How far a download is: told to a run's display, or drawn on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

MUCH_BYTES = 200_000_000  # worth a line; also what is kept free on the disk beside a download

Watch = Callable[[str, int, int], None]  # what is fetched, bytes so far, bytes in all


@contextlib.contextmanager
def watching(name: str, total: int, watch: Watch | None) -> Iterator[Any]:
    """A class for huggingface_hub's progress that tells `watch`, or draws a bar on a terminal."""
    from tqdm.std import tqdm

    if watch is None and total > MUCH_BYTES:
        say(f"downloading {name}: {total / 1e9:.2f} GB")
    if watch is None:
        with _bar(name, total) as drawn, watching(name, total, drawn) as counting:
            yield counting
        return
    tell, done = watch, 0

    class Counting(tqdm):  # type: ignore[misc, type-arg]
        """Draws nothing; of the bars that count bytes, the one of what is written counts."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            self.counts = settings.get("unit") == "B" and settings.get("desc") != "Downloading bytes"
            super().__init__(*arguments, **{**settings, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            if self.counts:
                done += int(n or 0)
                tell(name, done, total)

    yield Counting


@contextlib.contextmanager
def _bar(name: str, total: int) -> Iterator[Watch]:
    if not sys.stderr.isatty():
        yield lambda what, done, all_of_it: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task(f"downloading {name}", total=total)
        yield lambda what, done, all_of_it: progress.update(task, completed=done)


def say(text: str) -> None:
    """A line for the user, on stderr."""
    sys.stderr.write(f"{text}\n")
