"""What every result says of where it came from: the code, the versions, the device, the command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bam_lora
from bam_lora.machine import environment

ROOT = Path(__file__).resolve().parents[2]
_RESULTS = "/results/"  # of the benchmarks themselves


def provenance_of(
    command: str, threads: int, *, allow_dirty: bool, device: str = "cpu", written: Sequence[str] = ()
) -> dict[str, Any]:
    """The environment, the command, and whether the tree had changes that are not in its commit.

    Args:
        command: How to get the result again.
        threads: OMP_NUM_THREADS of what is measured.
        allow_dirty: Measure a tree with uncommitted changes, and say so.
        device: As `bam_lora.machine.environment` takes it.
        written: Paths that the benchmark itself writes, beside its results: changes of them do not count.

    Raises:
        SystemExit: The tree has uncommitted changes, or the installed bam_lora is another tree's.
    """
    if Path(bam_lora.__file__).resolve().parents[1] != ROOT:
        sys.exit(f"error: bam_lora: expected the one in {ROOT}, found {bam_lora.__file__}; use this tree's environment")
    status = subprocess.check_output(["git", "-C", str(ROOT), "status", "--porcelain"], text=True)
    dirty = [line for line in status.splitlines() if not any(path in line for path in (_RESULTS, *written))]
    if dirty and not allow_dirty:
        sys.exit("error: uncommitted changes; commit them first, a result must name the code that gave it")
    return {**environment(device, threads), "command": command, "dirty": bool(dirty)}
