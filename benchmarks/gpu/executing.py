"""Runs one job as a process of its own, with a time limit, and takes its result from the last line that it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

_END_SECONDS = 10.0
_LONGEST = 500  # characters of a reason
_TAIL = 4000  # characters of a log that are kept


class Failed(Exception):
    """A job gave no result; the message is one line.

    Attributes:
        log: The end of what it complained of.
        late: Whether it was ended because its time was over.
    """

    def __init__(self, message: str, log: str = "", *, late: bool = False) -> None:
        super().__init__(message)
        self.log = log
        self.late = late


def execute(
    python: str, script: Path, settings: Mapping[str, Any], work: Path, *, seconds: float, environ: Mapping[str, str]
) -> dict[str, Any]:
    """Runs `python script SETTINGS.json`, ended with all its children when the time is over.

    Args:
        python: The interpreter.
        script: A job's script.
        settings: What it is given.
        work: Where its settings and what it says are kept: `job.json`, `job.out`, `job.log`.
        seconds: It is ended after so many.
        environ: Its environment.

    Returns:
        Its result, with the seconds it took as "wall_seconds".

    Raises:
        Failed: If it ends otherwise than with a result.
    """
    work.mkdir(parents=True, exist_ok=True)
    file, out, log = (work / f"job.{end}" for end in ("json", "out", "log"))
    file.write_text(json.dumps(settings), encoding="utf-8")
    started = time.perf_counter()
    status, late = _status([python, str(script), str(file)], out, log, seconds, environ)
    try:  # whatever comes after its result, such as the driver's tidying up, takes nothing from it
        found = last_line(out)
    except Failed as error:
        if late or status:
            how = f"not done after {seconds:.0f} s" if late else f"exit status {status}"
            raise Failed(f"{how}; {reason(log)}", tail(log), late=late) from None
        raise Failed(str(error), tail(log)) from None
    return {**found, "wall_seconds": time.perf_counter() - started, **({"exit_status": status} if status else {})}


def _status(
    command: list[str], out: Path, log: Path, seconds: float, environ: Mapping[str, str]
) -> tuple[int | None, bool]:
    """Runs a command in a process group of its own; returns its exit status, and whether its time was over."""
    late = False
    with out.open("w") as said, log.open("w") as complained:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=complained, env=dict(environ), process_group=0
        )
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end(child)
    return child.returncode, late


def last_line(out: Path) -> dict[str, Any]:
    """The result that a job printed.

    Raises:
        Failed: If its last line is none.
    """
    lines = [line for line in out.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    try:
        found = json.loads(lines[-1], parse_constant=_refuse)
    except (IndexError, ValueError) as error:
        raise Failed(f"its last line: expected JSON, found {lines[-1][:80]!r} ({error})" if lines else "it said nothing"
                     ) from None  # fmt: skip
    if not isinstance(found, dict):
        raise Failed(f"its last line: expected a JSON object, found {lines[-1][:80]!r}")
    return found


def reason(log: Path) -> str:
    """The last line of what a job complained of, of a chained error the one that says most."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    memory = [line for line in lines if "out of memory" in line.lower() or "OutOfMemoryError" in line]
    return (memory or lines or ["it said nothing"])[-1][:_LONGEST]


def tail(log: Path) -> str:
    """The end of what a job complained of: a traceback, from a machine that may be gone when it is read."""
    return log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends a job's whole process group, which may hold children that outlive it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        if child.poll() is not None and number == signal.SIGTERM:
            time.sleep(0.1)  # its children get as long
    child.wait()
