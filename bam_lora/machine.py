"""The machine and the software a run happens on."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from bam_lora.gpu_memory import empty_gpu_cache, gpu_peak_bytes

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt
# Of oneDNN's cache of compiled kernels, and of the one that torch keeps in front of it; each holds 1,024 by default.
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_FROZEN = 2_000  # objects, fewer than a program freezes that has imported nothing, 4,400 or more
_KERNELS_KEPT = 64  # more than a step needs of a batch of one length, which is about 40
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors",
            "huggingface_hub")  # fmt: skip


def environment(device: str, threads: int) -> dict[str, Any]:
    """What `environment.json` holds: versions, device, threads, platform and the command line."""
    from bam_lora import __version__

    return {
        "versions": {"bam_lora": __version__, **{name: metadata.version(name) for name in PACKAGES}},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "device": device,
        "threads": threads,
        "command": shlex.join(sys.argv),
        **_checkout(Path(__file__).resolve().parents[1]),
    }


def _checkout(folder: Path) -> dict[str, Any]:
    """Commit of the source, and whether it was changed, where the package runs from a git checkout."""
    if not (folder / ".git").exists():
        return {"commit": None, "dirty": None}
    try:
        commit, status = (
            subprocess.check_output(["git", "-C", str(folder), *arguments], text=True, stderr=subprocess.DEVNULL)
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):  # no git on this machine, or no commit yet
        return {"commit": None, "dirty": None}
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    import psutil

    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def peak_memory() -> dict[str, int | None]:
    """Peak memory in bytes: resident of this process so far, and of a stage torch's on a GPU (None without one)."""
    return {"peak_rss_bytes": peak_rss_bytes(), "peak_gpu_bytes": gpu_peak_bytes()}


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Has glibc take blocks of 4 MB and more from the system itself, and give them back when they are freed.

    Quantising on a CPU makes and frees several copies of each weight, between the small results that stay; in the heap
    the gaps add up to more than the whole model. Slower for tensors that come and go, so only as long as this lasts.
    """
    limit = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if limit is None:
        yield
        return
    limit(_MMAP_THRESHOLD, 4 << 20)
    try:
        yield
    finally:
        limit(_MMAP_THRESHOLD, 32 << 20)  # the most that glibc raises it to by itself


def bound_kernel_caches() -> None:
    """Has a CPU keep the last few compiled kernels, not 2,048: batches of ever new lengths need new ones anyway.

    They are one for every shape of a product, and up to two megabytes each. Must come before the first product in
    bfloat16; what the user has set stays.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(_KERNELS_KEPT))


def trim_heap() -> None:
    """Gives freed memory back to the system, where glibc would keep it: gigabytes after a branch on a CPU."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def release_memory() -> None:
    """Frees what nothing refers to any more; a quantised model is in cycles that only the collector finds."""
    gc.collect()
    trim_heap()
    empty_gpu_cache()


def holds_frozen_objects() -> bool:
    """Whether a program keeps objects from the garbage collector by `gc.freeze`.

    A collection of Python 3.12 counts as frozen what is immortal, too: 375 objects, libraries or none.
    """
    return gc.get_freeze_count() > _FROZEN


@contextmanager
def spared_collections() -> Iterator[None]:
    """Keeps the garbage collector from going through what is there already, again and again, as long as this lasts.

    The libraries are hundreds of thousands of objects: a full collection takes half a second, and there are several a
    branch. Enter it after they are imported and before a model is loaded: what is there now is not freed meanwhile,
    where it is in cycles.
    """
    if holds_frozen_objects():  # the program around us does so itself; to end it is its own business too
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def import_training_libraries() -> None:
    """Imports what loading a base and training a branch need, which would else come with the first of them."""
    import bitsandbytes  # noqa: F401
    from peft import LoraConfig  # noqa: F401
    from trl import SFTTrainer  # noqa: F401
