"""A file that one process at a time holds, so that two do not write the same output."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bam_lora.errors import UserError


@contextlib.contextmanager
def held(lock: Path, what: str) -> Iterator[None]:
    """Holds a lock file, which is gone afterwards; a killed process holds it no longer, though its file stays.

    Args:
        lock: The lock file; its folder must exist.
        what: What is locked, for the message.

    Raises:
        UserError: If another process (or thread) holds it.
    """
    taken = UserError.of(
        what, expected="no other process writing there", found="one that is running", remedy="Wait for it or stop it"
    )
    if os.name == "nt":  # where an open file cannot be deleted, so that no care is needed
        from filelock import FileLock, Timeout

        try:
            with FileLock(str(lock), timeout=0):
                yield
        except Timeout:
            raise taken from None
        return
    descriptor = _flock(lock)
    if descriptor is None:
        raise taken
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: whoever waits for this file then sees that it is gone
        os.close(descriptor)


def _flock(lock: Path) -> int | None:
    """A descriptor of the file at `lock`, locked, or None if it is locked already."""
    import fcntl  # not on Windows

    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and lock.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:  # deleted between the two looks
            pass
        os.close(descriptor)  # its holder deleted it meanwhile: a lock on it keeps nobody out
