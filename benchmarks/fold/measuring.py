"""Whole processes, timed to the last byte on the disk, their memory sampled from outside (Linux).

Anonymous memory is what a process cannot do without; file-backed memory is mapped files, which the kernel can drop and
read again. Both are summed over the process and its children, every 20 ms.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

INTERVAL_SECONDS = 0.02
_KINDS = {"RssAnon:": "anonymous", "RssShmem:": "anonymous", "RssFile:": "file"}  # shared memory has no file either
_READ_BYTES = 1 << 24
_SHOWN_LINES = 6


class Failed(Exception):
    """A measured process ended with an error; the message is the end of what it said."""


def measure(
    command: Sequence[str], log: Path, *, environ: Mapping[str, str], written: Path | None = None
) -> dict[str, Any]:
    """Runs a command and syncs what it wrote.

    Args:
        command: Program and arguments.
        log: File for what it says.
        environ: Its whole environment.
        written: The folder that it writes; syncing every file in it is part of the time.

    Returns:
        {"seconds", "sync_seconds", "peak_anonymous_bytes", "peak_file_bytes"}; the sync is part of `seconds`.

    Raises:
        Failed: If the command ended with an error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=dict(environ)
        )
        with MemorySampler(process.pid) as memory:
            process.wait()
        ended = time.perf_counter()
    if process.returncode != 0:
        raise Failed(f"exit status {process.returncode}: {last_lines(log)}")
    if written is not None:
        sync_folder(written)
    finished = time.perf_counter()
    return {"seconds": finished - started, "sync_seconds": finished - ended, **memory.peaks}


class MemorySampler:
    """Samples the memory of a process and its children in a thread, while the `with` block waits for it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peaks = {"peak_anonymous_bytes": 0, "peak_file_bytes": 0}

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.is_set():
            total = {"anonymous": 0, "file": 0}
            for pid in process_tree(self._pid):
                for kind, count in resident_bytes(pid).items():
                    total[kind] += count
            for kind, count in total.items():
                key = f"peak_{kind}_bytes"
                self.peaks[key] = max(self.peaks[key], count)
            self._over.wait(INTERVAL_SECONDS)


def process_tree(pid: int) -> list[int]:
    """A process and all below it; those that end meanwhile are left out."""
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        for task in _listed(f"/proc/{one}/task"):
            waiting += [int(child) for child in _text(f"/proc/{one}/task/{task}/children").split()]
    return found


def resident_bytes(pid: int) -> dict[str, int]:
    """{"anonymous", "file"}: what a process holds in memory now; zeros once it is gone."""
    result = {"anonymous": 0, "file": 0}
    for line in _text(f"/proc/{pid}/status").splitlines():
        key, *values = line.split()
        if key in _KINDS:
            result[_KINDS[key]] += int(values[0]) * 1024
    return result


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return []


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return ""


def sync_folder(folder: Path) -> None:
    """Has every file and folder of a tree on the disk, whoever wrote it."""
    for directory, _, files in os.walk(folder):
        for name in [*files, "."]:
            handle = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def warm(folders: Iterable[Path]) -> None:
    """Reads every file once, so that each contender finds its inputs in the page cache, as far as they fit."""
    buffer = bytearray(_READ_BYTES)
    for path in (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def last_lines(log: Path) -> str:
    """The end of a log, on one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-_SHOWN_LINES:]) or "it said nothing"
