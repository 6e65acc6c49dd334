"""A folder for work that leaves nothing behind where it is stopped; what a killed process left goes the next time."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from bam_lora.interrupt import raise_on_terminate

_LOCK = ".lock"
_YOUNG_SECONDS = 60.0  # another process may be about to lock what it has just made


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder for as long as the context lasts; Ctrl-C, SIGTERM and errors remove it, too.

    Folders of the same prefix that a killed process left there are removed first.

    Args:
        parent: Where it is made.
        prefix: What its name begins with: a name that is nobody else's.

    Raises:
        Interrupted: On SIGTERM (main thread only).
    """
    with raise_on_terminate():
        remove_abandoned(parent, prefix)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = FileLock(str(folder / _LOCK), timeout=0)
        try:
            lock.acquire()
            yield folder
        finally:
            lock.release()  # Windows removes no open file
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path, prefix: str) -> list[Path]:
    """Removes folders that no process holds any more.

    A run inside may outlive the process that made the folder: its lock counts as well.

    Returns:
        Those that were removed.
    """
    abandoned = [folder for folder in sorted(parent.glob(f"{prefix}*")) if folder.is_dir() and not _is_held(folder)]
    for folder in abandoned:
        shutil.rmtree(folder, ignore_errors=True)
    return abandoned


def _is_held(folder: Path) -> bool:
    try:
        locks = [folder / _LOCK, *folder.glob(f"*/{_LOCK}")]
        if not locks[0].exists() and time.time() - folder.stat().st_mtime < _YOUNG_SECONDS:
            return True
        for lock in locks:
            if lock.exists():
                with FileLock(str(lock), timeout=0):
                    pass
    except (Timeout, OSError):  # held; another user's; or gone by now
        return True
    return False
