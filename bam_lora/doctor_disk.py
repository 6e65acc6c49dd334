"""Memory, disk space and what the file system can do, for `bam-lora doctor`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bam_lora.doctor_finding import NOTE, OK, PROBLEM, Finding, gigabytes
from bam_lora.errors import UserError, first_line
from bam_lora.lock_file import held
from bam_lora.store import fsync_path, write_text

_LITTLE_MEMORY_BYTES = 8e9  # loading a 7 B model in 4 bits and folding it take less, the system wants some too
_LITTLE_SPACE_BYTES = 20e9  # two folded 3-4 B models, adapters, checkpoints
_NO_SPACE_BYTES = 2e9


def memory() -> Iterator[Finding]:
    """Main memory."""
    import psutil

    from bam_lora.check_machine import ram_bytes

    total = ram_bytes()  # a container may have less than the machine
    available = min(int(psutil.virtual_memory().available), total)
    text = f"{gigabytes(available)} of {gigabytes(total)} free"
    if available < _LITTLE_MEMORY_BYTES:
        yield Finding("memory", NOTE, text, "Close other programs before a run with a model of 7 B or more")
    else:
        yield Finding("memory", OK, text)


def space(folder: Path) -> Iterator[Finding]:
    """Free space where runs are written, and where the Hub's files go."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    for what, place, remedy in (
        ("runs", folder, "Run in another folder, or with --output there"),
        ("Hub cache", cache, "Set HF_HOME to a folder with more space"),
    ):
        free = shutil.disk_usage(_existing(place)).free
        text = f"{what} in {place}: {gigabytes(free)} free"
        if free < _NO_SPACE_BYTES:
            yield Finding("disk", PROBLEM, text, remedy)
        elif free < _LITTLE_SPACE_BYTES:
            yield Finding("disk", NOTE, f"{text}, little for a model of 3 B or more", remedy)
        else:
            yield Finding("disk", OK, text)


def files(folder: Path) -> Iterator[Finding]:
    """Writes, syncs, renames and locks a file, where runs are written and in the Hub's cache."""
    from huggingface_hub import constants

    yield _try_files(folder, "Run in a folder of your own, on a local disk")
    cache = _existing(Path(constants.HF_HUB_CACHE))
    if not os.access(cache, os.W_OK):
        yield Finding(
            "files",
            NOTE,
            f"{cache}: not yours to write, so nothing can be downloaded",
            "Set HF_HOME to a folder of yours",
        )


def _try_files(folder: Path, remedy: str) -> Finding:
    step = "write"
    try:
        with tempfile.TemporaryDirectory(prefix=".bam-lora-doctor-", dir=folder) as made:
            place = Path(made)
            write_text(place / "file", "1")
            step = "rename over a file that is there"
            write_text(place / "file", "2")
            step = "sync"
            fsync_path(place / "file")
            fsync_path(place)
            step = "lock a file"
            with held(place / "lock", "the doctor's file"):
                pass
    except (OSError, UserError) as error:
        return Finding("files", PROBLEM, f"{folder}: cannot {step}: {first_line(error)}", remedy)
    return Finding("files", OK, f"{folder}: write, rename, sync and lock work")


def _existing(place: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
