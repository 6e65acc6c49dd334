"""Several adapters as one: Σ wₖ·scalingₖ·BₖAₖ exactly, stacked along the rank, never A and B averaged apart."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bam_lora.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter
from bam_lora.checkpoint import TOKENIZER, local_folder, same_base
from bam_lora.coefficients import Coefficients, gram, stack
from bam_lora.dense_change import Blocks, BranchWeight, Combine, DeltaOf, DenseChange
from bam_lora.dense_methods import DENSE_METHODS, DenseOptions, check_options, prepare
from bam_lora.errors import UserError
from bam_lora.fold_blocks import exact_products, row_ranges
from bam_lora.merge_methods import METHODS, find_method, linear
from bam_lora.merge_statistics import merge_statistics
from bam_lora.merge_weights import resolve_weights
from bam_lora.outline import Outline, outline_of

__all__ = [
    "METHODS",
    "Coefficients",
    "MergedAdapters",
    "find_method",
    "gram",
    "linear",
    "merge_statistics",
    "resolve_weights",
    "stack",
]

_ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER)


class MergedAdapters:
    """The deltas of K adapters under one merge method: what `fold_into` adds and `merge_adapters` writes.

    `by_element`: whether the method works element by element, so that no result of it is a low-rank product.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        method: str = "linear",
        options: DenseOptions | None = None,
        by_name: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """`by_name` has other weights for some of the deltas."""
        _check_shapes(adapters)
        self.adapters = list(adapters)
        self.weights = list(weights)
        self._by_name = by_name or {}
        self.method = method
        self.options = options or DenseOptions()
        self.by_element = method in DENSE_METHODS
        if self.by_element:
            check_options(method, self.options)
        self._method = linear if self.by_element else find_method(method)

    def names(self) -> list[str]:
        """All weights that at least one adapter changes, sorted."""
        return sorted({name for adapter in self.adapters for name in adapter.names})

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i) of a weight in `names()`."""
        entries = [entry for adapter in self.adapters if (entry := adapter.entry(name))]
        whole = [entry for entry in entries if entry.low_rank or entry.value]
        return max((entry.shape for entry in whole or entries), key=lambda shape: shape[0])

    def rank(self, name: str) -> int:
        """R of a weight in `names()`: the sum of the ranks of the adapters that change it."""
        return sum(adapter.rank(name) for adapter in self.adapters if name in adapter)

    def weights_of(self, name: str) -> Sequence[float]:
        """The branches' weights for one of `names()`."""
        return self._by_name.get(name, self.weights)

    def coefficients(self, name: str) -> Coefficients:
        """What the method chooses for one weight."""
        return self._method([adapter.factors(name) for adapter in self.adapters], self.weights_of(name))

    def all_coefficients(self) -> dict[str, Coefficients]:
        """What the method chooses, by weight name, where the result is a low-rank product."""
        return {name: self.coefficients(name) for name in self.names() if not self.is_dense(name)}

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(B_oR, A_Ri) in fp32 of the merged delta, None where it is no low-rank product."""
        return None if self.is_dense(name) else self.product(name)

    def product(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(B_oR, A_Ri) in fp32 of the merged low-rank deltas, whatever else the adapters hold for the weight."""
        assert not self.by_element, self.method
        factors = [adapter.factors(name) for adapter in self.adapters]
        return stack(factors, self._method(factors, self.weights_of(name)))

    def delta(self, name: str) -> torch.Tensor:
        """(o, i) in fp32: the low-rank deltas of a weight merged by a method that works element by element."""
        factors = [adapter.factors(name) for adapter in self.adapters]
        branches = tuple(None if one is None else BranchWeight(factors=one) for one in factors)
        rows, columns = self.shape(name)

        def zeros() -> Iterator[tuple[int, torch.Tensor]]:
            return ((first, torch.zeros(count, columns)) for first, count in row_ranges(rows, columns))

        with exact_products():
            weights = tuple(self.weights_of(name))
            resolve = DenseChange(branches, weights, functools.partial(self._prepare, weights)).bind(zeros, name)
            return torch.cat([resolve(block, first) for first, block in zeros()])

    def is_dense(self, name: str) -> bool:
        """Whether the merged change of a weight is no low-rank product."""
        return not self.outline(name).low_rank

    def outline(self, name: str) -> Outline:
        """The kind of a weight's merged change, from the headers alone."""
        entries = [adapter.entry(name) for adapter in self.adapters]
        return outline_of(entries, self.weights_of(name), by_element=self.by_element)

    def dense(self, name: str) -> DenseChange | None:
        """The merged change of a weight that is no low-rank product, else None.

        Raises:
            UserError: If the method is not defined for it.
        """
        if not self.is_dense(name):
            return None
        if not self.by_element and self.method != "linear":
            raise UserError.of(
                f"merge method {self.method!r} on {name!r}",
                expected="deltas that are products of two factors",
                found="DoRA, a whole weight or rows of one",
                remedy="Use linear, or a method that works element by element, such as ties",
            )
        branches = tuple(branch_weight(adapter, name) for adapter in self.adapters)
        weights = tuple(self.weights_of(name))
        return DenseChange(branches, weights, functools.partial(self._prepare, weights) if self.by_element else None)

    def _prepare(self, weights: Sequence[float], identity: str, delta_of: DeltaOf, blocks: Blocks) -> Combine:
        """The first phase of a method that works element by element: its passes over the deltas."""

        def deltas(branch: int) -> Iterator[torch.Tensor]:
            return (delta_of(branch, rows, first) for first, rows in blocks())

        return prepare(self.method, identity, deltas, len(self.adapters), weights, self.options)

    def start_value(self, name: str) -> torch.Tensor | None:
        """None: the delta is added to the base as it is."""
        return None

    def statistics(self) -> dict[str, Any]:
        """The statistics of the merge."""
        return merge_statistics(self.adapters, self.all_coefficients())


