"""What torch allocates on a GPU while something runs: every block, when it comes and when it goes."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from allocator import CachingAllocator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Allocations(TorchDispatchMode):
    """Follows the storages on "cuda" that operations make, until the last tensor that uses one is gone.

    What a kernel takes for itself and gives back before it returns is not seen: cuBLAS's workspace, flash attention's
    sums in fp32.

    Attributes:
        stage: What is being done; blocks go by it.
        peak: Most bytes that were allocated at once since `begin`.
        at_peak: The same by stage.
        allocator: Torch's, in numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage = "start"
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.allocator = CachingAllocator()
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._now: Counter[str] = Counter()

    @property
    def allocated(self) -> int:
        """Bytes that are allocated now."""
        return self._now.total()

    def begin(self) -> None:
        """Counts the peaks anew from here on."""
        self.peak, self.at_peak = self.allocated, dict(self._now)
        self.allocator.begin()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in tree_iter(result):
            if isinstance(one, torch.Tensor) and one.device.type == "cuda":
                self._add(one.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage in self._known or not storage.nbytes():
            return
        self._known.add(storage)
        block = self.allocator.allocate(storage.nbytes())
        self._now[self.stage] += block.size
        weakref.finalize(storage, self._drop, block, self.stage)
        if self.allocated > self.peak:
            self.peak, self.at_peak = self.allocated, dict(self._now)

    def _drop(self, block: Any, stage: str) -> None:
        self._now[stage] -= block.size
        self.allocator.free(block)
