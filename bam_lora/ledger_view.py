"""A ledger's state at one iteration, as folding takes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bam_lora.dense_change import BranchWeight, DenseChange
from bam_lora.errors import UserError
from bam_lora.outline import LOW_RANK, Outline

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from bam_lora.ledger import Ledger


def require_factor(option: str, value: float) -> None:
    """Checks a λ or μ that the user gave.

    Raises:
        UserError: Naming the option, if the value is negative or not finite.
    """
    if not math.isfinite(value) or value < 0:
        raise UserError.of(option, expected="a number of at least 0", found=f"{value:g}", remedy="Try 0.8")


class LedgerView:
    """A ledger at one iteration, its own part scaled.

    Low-rank products are scaled as such. Where an own iteration has left a weight whole, the scaled weight is
    W + λ · (S - W), with W as this run found it and S as it is now.
    """

    def __init__(self, ledger: Ledger, upto: int, scale: float = 1.0) -> None:
        self.ledger = ledger
        self.upto = upto
        self.scale = scale

    def names(self) -> list[str]:
        """See `Ledger.names`."""
        return self.ledger.names(self.upto)

    def shape(self, name: str) -> tuple[int, int]:
        """See `Ledger.shape`."""
        return self.ledger.shape(name, self.upto)

    def rank(self, name: str) -> int:
        """See `Ledger.rank`."""
        return self.ledger.rank(name, self._products_upto(name))

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `Ledger.stacked`."""
        return self.ledger.stacked(name, self._products_upto(name), self.scale)

    def parts(self, name: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """See `Ledger.parts`."""
        return self.ledger.parts(name, self._products_upto(name), self.scale)

    def dense(self, name: str) -> DenseChange | None:
        """What takes a weight that this run has left whole towards it, or None: what is added is low rank."""
        if not self._is_between(name):
            return None
        value, stacked = self.ledger.start_value(name, self.upto), self.ledger.stacked(name, self.upto)
        assert value is not None, name
        return DenseChange(
            (BranchWeight(value=value if stacked is None else value + stacked[0] @ stacked[1]),), (self.scale,)
        )

    def outline(self, name: str) -> Outline:
        """A low-rank product, on whole weights where the ledger has some; scaled ones are whole themselves."""
        if self._is_between(name):
            return Outline(low_rank=False, cuttable=False, stored_rows=self.shape(name)[0], whole_share=self.scale)
        shape = self.ledger.snapshot_shape(name, self.upto)
        return LOW_RANK if shape is None else Outline(stored_rows=shape[0], whole_share=1.0)

    def start_value(self, name: str) -> torch.Tensor | None:
        """See `Ledger.start_value`."""
        return self.ledger.start_value(name, self._products_upto(name))

    def _is_between(self, name: str) -> bool:
        """Whether a weight is neither what this run found nor what it made, and not on a low-rank way either."""
        return self.scale != 1 and self.ledger.is_own_whole(name, self.upto)

    def _products_upto(self, name: str) -> int:
        return 0 if self._is_between(name) else self.upto
