"""Memory of the GPU: a lack of it as one clear line, its peak by stage, and the allocator's settings.

Importing it loads no torch; nothing here needs a GPU.
"""

from __future__ import annotations

import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from bam_lora.errors import UserError, first_line

# Of what is not torch's own class: a context that does not fit (AcceleratorError), cuBLAS's workspace, Metal, a CPU.
_SIGNS = ("out of memory", "status_alloc_failed", "can't allocate memory", "not enough memory")
_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_GROWING = "expandable_segments:True"
_SETTER = "_accelerator_setAllocatorSettings"  # of torch 2.11 to 2.13, which have no public one
# Each narrows what the next one sees; a GPU is chosen by the first that is set.
_VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")

# What is enough where a branch, or the learning of merge weights, does not fit: `rundir.recipe_key` lets all of it be
# changed on the way but what it calls for a new run.
LESS_TO_TRAIN = (
    "Close what else uses the card, then give the same command again; or with training.checkpointing on, or a lower "
    "training.per_device_train_batch_size and gradient_accumulation_steps higher by the same factor: the run goes on. "
    "A shorter data.sequence_length or a lower lora.r takes a new run (`bam-lora check RECIPE --fit` chooses)"
)
LESS_TO_SCORE = (
    "Close what else uses the card, then give the same command again; a lower evaluation.batch_size may be set on the "
    "way, a smaller evaluation.window_bytes takes a new run"
)

LESS_TO_LEARN_AGAIN = (
    "Close what else uses the card, then give the same command again: what is scored already is kept. A finished run "
    'keeps its settings, but with CUDA_VISIBLE_DEVICES="" before the command a CPU does it, slowly'
)


class OutOfMemory(UserError):
    """A step did not fit; what was finished before it is kept."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a GPU or the machine, was not enough."""
    if isinstance(error, OutOfMemory | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def room_for(what: str, remedy: str) -> Iterator[None]:
    """Turns a lack of memory inside into one line.

    Args:
        what: What is being done.
        remedy: What to do about it, without the closing full stop.

    Raises:
        OutOfMemory: In place of torch's own errors.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(UserError.of(what, expected="enough memory", found=_found(error), remedy=remedy))) from (
            error
        )


def _found(error: BaseException) -> str:
    """What was there: of a GPU how much of it is free now, else the first line of the error."""
    text = str(error).lower()
    module = _module()
    if module is None or "cpuallocator" in text or isinstance(error, MemoryError):
        return first_line(error).rstrip(".")
    try:
        free, total = module.mem_get_info()
    except RuntimeError:  # a card so full that not even its context fits
        return first_line(error).rstrip(".")
    held = module.memory_reserved()
    others = max(0, total - free - held)
    return (
        f"too little: of the GPU's {total / 2**30:.1f} GiB this run held {held / 2**30:.1f}, "
        f"CUDA itself and other programs {others / 2**30:.1f}"
    )


@contextmanager
def freed_after_errors(clear: Callable[[], None]) -> Iterator[None]:
    """Frees models when a stop or an error for the user ends what is inside.

    A notebook keeps the last traceback, and with it every local variable in it: the model of a run that was stopped
    would stay on the card beside that of the same run when it goes on.

    Args:
        clear: Drops what is not a local variable of a function that has ended, and empties the caches.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        one: BaseException | None = error
        while one is not None:
            traceback.clear_frames(one.__traceback__)
            one = one.__cause__ or one.__context__
        clear()
        raise


def _module() -> Any:
    """What torch has for the GPU's memory: CUDA's module (also ROCm's), or XPU's; None without such a GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda
    return torch.xpu if torch.xpu.is_available() else None


def empty_gpu_cache() -> None:
    """Gives back what torch keeps of a GPU's memory without using it."""
    import torch

    if (module := _module()) is not None:
        module.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def gpu_peak_bytes() -> int | None:
    """The most GPU memory that torch has held since `begin_gpu_peak`, in bytes; None without a GPU."""
    module = _module()
    return None if module is None else int(module.max_memory_reserved())


def begin_gpu_peak() -> None:
    """Has the peak counted from now on."""
    module = _module()
    if module is not None and module.is_initialized():  # before there are no figures to begin anew
        module.reset_peak_memory_stats()


def use_one_gpu() -> None:
    """Makes one GPU visible, the first of those that the user shows: branches train one after the other on one.

    TRL refuses to train where several are visible and no launcher was used. An empty value hides them all, and stays.
    Must come before CUDA is first used; afterwards it has no effect.
    """
    chosen = [name for name in _VISIBLE if name in os.environ]
    for name in chosen[-1:]:
        os.environ[name] = os.environ[name].split(",")[0].strip()
    if not chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"


def set_allocator() -> None:
    """Has torch's allocator on a GPU grow its segments, unless the user has set it up in some way.

    Batches differ in length, a base goes and the next one comes: in segments of fixed size the gaps add up, which on a
    small card is the difference between fitting and not. Only where torch's own tests have it on: Linux on x86-64,
    CUDA; under WSL2 some drivers fail at the first tensor. Must come before the first tensor on the GPU.

    torch reads the variable when CUDA is first used, which to ask for a card's name is enough for: later it is told.
    """
    if any(name in os.environ for name in _SETTINGS):
        return
    plain_linux = sys.platform.startswith("linux") and "microsoft" not in platform.release().lower()
    if plain_linux and platform.machine() == "x86_64" and "rocm" not in metadata.version("torch"):
        os.environ["PYTORCH_ALLOC_CONF"] = _GROWING
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized() and hasattr(torch._C, _SETTER):
            getattr(torch._C, _SETTER)(_GROWING)
