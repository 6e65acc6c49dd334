"""The machine: its GPU, what a large bf16 product reaches on it, how fast its disk takes what is written.

python benchmarks/gpu/machine_job.py SETTINGS.json
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flops import peak_of
from job import job
from measuring import is_cuda, settle

_REPEATS = 10
_BLOCK = os.urandom(16 << 20)  # no disk can compress it


def main(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is there and what it reaches."""
    device = settings["device"]
    size = 8192 if is_cuda(device) else 256
    facts = gpu_facts() if is_cuda(device) else {"name": "CPU"}
    written = write_bytes_per_second(Path(settings["work"]), settings["disk_bytes"])
    return {
        **facts,
        "product_flops_per_second": product_flops_per_second(device, size),
        "stated_peak_flops_per_second": peak_of(facts["name"]),
        "write_bytes_per_second": written,
    }


def gpu_facts() -> dict[str, Any]:
    """Of the GPU that is used: name, memory, compute capability, and the versions that drive it."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "name": properties.name,
        "total_bytes": int(total),
        "free_bytes": int(free),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def product_flops_per_second(device: str, size: int) -> float:
    """What a product of two square bf16 matrices reaches, the first ones left out."""
    import torch

    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(2):
        left @ right
    settle(device)
    started = time.perf_counter()
    for _ in range(_REPEATS):
        left @ right
    settle(device)
    return 2.0 * size**3 * _REPEATS / (time.perf_counter() - started)


def write_bytes_per_second(folder: Path, size: int) -> float:
    """Plain writing of a new file, synced."""
    path = folder / "disk-speed"
    started = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(max(1, size // len(_BLOCK))):
                file.write(_BLOCK)
            os.fsync(file.fileno())
        return max(1, size // len(_BLOCK)) * len(_BLOCK) / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    job(main)
