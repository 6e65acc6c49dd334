"""A folder for work that leaves nothing behind: not when it is stopped, and what a killed process left is found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bam_lora.scratch import remove_abandoned, scratch_folder

PREFIX = ".bam-lora-measure-"
# The child stands for the measured run: it works in the folder until somebody ends it.
CHILD = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(100)"
WORK = f"""
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
from pathlib import Path
from bam_lora.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1]), {PREFIX!r}) as folder:
    (folder / "large").write_text("x")
    subprocess.run([sys.executable, "-c", {CHILD!r}])
"""


def started(parent: Path) -> tuple[subprocess.Popen[str], int]:
    """A process that works in a folder of its own, and its child's number."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(parent)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def is_gone(number: int) -> bool:
    for _ in range(100):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_work_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process, child = started(tmp_path)
    assert [path.name.startswith(PREFIX) for path in tmp_path.iterdir()] == [True]
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert ("Interrupted: SIGTERM" if number == signal.SIGTERM else "KeyboardInterrupt") in said
    assert not list(tmp_path.iterdir())
    assert is_gone(child)


def test_what_a_killed_process_left_goes_and_what_another_holds_stays(tmp_path: Path) -> None:
    process, child = started(tmp_path)
    with scratch_folder(tmp_path, PREFIX):
        assert len(list(tmp_path.iterdir())) == 2
    process.kill()
    process.wait()
    os.kill(child, signal.SIGKILL)
    process.communicate()
    (left,) = tmp_path.iterdir()
    (tmp_path / "other").mkdir()
    assert remove_abandoned(tmp_path, PREFIX) == [left]
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_run_that_outlives_its_process_keeps_the_folder(tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / f"{PREFIX}a" / "run").mkdir(parents=True)
    (tmp_path / f"{PREFIX}a" / ".lock").touch()
    with FileLock(str(tmp_path / f"{PREFIX}a" / "run" / ".lock")):
        assert remove_abandoned(tmp_path, PREFIX) == []
    assert remove_abandoned(tmp_path, PREFIX) == [tmp_path / f"{PREFIX}a"]


def test_what_was_made_just_now_is_not_swept_before_it_is_locked(tmp_path: Path) -> None:
    folder = tmp_path / f"{PREFIX}new"
    folder.mkdir()
    assert remove_abandoned(tmp_path, PREFIX) == []
    old = time.time() - 3600
    os.utime(folder, (old, old))
    assert remove_abandoned(tmp_path, PREFIX) == [folder]


def test_the_handler_of_before_is_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with scratch_folder(tmp_path, PREFIX):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
