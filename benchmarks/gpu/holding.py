"""Holds a GPU's memory down to a smaller card's: a process beside the one measured takes all the rest.

What is left free is the card's memory less what a desktop takes of it, so that the driver itself refuses more, and
everything counts: contexts, torch, what libraries allocate past it. The memory is free again when the context is left
or when the process that entered it dies, however it does: the holder lives as long as its standard input is open.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

GIB = 1 << 30
DESKTOP_GIB = 0.8
_GRAIN = 2 << 20  # what the driver gives out large blocks in multiples of
_READY_SECONDS = 120.0
_CLOSE_SECONDS = 30.0
_TRIES = 1000


class CannotHold(RuntimeError):
    """The memory could not be held."""


class Card:
    """A GPU with no more memory free than a card of `gib` has beside a desktop, as long as the context lasts.

    Attributes:
        facts: {"card_gib", "free_bytes", "held_bytes"}: what the driver then said was free and what was taken for it;
            both None on a CPU. A GPU that has less than that free is left as it is, which is the stricter test.
    """

    def __init__(self, gib: float | None, device: str) -> None:
        self.gib = gib
        self.device = device
        self.facts: dict[str, Any] = {"card_gib": gib, "free_bytes": None, "held_bytes": None}
        self._holder: subprocess.Popen[str] | None = None

    def __enter__(self) -> Card:
        if self.gib is not None:
            try:
                self.facts |= self._hold(round((self.gib - DESKTOP_GIB) * GIB))
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._release()

    def _hold(self, target_bytes: int) -> dict[str, Any]:
        command = [sys.executable, str(Path(__file__).resolve()), "--free", str(target_bytes), "--device", self.device]
        # Else torch would take blocks larger than those asked for and keep them.
        environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        self._holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ, process_group=0
        )
        assert self._holder.stdout is not None
        if not select.select([self._holder.stdout], [], [], _READY_SECONDS)[0]:
            self._holder.kill()
            raise CannotHold(f"the holder of the GPU's memory: expected it ready, found it busy for {_READY_SECONDS} s")
        said = self._holder.stdout.readline()
        try:
            facts: dict[str, Any] = json.loads(said)
        except ValueError:
            raise CannotHold(f"the holder of the GPU's memory: expected a line of JSON, found {said!r}") from None
        return facts

    def _release(self) -> None:
        if self._holder is None:
            return
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        try:
            self._holder.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._holder.kill()
            self._holder.wait()
        self._holder.stdout.close()
        self._holder = None


def fill(free: Callable[[], int], take: Callable[[int], object], target_bytes: int) -> int:
    """Takes memory until no more than the target is free, to 2 MiB; returns what it took.

    Args:
        free: Bytes that are free now.
        take: Takes so many bytes, and keeps them.
        target_bytes: What shall stay free.

    Raises:
        CannotHold: If taking does not bring it there.
    """
    taken = 0
    for _ in range(_TRIES):
        rest = (free() - target_bytes) // _GRAIN * _GRAIN
        if rest <= 0:
            return taken
        # In pieces: one block of all of it need not be there.
        block = min(rest, GIB)
        take(block)
        taken += block
    raise CannotHold(f"memory of the GPU: expected {target_bytes:,} bytes free, found {free():,} after {_TRIES} blocks")


def hold(target_bytes: int, device: str) -> dict[str, Any]:
    """Takes a GPU's memory for as long as this process lives; see `Card.facts`."""
    if device.partition(":")[0] != "cuda":
        return {"free_bytes": None, "held_bytes": None}
    import torch

    def free() -> int:
        return int(torch.cuda.mem_get_info()[0])

    def take(size: int) -> None:
        _held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))

    held = fill(free, take, target_bytes)
    return {"free_bytes": free(), "held_bytes": held}


_held: list[Any] = []


def main() -> None:
    """Holds, says so in a line of JSON, waits for the end of standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--free", type=int, required=True, help="bytes to leave free")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    facts = hold(options.free, options.device)
    print(json.dumps(facts), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
