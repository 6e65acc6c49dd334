"""A call that may take only so long, whatever it waits for: names that do not resolve know no timeout of a request."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def in_time(call: Callable[[], Result], seconds: float) -> Result:
    """What a call returns, if it does so soon enough; otherwise it is left behind, and ends with the program.

    Args:
        call: Something without side effects.
        seconds: How long to wait.

    Raises:
        TimeoutError: If it took longer.
        Exception: What the call raised.
    """
    answers: queue.Queue[tuple[Result | None, Exception | None]] = queue.Queue()

    def answer() -> None:
        try:
            answers.put((call(), None))
        except Exception as error:  # handed on to whoever waits
            answers.put((None, error))

    threading.Thread(target=answer, daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:.0f} seconds") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # None is a result where there is no error
