"""The selection sets, parted by document: what is learned from, and what is only looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bam_lora.errors import UserError
from bam_lora.evaluate import Window
from bam_lora.scoring import Windowed

ROLES = ("target", "source")


@dataclass(frozen=True)
class SelectionWindows:
    """Windows of the selection sets by role: some to learn on, others held out to decide which step is kept."""

    train: Mapping[str, Sequence[Window]]
    held_out: Mapping[str, Sequence[Window]]


def split_selection(selection: Windowed, held_out: float, seed: int) -> SelectionWindows:
    """Splits the selection sets by document, so that no text is on both sides.

    Args:
        selection: Sets of both roles.
        held_out: Share of each role's documents to hold out; at least one is.
        seed: Of the shuffle.

    Raises:
        UserError: If a role has fewer than two documents.
    """
    parts: dict[str, dict[str, list[Window]]] = {"train": {}, "held_out": {}}
    for number, role in enumerate(ROLES):
        documents: dict[tuple[int, int], list[Window]] = {}
        for index, (part, windows) in enumerate(zip(selection.sets, selection.windows, strict=True)):
            for window in windows if part.role == role else ():
                documents.setdefault((index, window.document), []).append(window)
        if len(documents) < 2:
            raise UserError.of(
                f"selection.{role}",
                expected="at least two documents, one to learn from and one to check by",
                found=str(len(documents)),
                remedy="Name more text",
            )
        listed = list(documents.values())
        order = np.random.default_rng([seed, number]).permutation(len(listed))
        count = min(len(listed) - 1, max(1, round(held_out * len(listed))))
        parts["held_out"][role] = [window for i in order[:count] for window in listed[i]]
        parts["train"][role] = [window for i in order[count:] for window in listed[i]]
    return SelectionWindows(parts["train"], parts["held_out"])
