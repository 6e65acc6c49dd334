"""Peak memory as the driver counts it, and the time of every step; needs torch only, so that peers use it, too.

A process that trains enters `DevicePeak` before it first touches the GPU: its CUDA context is part of what it takes.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

INTERVAL_SECONDS = 0.02  # torch keeps what it has reserved: what is taken stays long enough to be seen
WARM_UP_STEPS = 2  # of a training: kernels are chosen and compiled
_NVML = ("libnvidia-ml.so.1", "/usr/local/nvidia/lib64/libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1")


class DevicePeak:
    """Peak memory of a device while the context lasts, less what others had taken of it before.

    On a GPU everything counts that the driver gives out anywhere on it: CUDA's context, what libraries allocate past
    torch, pages of paged optimizers. On a CPU it is the peak resident set of this process so far.

    Attributes:
        driver_bytes: The peak; final once the context is left.
        torch_bytes: The most that torch's allocator had reserved; None on a CPU.
        source: What was asked: "NVML", "torch.cuda.mem_get_info (without the context)" or "resident set".
        marks: What `mark` noted, in order.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.driver_bytes = 0
        self.torch_bytes: int | None = None
        self.marks: list[dict[str, Any]] = []
        self.source, self._used = _used_bytes(device)
        self._before = 0
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="device-peak", daemon=True)

    def __enter__(self) -> DevicePeak:
        if is_cuda(self.device):
            self._before = self._used()
            self._sampler.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if is_cuda(self.device):
            import torch

            self.torch_bytes = int(torch.cuda.max_memory_reserved())
            self._over.set()
            self._sampler.join()
        self._look()

    def mark(self, name: str) -> dict[str, Any]:
        """Notes what is taken now: {"name", "driver_bytes", "torch_allocated_bytes", "torch_peak_bytes"}.

        The last two are torch's allocated bytes now and their peak so far; both None on a CPU.
        """
        entry: dict[str, Any] = {"name": name, "torch_allocated_bytes": None, "torch_peak_bytes": None}
        if is_cuda(self.device):
            import torch

            torch.cuda.synchronize()
            entry["torch_allocated_bytes"] = int(torch.cuda.memory_allocated())
            entry["torch_peak_bytes"] = int(torch.cuda.max_memory_allocated())
        entry["driver_bytes"] = self._look()
        self.marks.append(entry)
        return entry

    def _look(self) -> int:
        taken = max(0, self._used() - self._before)
        self.driver_bytes = max(self.driver_bytes, taken)
        return taken

    def _sample(self) -> None:
        while not self._over.wait(INTERVAL_SECONDS):
            self._look()


def is_cuda(device: str) -> bool:
    """Whether a device's name is a CUDA GPU's: "cuda", "cuda:0"."""
    return device.partition(":")[0] == "cuda"


def _used_bytes(device: str) -> tuple[str, Callable[[], int]]:
    if not is_cuda(device):
        return "resident set", peak_rss_bytes
    nvml = _nvml_reader()
    if nvml is not None:
        return "NVML", nvml
    return "torch.cuda.mem_get_info (without the context)", _mem_get_info_used


def _mem_get_info_used() -> int:
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def _nvml_reader() -> Callable[[], int] | None:
    """Reads the bytes in use of the first visible GPU from NVML, which makes no CUDA context; None without it."""
    library = _library()
    if library is None:
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() != 0 or _nvml_handle(library, ctypes.byref(handle)) != 0:
        return None

    def used() -> int:
        memory = _Memory()
        status = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        if status != 0:
            raise RuntimeError(f"nvmlDeviceGetMemoryInfo: expected status 0, found {status}")
        return int(memory.total - memory.free)

    return used


def _library() -> Any:
    """NVML, wherever the driver has it: some containers do not tell the linker."""
    for name in _NVML:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _nvml_handle(library: Any, handle: Any) -> int:
    """NVML's status for the handle of the first of CUDA_VISIBLE_DEVICES: an index in PCI order, or an id."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    if first.isdigit():
        return int(library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(first)), handle))
    return int(library.nvmlDeviceGetHandleByUUID(first.encode(), handle))


def peak_rss_bytes() -> int:
    """Peak resident set of this process so far, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def settle(device: str) -> None:
    """Waits until all that was asked of a device is done."""
    if is_cuda(device):
        import torch

        torch.cuda.synchronize()


def step_clock(device: str, on_begin: Callable[[], object] = lambda: None) -> Any:
    """A transformers callback that times every optimizer step with what is done around it, the device settled.

    Args:
        device: That trains.
        on_begin: Called when training begins.

    Returns:
        A `TrainerCallback` with `step_seconds` and `losses`, one each step where the trainer logs every one.
    """
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.step_seconds: list[float] = []
            self.losses: list[float] = []
            self._since = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            on_begin()
            settle(device)
            self._since = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            settle(device)
            now = time.perf_counter()
            self.step_seconds.append(now - self._since)
            self._since = now

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return StepClock()