def open_adapters(
    adapters: Sequence[str | Path],
    weights: Sequence[float] | str | None,
    method: str,
    *,
    any_base: bool,
    options: DenseOptions | None = None,
) -> MergedAdapters:
    """Opens adapters (folders or Hub ids) to be merged with weights (None: uniform).

    Raises:
        UserError: If there are none, if they do not fit each other, or their count is not that of the weights.
    """
    if not adapters:
        raise UserError.of("adapters", expected="at least one", found="none", remedy="Name one with --adapter")
    opened = [Adapter.open(local_folder(adapter, _ADAPTER_FILES)) for adapter in adapters]
    if weights is not None and not isinstance(weights, str) and len(weights) != len(opened):
        raise UserError.of(
            "merge weights",
            expected=f"one for each of {len(opened)} adapters",
            found=f"{len(weights)}",
            remedy="Give --weight once per --adapter, or not at all",
        )
    first = opened[0]
    for adapter in opened[1:]:
        if not any_base and not same_base(adapter.base_name, first.base_name):
            raise UserError.of(
                f"the base of {adapter.path}",
                expected=f"{first.base_name!r}, that of {first.path}",
                found=repr(adapter.base_name),
                remedy="Merge adapters of one base, or pass --any-base if they hold the same weights",
            )
    return MergedAdapters(opened, resolve_weights(weights or "uniform", len(opened)), method, options)


def branch_weight(adapter: Adapter, name: str) -> BranchWeight | None:
    """What an adapter holds for one weight; tensors that are taken whole stay on the disk until they are used."""
    entry = adapter.entry(name)
    if entry is None:
        return None
    whole, tokens = entry.value, entry.tokens
    return BranchWeight(
        factors=adapter.factors(name),
        magnitude=None if entry.magnitude is None else adapter.read(entry.magnitude),
        axis=1 if entry.low_rank is not None and entry.low_rank.layout == "embedding" else 0,
        value=None if whole is None else adapter.mapped(whole).view(entry.value_shape),
        indices=None if tokens is None else torch.tensor(tokens.indices),
        rows=None if tokens is None else adapter.read(tokens.values),
        scales=adapter.trained_scales(name),
    )


def _check_shapes(adapters: Sequence[Adapter]) -> None:
    seen: dict[str, Adapter] = {}
    for adapter in adapters:
        for name in adapter.names:
            if adapter.is_rows(name):
                continue
            first = seen.setdefault(name, adapter)
            if first.shape(name) != adapter.shape(name):
                raise UserError.of(
                    f"the delta of {name!r} in {adapter.path}",
                    expected=f"shape {list(first.shape(name))}, as in {first.path}",
                    found=f"{list(adapter.shape(name))}",
                    remedy="Merge adapters of the same base",
                )
