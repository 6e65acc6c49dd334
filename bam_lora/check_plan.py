"""The plan part of `bam-lora check`: what a run takes of memory and disk, beside what there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bam_lora.attention import PACKED, assumed_attention, choose_attention
from bam_lora.check_base import PlannedBase
from bam_lora.check_machine import Machine, free_disk
from bam_lora.check_tokens import training_tokens
from bam_lora.errors import UserError
from bam_lora.fit import left_free
from bam_lora.kernels import choose_kernels
from bam_lora.memory import Estimate, estimate, readable_bytes
from bam_lora.memory_disk import Disk, disk_estimate, steps_of_branch
from bam_lora.memory_host import Host, host_estimate
from bam_lora.memory_parts import Component
from bam_lora.recipe import Recipe

_LABEL = 12
_FIT = "bam-lora check RECIPE --fit chooses settings that fit"


@dataclass(frozen=True)
class Resources:
    """What a run takes, and what there is.

    Attributes:
        machine: What it is planned for.
        attention: What attention is computed by; None: transformers' own choice, sdpa for most models.
        kernels: The fused kernels of the branches, or None.
        model: Memory of the device that trains.
        host: Memory of the machine.
        disk: Disk below the run's folder.
        free_disk_bytes: What is free there.
        tokens: Training tokens of the whole run, or None if nothing says how many.
        steps: Optimizer steps of the whole run, or None.
        flops: Of the whole training, roughly, or None.
    """

    machine: Machine
    attention: str | None
    kernels: str | None
    model: Estimate
    host: Host
    disk: Disk
    free_disk_bytes: int
    tokens: int | None
    steps: int | None
    flops: float | None

    def problems(self) -> list[UserError]:
        """What cannot fit, each with the component that is too large and the remedy."""
        found = []
        machine, host, disk = self.machine, self.host, self.disk
        if not machine.unified and self.model.peak_bytes > machine.memory_bytes:
            largest = self.model.largest
            found.append(_too_much(f"memory of {machine.name}", machine.memory_bytes, self.model.peak_bytes, largest))
        if host.needed_bytes > machine.ram_bytes:
            found.append(_too_much("memory of this machine", machine.ram_bytes, host.needed_bytes, host.largest))
        if disk.peak_bytes + disk.download_bytes > self.free_disk_bytes:
            largest = max(disk.peak, key=lambda one: one.bytes)
            found.append(
                UserError.of(
                    "disk space for the run",
                    expected=f"{readable_bytes(disk.peak_bytes + disk.download_bytes)} free",
                    found=f"{readable_bytes(self.free_disk_bytes)}; {readable_bytes(largest.bytes)} are {largest.name}",
                    remedy="Free some space or choose another --output",
                )
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {
            "machine": self.machine.to_json(),
            "attention": self.attention,
            "kernels": self.kernels,
            "device_memory": self.model.to_json(),
            "ram": self.host.to_json(),
            "disk": {**self.disk.to_json(), "free_bytes": self.free_disk_bytes},
            "tokens": self.tokens,
            "steps": self.steps,
            "training_flops": self.flops,
            "problems": [str(error) for error in self.problems()],
        }

    def lines(self) -> list[str]:
        """Tables for the terminal, at most 80 columns wide."""
        lines = [] if self.machine.unified else _memory_table(self)
        lines += _ram_table(self)
        return [*lines, *_disk_table(self), *_time_lines(self)]


def plan_resources(recipe: Recipe, base: PlannedBase, machine: Machine, tokens: int | None = None) -> Resources:
    """What a run of a recipe takes of a machine.

    Args:
        recipe: The recipe.
        base: Its base.
        machine: Where it would run.
        tokens: Training tokens, if they are known; None: as the recipe's limits and files say.

    Raises:
        UserError: If the recipe asks for kernels that cannot be had here.
    """
    attention = planned_attention(recipe, base, machine)
    kernels = planned_kernels(recipe, base, machine)
    model = estimate(recipe, base.shape, attention=attention, device=machine.device, kernels=kernels)
    tokens = training_tokens(recipe, base.tokenizer) if tokens is None else tokens
    steps = None if tokens is None else recipe.slices * steps_of_branch(recipe, tokens)
    computed = 4 if recipe.quantization.compute_dtype == "float32" else 2
    host = host_estimate(
        model,
        device="cpu" if machine.unified else machine.device,
        file_bytes=base.weight_bytes,
        same_type=computed == base.shape.stored_dtype_bytes,
        compiled=computed == 2,
    )
    disk = disk_estimate(
        recipe, base.shape, model_bytes=base.weight_bytes, companion_bytes=base.companion_bytes, tokens=tokens,
        download_bytes=base.download_bytes,
    )  # fmt: skip
    flops = None if tokens is None else training_flops(recipe, base.shape.parameters, tokens)
    return Resources(machine, attention, kernels, model, host, disk, free_disk(recipe.output), tokens, steps, flops)


def planned_attention(recipe: Recipe, base: PlannedBase, machine: Machine) -> str | None:
    """What attention is computed by on a machine; None: transformers' own choice."""
    wanted, computed, shape = recipe.quantization.attention, recipe.quantization.compute_dtype, base.shape
    if machine.assumed and machine.device != "cpu":
        return assumed_attention(wanted, computed, newer=machine.bfloat16, packed=shape.packed, flash=shape.flash)
    return choose_attention(wanted, base.folder, computed, machine.device)


