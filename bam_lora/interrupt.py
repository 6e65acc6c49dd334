"""Ctrl-C and SIGTERM: the first asks the run to stop at the next safe place, a second Ctrl-C stops it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bam_lora.errors import Interrupted


class StopRequest:
    """Whether somebody has asked the run to stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def check(self) -> None:
        """Raises `Interrupted` if a stop was asked for; called between steps that leave whole artefacts."""
        if self:
            raise Interrupted(self.signal_name)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a request, for as long as the context lasts (main thread only)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal_name = signal.Signals(number).name
        # Not print: a signal may come in the middle of another write.
        os.write(2, b"\nstopping at the next safe place; Ctrl-C again stops at once\n")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def raise_on_terminate() -> Iterator[None]:
    """SIGTERM raises `Interrupted`, as Ctrl-C raises KeyboardInterrupt, for as long as the context lasts.

    For work that has no safe place to stop at but leaves something to clear away (main thread only).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # clearing away is not broken off by a second one
        raise Interrupted(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
