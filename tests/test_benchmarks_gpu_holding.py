"""The GPU benchmark holds memory and counts it: with a GPU and an NVML that are only played."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_benchmarks_gpu import FOLDER, load

measuring, holding = load("measuring"), load("holding")


class FakeGpu:
    """Gives out memory in grains, and some of it to nobody."""

    def __init__(self, total: int, stuck_at: int = 0) -> None:
        self.left = total
        self.stuck_at = stuck_at

    def free(self) -> int:
        return self.left

    def take(self, size: int) -> None:
        self.left = max(self.stuck_at, self.left - size)


def test_the_holder_leaves_what_a_card_has() -> None:
    target = round((12 - holding.DESKTOP_GIB) * holding.GIB)
    gpu = FakeGpu(139 * holding.GIB)
    taken = holding.fill(gpu.free, gpu.take, target)
    assert target <= gpu.left < target + (2 << 20)
    assert taken == 139 * holding.GIB - gpu.left
    smaller = FakeGpu(8 * holding.GIB)
    assert holding.fill(smaller.free, smaller.take, target) == 0
    assert smaller.left == 8 * holding.GIB


def test_the_holder_says_when_memory_cannot_be_taken() -> None:
    gpu = FakeGpu(20 * holding.GIB, stuck_at=13 * holding.GIB)
    with pytest.raises(holding.CannotHold, match=r"expected 12,884,901,888 bytes free, found 13,958,643,712"):
        holding.fill(gpu.free, gpu.take, 12 * holding.GIB)


def test_the_holder_lives_as_long_as_its_context() -> None:
    with holding.Card(12, "cpu") as card:
        holder = card._holder
        assert holder.poll() is None
        assert card.facts == {"card_gib": 12, "free_bytes": None, "held_bytes": None}
    assert holder.returncode == 0
    with holding.Card(None, "cpu") as card:
        assert card._holder is None


def test_the_holder_ends_when_its_parent_is_killed() -> None:
    code = (
        "import holding, time\nwith holding.Card(12, 'cpu') as c:\n print(c._holder.pid, flush=True)\n time.sleep(60)"
    )
    environ = {**os.environ, "PYTHONPATH": str(FOLDER)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ) as parent:
        assert parent.stdout is not None
        holder = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    for _ in range(200):
        try:
            os.kill(holder, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{holder}/stat").exists() and Path(f"/proc/{holder}/stat").read_text().split()[2] == "Z":
            return  # ended, and nobody here to collect it
        time.sleep(0.05)
    pytest.fail("the holder is still there")


class FakeNvml:
    """NVML with one GPU of 100 bytes, of which so many are free."""

    def __init__(self) -> None:
        self.free = 90
        self.asked: list[Any] = []

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        self.asked.append(index.value)
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        self.asked.append(name)
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free, memory._obj.used = 100, self.free, 7
        return 0


def test_the_peak_is_what_the_driver_gave_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    nvml = FakeNvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    for name, value in (("max_memory_reserved", 11), ("memory_allocated", 5), ("max_memory_allocated", 6)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with measuring.DevicePeak("cuda") as peak:
        nvml.free = 60
        noted = peak.mark("full")
        nvml.free = 20
        time.sleep(0.1)  # seen by the sampler alone
        nvml.free = 80
    assert (peak.driver_bytes, peak.torch_bytes, peak.source) == (70, 11, "NVML")
    assert noted == {"name": "full", "driver_bytes": 30, "torch_allocated_bytes": 5, "torch_peak_bytes": 6}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    measuring.DevicePeak("cuda:0")
    assert nvml.asked == [3, b"GPU-1234"]


def test_on_a_cpu_the_peak_is_the_resident_set() -> None:
    with measuring.DevicePeak("cpu") as peak:
        held = bytearray(1 << 20)
        peak.mark("held")
    assert len(held) == 1 << 20
    assert peak.driver_bytes == peak.marks[0]["driver_bytes"] == measuring.peak_rss_bytes() > 1 << 25
    assert peak.torch_bytes is None


def test_steps_are_timed_with_what_is_around_them() -> None:
    begun: list[int] = []
    clock = measuring.step_clock("cpu", lambda: begun.append(1))
    clock.on_train_begin(None, None, None)
    for loss in (3.0, 2.0):
        time.sleep(0.02)
        clock.on_step_end(None, None, None)
        clock.on_log(None, None, None, logs={"loss": loss})
    clock.on_log(None, None, None, logs={"train_runtime": 1.0})
    assert begun == [1]
    assert clock.losses == [3.0, 2.0]
    assert all(0.02 <= seconds < 2 for seconds in clock.step_seconds)
