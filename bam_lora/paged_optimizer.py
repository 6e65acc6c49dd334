"""Paged optimizers of bitsandbytes in a process that trains one branch after another, and goes on from checkpoints.

Their state lies in memory that the driver moves between card and machine. Read from the code of bitsandbytes 0.50:
that memory is never freed, so every branch would leave behind as much as its state takes; and a state that was loaded
from a checkpoint lies in ordinary GPU memory, which a card that is nearly full does not have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

_MOMENTS = ("state1", "state2")
# Buffers of branches that are over, by shape, type and device, for the branches that come.
_free: dict[tuple[Any, ...], list[Any]] = defaultdict(list)


class PageState(TrainerCallback):  # type: ignore[misc]
    """Puts the moments that a checkpoint gave a paged optimizer where they would be had it made them itself."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Comes after the checkpoint is loaded and before the first step."""
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        if not getattr(optimizer, "is_paged", False):
            return
        for parameter, moments in optimizer.state.items():
            for name in _MOMENTS if parameter.device.type != "cpu" else ():
                value = moments.get(name)
                if value is None or getattr(value, "is_paged", False):
                    continue
                buffer = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                if getattr(buffer, "is_paged", False):  # small ones never are
                    moments[name] = buffer.copy_(value)


@contextmanager
def paged_state(trainer: Any) -> Iterator[None]:
    """Has a trainer's paged optimizer use the buffers of the branches before it, and hand its own on at the end.

    Other optimizers are left alone. No other trainer with a paged optimizer may work meanwhile.
    """
    if "paged" not in str(getattr(trainer.args, "optim", "")).lower():  # a name, or an enumeration's
        yield
        return
    from bitsandbytes import functional

    allocate, lent = functional.get_paged, []

    def get_paged(*shape: int, dtype: Any, device: Any) -> Any:
        key = (shape, dtype, str(device))
        buffer = _free[key].pop() if _free[key] else allocate(*shape, dtype=dtype, device=device)
        lent.append((key, buffer))
        return buffer

    functional.get_paged = get_paged
    trainer.add_callback(PageState())
    try:
        yield
    finally:
        functional.get_paged = allocate
        for key, buffer in lent:
            _free[key].append(buffer)
