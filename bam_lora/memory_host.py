"""Memory of the machine itself: the process with its libraries, its data, and on a CPU the model that is trained.

What counts is the peak of the resident set, as the system reports it, over the whole run. Part of it are pages of the
base's files, which the system takes back when it needs them: they are in the peak, but need no room of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bam_lora.memory import Estimate
from bam_lora.memory_parts import Component, total

LIBRARIES_BYTES = 600_000_000
"""Python, torch, transformers, TRL, PEFT, datasets: measured on Linux with the pinned versions."""
DATA_BYTES = 200_000_000
"""Reading and tokenising two million characters at a time: measured."""
KERNELS_BYTES = 230_000_000
"""What a CPU's compiled kernels take with caches of 64 (`machine.bound_kernel_caches`): measured."""
GPU_HOST_BYTES = 2_000_000_000
"""CUDA's libraries and driver in the host's memory, with pinned buffers: assumed."""
HEAP = 0.5
"""Freed blocks below 32 MB that glibc keeps, with gaps between them, as a share of what comes and goes: measured.

Activations fill the same places again at the next step, and leave no gaps that show.
"""


@dataclass(frozen=True)
class Host:
    """Memory of the machine: components at the peak, and pages of files that need no room of their own."""

    components: tuple[Component, ...]
    mapped: Component

    @property
    def peak_bytes(self) -> int:
        """The peak of the resident set."""
        return self.needed_bytes + self.mapped.bytes

    @property
    def needed_bytes(self) -> int:
        """What there must be room for."""
        return total(self.components)

    @property
    def largest(self) -> Component:
        """The component that takes most."""
        return max(self.components, key=lambda one: one.bytes)

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        sizes = {"peak_bytes": self.peak_bytes, "needed_bytes": self.needed_bytes}
        return {**sizes, "components": [vars(one) for one in (*self.components, self.mapped)]}


def host_estimate(
    model: Estimate, *, device: str, file_bytes: int, same_type: bool = True, compiled: bool = True
) -> Host:
    """Peak memory of the process.

    Args:
        model: What the device that trains needs.
        device: "cpu", where that is the process's own memory, or another.
        file_bytes: The base's weight files, mapped while they load, and on a CPU as long as the model is there.
        same_type: Whether the base computes in the type of its files: then its unquantised weights stay in them.
        compiled: Whether its products are oneDNN's, as they are in bfloat16.
    """
    process = [
        Component("libraries", LIBRARIES_BYTES, "torch, transformers, TRL, PEFT, datasets"),
        Component("data", DATA_BYTES, "reading, tokenising, packing"),
    ]
    mapped = Component("base files", file_bytes, "mapped; the system can take them back")
    if device != "cpu":
        driver = Component("GPU driver", GPU_HOST_BYTES, "in the host's memory; assumed")
        return Host((*process, driver), mapped)
    if compiled:
        process.append(Component("kernels", KERNELS_BYTES, "compiled by oneDNN, the last ones kept"))
    peaks = [[*process, *(_own(part) if same_type else part), _heap(part)] for part in model.phases.values()]
    return Host(tuple(max(peaks, key=total)), mapped)


def _own(parts: tuple[Component, ...]) -> list[Component]:
    """Without the unquantised weights: on a CPU they stay in the mapped file."""
    return [one for one in parts if one.name not in ("unquantised weights", "weights", "experts")]


def _heap(parts: tuple[Component, ...]) -> Component:
    moving = sum(one.bytes for one in parts if one.name in ("logits", "layer at work"))
    return Component("heap", round(HEAP * moving), f"freed blocks kept: {HEAP:.0%} of what moves")


def model_room(ram_bytes: int) -> int:
    """What of a machine's memory is left for a model that trains in it, heap included."""
    return max(0, round((ram_bytes - LIBRARIES_BYTES - DATA_BYTES - KERNELS_BYTES) / (1 + HEAP)))
