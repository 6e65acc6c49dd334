"""What the machine that a run is planned for has: the device that trains, its memory, RAM, disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.base import device
from bam_lora.cards import Card
from bam_lora.compute_types import has_bfloat16

_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        device: What trains: "cuda", "cpu", "mps", ...
        name: Of the device, in words.
        memory_bytes: Of the device; on a CPU and on a Mac the machine's own.
        ram_bytes: The machine's own, or what its container may use.
        assumed: Whether the device is only assumed (`--gpu-memory`).
        bfloat16: Whether it computes in bfloat16 itself.
    """

    device: str
    name: str
    memory_bytes: int
    ram_bytes: int
    assumed: bool = False
    bfloat16: bool = True

    @property
    def unified(self) -> bool:
        """Whether the device that trains has no memory of its own."""
        return self.device in ("cpu", "mps")

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        return dict(vars(self))


def find_machine(card: Card | None = None) -> Machine:
    """This machine; with `card`, as if it had such a GPU."""
    ram = ram_bytes()
    if card is not None:
        name = f"a {card.name or 'GPU'} with {card.memory_bytes / 2**30:.3g} GiB"
        return Machine("cuda", name, card.memory_bytes, ram, assumed=True, bfloat16=card.bfloat16)
    where = device()
    if where in ("cuda", "xpu"):
        import torch

        properties = getattr(torch, where).get_device_properties(0)
        return Machine(where, properties.name, int(properties.total_memory), ram, bfloat16=has_bfloat16())
    return Machine(where, "this machine's CPU" if where == "cpu" else where, ram, ram)


def ram_bytes() -> int:
    """The machine's memory, or what a container leaves of it."""
    import psutil

    total = int(psutil.virtual_memory().total)
    try:
        limit = _CGROUP.read_text(encoding="utf-8").strip()
    except OSError:  # not Linux, or no container
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def free_disk(output: str) -> int:
    """Free bytes where a run's folder is or will be."""
    path = Path(output).expanduser().absolute()
    return shutil.disk_usage(path if path.exists() else folder_beside(output)).free


def folder_beside(output: str) -> Path:
    """The folder that a run's is or will be in, or the nearest one above it that is there."""
    path = Path(output).expanduser().absolute()
    return next(one for one in path.parents if one.is_dir())
