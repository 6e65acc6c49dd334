"""What is known of a weight's change without reading a number of it: enough to find its place in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bam_lora.adapter_entries import Entry


@dataclass(frozen=True)
class Outline:
    """The kind of a change, from headers alone.

    Attributes:
        low_rank: Whether it is a low-rank product added to the weight's start value.
        by_element: Whether a method that works element by element merges it.
        cuttable: Whether it can be cut or transposed as the storage demands: only deltas from factors can.
        highest_row: The highest row trained as such, or None.
        rows_alone: Whether such rows are all that the branches do.
        stored_rows: The rows of a weight given whole, or None.
        whole_share: The sum of the merge weights of the branches that give the weight whole.
        adds_to_whole: Whether a branch gives the weight whole, and a delta for it.
    """

    low_rank: bool = True
    by_element: bool = False
    cuttable: bool = True
    highest_row: int | None = None
    rows_alone: bool = False
    stored_rows: int | None = None
    whole_share: float = 0.0
    adds_to_whole: bool = False

    @property
    def last_row(self) -> int | None:
        """The highest row trained as such, where that is all that the branches do; else None."""
        return self.highest_row if self.rows_alone else None


LOW_RANK = Outline()


def outline_of(entries: Sequence[Entry | None], weights: Sequence[float], *, by_element: bool) -> Outline:
    """The outline of K branches' merged change of one weight.

    Args:
        entries: What each branch's adapter holds for it, or None.
        weights: (K,) the branches' weights.
        by_element: Whether the merge method works element by element.
    """
    present = [entry for entry in entries if entry is not None]
    whole = [entry for entry in present if entry.value is not None]
    rows = [entry.tokens for entry in present if entry.tokens is not None]
    rows_alone = all(one.tokens and one.low_rank is None and one.value is None for one in present)
    shares = (weight for entry, weight in zip(entries, weights, strict=True) if entry is not None and entry.value)
    return Outline(
        low_rank=not by_element and all(entry.is_low_rank and entry.value is None for entry in present),
        by_element=by_element,
        cuttable=not (whole or rows) and all(entry.magnitude is None for entry in present),
        highest_row=max((max(one.indices, default=0) for one in rows), default=None),
        rows_alone=rows_alone,
        stored_rows=whole[0].value_shape[0] if whole else None,
        whole_share=math.fsum(shares),
        adds_to_whole=any(entry.low_rank is not None for entry in whole),
    )
