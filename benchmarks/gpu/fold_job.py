"""Folding two adapters of rank 64 into a model, on the GPU and on the CPU, beside a plain copy of the same bytes.

    python benchmarks/gpu/fold_job.py SETTINGS.json

Times are of the calls, up to the last byte synced, with the base in the page cache as far as it fits, the GPU's
context and kernels warm. Then the two results are compared number by number.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inputs_place import folder_of
from job import job
from measuring import DevicePeak, is_cuda

WEIGHTS = [0.5, 0.5]
_BLOCK = 16 << 20  # bytes that are copied at once


def main(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Folds on the device, then on the CPU; `identical` is the share of numbers that are the same in both."""
    from bam_lora.base import weight_bytes
    from bam_lora.store import require_space

    root, device = folder_of(settings["shape"], Path(settings["work"])), settings["device"]
    base, adapters = root / "base", [root / "adapter-1", root / "adapter-2"]
    size = weight_bytes(base)
    work = Path(settings["work"]) / "fold"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        require_space(work, 2 * size + (1 << 20), "two folded models")
        read_once(base)
        copied = copy_seconds(base, work / "copy")
        shutil.rmtree(work / "copy")
        with DevicePeak(device) as peak:
            warm_up(device)
            on_device = folded(base, adapters, work / "device", device)
        on_cpu = folded(base, adapters, work / "cpu", "cpu")
        same = identical(work / "device", work / "cpu", device)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "bytes": size,
        "copy_seconds": copied,
        "device": device,
        "device_seconds": on_device,
        "cpu_seconds": on_cpu,
        "device_over_copy": on_device / copied,
        "peak_driver_bytes": peak.driver_bytes,
        "peak_torch_bytes": peak.torch_bytes,
        **same,
    }


def folded(base: Path, adapters: list[Path], output: Path, device: str) -> float:
    """Seconds to fold, the result on the disk."""
    from bam_lora.folding import fold

    os.sync()
    started = time.perf_counter()
    fold(base, adapters, output, weights=WEIGHTS, device=device)
    return time.perf_counter() - started


def copy_seconds(folder: Path, output: Path) -> float:
    """Seconds to read and write a folder's weight files plainly, each synced as soon as it is written."""
    os.sync()
    output.mkdir()
    buffer = memoryview(bytearray(_BLOCK))
    started = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as source, (output / path.name).open("wb", buffering=0) as target:
            while count := source.readinto(buffer):
                target.write(buffer[:count])
            os.fsync(target.fileno())
    return time.perf_counter() - started


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
