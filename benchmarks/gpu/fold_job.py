"""Folding two adapters of rank 64 into a model, on the GPU and on the CPU, beside a plain copy of the same bytes.

    python benchmarks/gpu/fold_job.py SETTINGS.json

Times are of the calls, up to the last byte synced, with the base in the page cache as far as it fits, the GPU's
context and kernels warm. The first file is copied again after the GPU's fold: a disk may be faster where it has been
written to before, or slower once its cache is full. The fold is held against the faster of the two. Then both results
are compared number by number; where the disk has no room for both, the CPU's is written to memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inputs_place import folder_of
from job import job
from measuring import DevicePeak, is_cuda

from bam_lora.store import require_space

WEIGHTS = [0.5, 0.5]
MEMORY = Path("/dev/shm")
_BLOCK = 16 << 20  # bytes that are copied at once


def main(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Folds on the device, then on the CPU; `identical` is the share of numbers that are the same in both."""
    from bam_lora.base import weight_bytes

    root, device = folder_of(settings["shape"], Path(settings["work"])), settings["device"]
    base, adapters = root / "base", [root / "adapter-1", root / "adapter-2"]
    size = weight_bytes(base)
    work = Path(settings["work"]) / "fold"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        require_space(work, size + (1 << 20), "a folded model")
        shards = sorted(base.glob("*.safetensors"))
        read_once(base)
        copied = copy_seconds(shards, work / "copy")
        with DevicePeak(device) as peak:
            warm_up(device)
            on_device = folded(base, adapters, work / "device", device)
        again = copy_seconds(shards[:1], work / "copy") * size / shards[0].stat().st_size
        second = place_for(size, work)
        on_cpu = folded(base, adapters, second / "cpu", "cpu")
        same = identical(work / "device", second / "cpu", device)
    finally:
        for folder in (work, *_in_memory):
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "bytes": size,
        "copy_seconds": copied,
        "copy_again_seconds": again,  # as if all had been copied again
        "device": device,
        "device_seconds": on_device,
        "cpu_seconds": on_cpu,
        "cpu_wrote_to": "disk" if second == work else "memory",
        "device_over_copy": on_device / min(copied, again),
        "peak_driver_bytes": peak.driver_bytes,
        "peak_torch_bytes": peak.torch_bytes,
        **same,
    }


_in_memory: list[Path] = []  # folders to be deleted


def place_for(size: int, work: Path) -> Path:
    """A folder for a second model: the same, or one in memory if the disk has no room and the memory has."""
    if shutil.disk_usage(work).free < size + (1 << 20) and MEMORY.is_dir():
        require_space(MEMORY, size + (1 << 20), "a second folded model")
        _in_memory.append(Path(tempfile.mkdtemp(dir=MEMORY)))
        return _in_memory[-1]
    return work


def folded(base: Path, adapters: list[Path], output: Path, device: str) -> float:
    """Seconds to fold, the result on the disk."""
    from bam_lora.folding import fold

    os.sync()
    started = time.perf_counter()
    fold(base, adapters, output, weights=WEIGHTS, device=device)
    return time.perf_counter() - started


def copy_seconds(paths: Sequence[Path], output: Path) -> float:
    """Seconds to read and write files plainly, each synced as soon as it is written; the copies are deleted then."""
    os.sync()
    output.mkdir()
    buffer = memoryview(bytearray(_BLOCK))
    started = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as source, (output / path.name).open("wb", buffering=0) as target:
            while count := source.readinto(buffer):
                target.write(buffer[:count])
            os.fsync(target.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    return seconds


def read_once(folder: Path) -> None:
    """Reads every file, so that all find it in the page cache."""
    buffer = bytearray(_BLOCK)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def warm_up(device: str) -> None:
    """Has a GPU's context and its matrix kernels made before they are timed."""
    if is_cuda(device):
        import torch

        ones = torch.ones(256, 256, device=device)
        torch.addmm(ones, ones, ones)
        torch.cuda.synchronize()


def identical(first: Path, second: Path, device: str) -> dict[str, Any]:
    """{"elements", "different", "identical"} of all tensors of two models, bit by bit."""
    import torch
    from safetensors import safe_open

    elements = different = 0
    for path in sorted(first.glob("*.safetensors")):
        with safe_open(path, framework="pt") as one, safe_open(second / path.name, framework="pt") as other:
            assert set(one.keys()) == set(other.keys()), path.name
            for name in one.keys():  # noqa: SIM118 - a safe_open is no mapping
                a, b = (part.get_tensor(name).to(device).view(torch.int16) for part in (one, other))
                elements += a.numel()
                different += int((a != b).sum())
    return {"elements": elements, "different": different, "identical": 1 - different / elements}


if __name__ == "__main__":
    job(main)