def planned_kernels(recipe: Recipe, base: PlannedBase, machine: Machine) -> str | None:
    """The fused kernels of the branches, or None.

    For a card that is not here nobody knows whether the package is there, too: without, a run takes more.
    """
    return None if machine.assumed else choose_kernels(recipe.training.kernels, base.folder, machine.device)


def training_flops(recipe: Recipe, parameters: int, tokens: int) -> float:
    """Operations of training, roughly: 2 a token and parameter forward, 2 backward as the base is frozen, 2 again."""
    passes = 6 if recipe.training.checkpointing else 4
    return passes * parameters * tokens * max(1.0, recipe.training.num_train_epochs)


def _too_much(what: str, there: int, needed: int, largest: Component) -> UserError:
    return UserError.of(
        what,
        expected=f"at least {needed / 2**30:.1f} GiB, {largest.bytes / 2**30:.1f} GiB of it {largest.name}",
        found=f"{there / 2**30:.1f} GiB",
        remedy=_FIT,
    )


def _memory_table(plan: Resources) -> list[str]:
    model, machine = plan.model, plan.machine
    free = left_free(machine.memory_bytes)
    tight = model.peak_bytes > machine.memory_bytes - free
    head = f"about {_gib(model.peak_bytes)} of {_gib(machine.memory_bytes)}, {machine.name} (estimate)"
    lines = [_line("GPU memory", head)]
    parts = model.phases
    for name in sorted(parts, key=lambda name: -_sum(parts[name])):  # the smaller one in a line
        lines.append(_title(f"{name}: {_gib(_sum(parts[name]))}"))
        lines += _rows(parts[name]) if len(lines) == 2 else []
    if machine.assumed and machine.bfloat16 and plan.attention == PACKED:
        lines.append(_line("note", "assumes a GPU from Ampere (RTX 30) on; an older one: --gpu-memory T4"))
    if tight and model.peak_bytes <= machine.memory_bytes:
        lines.append(_line("note", f"less than {_gib(free)} of the GPU's memory would be free; --fit leaves so much"))
    return lines


def _ram_table(plan: Resources) -> list[str]:
    host = plan.host
    head = f"about {_gib(host.peak_bytes)} at the peak, of {_gib(plan.machine.ram_bytes)} (estimate)"
    rows = [*host.components, host.mapped]
    lines = [_line("RAM", head), *_rows(rows)]
    if host.needed_bytes <= plan.machine.ram_bytes < host.peak_bytes:
        lines.append(_line("note", f"all but the base files has to fit, {_gib(host.needed_bytes)}: it does"))
    return lines


def _disk_table(plan: Resources) -> list[str]:
    disk = plan.disk
    peak, free, end = map(readable_bytes, (disk.peak_bytes, plan.free_disk_bytes, disk.end_bytes))
    head = f"at most {peak} of {free} free, {end} at the end"
    lines = [_line("disk", head)]
    if disk.download_bytes:
        lines.append(_title(f"and {readable_bytes(disk.download_bytes)} to download into the Hub's cache"))
    return lines + _rows(disk.peak, readable_bytes)


def _time_lines(plan: Resources) -> list[str]:
    if plan.flops is None:
        return [_line("time", "not known: the data has no limit in tokens")]
    return [_line("time", f"about {plan.flops / 1e15:,.3g} PFLOP of training; --measure gives hours")]


def _rows(parts: Sequence[Component], size: Any = None) -> list[str]:
    show = size or _gib
    return [f"    {one.name:20}{show(one.bytes):>10}  {one.reason}" for one in parts if one.bytes]


def _line(label: str, text: str) -> str:
    return f"{label:{_LABEL}}{text}"


def _title(text: str) -> str:
    return f"{'':{_LABEL}}{text}"


def _sum(parts: Sequence[Component]) -> int:
    return sum(one.bytes for one in parts)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
