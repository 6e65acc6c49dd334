"""Several adapters as one adapter on disk: exact where it can hold what the merge gives, else cut to a rank."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bam_lora.adapter_entries import EMBEDDINGS, HEADS, Entry
from bam_lora.adapter_files import Products, Whole, exact_config, find_slots, write_products
from bam_lora.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter
from bam_lora.checkpoint import claim_output, writing
from bam_lora.compression import Compressed, CompressedDense, require_rank
from bam_lora.dense_methods import DenseOptions
from bam_lora.errors import UserError
from bam_lora.fold_blocks import as_matrix, row_ranges
from bam_lora.merge import MergedAdapters, open_adapters
from bam_lora.merge_statistics import merge_statistics
from bam_lora.safetensors_stream import TensorRecord
from bam_lora.store import digest, new_folder, seal, write_json

_ARTEFACT = "merged adapter"
_FOLD = "Fold the adapters into the base instead: bam-lora fold"


def merge_adapters(
    adapters: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | str | None = None,
    method: str = "linear",
    rank: int | None = None,
    any_base: bool = False,
    options: DenseOptions | None = None,
) -> dict[str, Any]:
    """Writes adapters merged into one PEFT adapter (fp32, scaling 1): exactly, or the closest of a given rank.

    Weights saved whole (`modules_to_save`, biases) and trained tokens are averaged, which is exact where every adapter
    has them and the weights sum to one; copies of embeddings beside LoRA are carried along.

    Args:
        adapters: Folders (or Hub ids) of LoRA adapters of one base; one that lacks a module counts as zero there.
        output: New folder for the merged adapter; it appears whole or not at all.
        weights: One number per adapter, used as they are, or None for their mean.
        method: A name in `METHODS`; with `rank` also one in `DENSE_METHODS`.
        rank: The most directions of a weight's delta that are kept; None: all, R being the sum of the ranks.
        any_base: Allow adapters that name different bases.
        options: Of the methods that work element by element.

    Returns:
        The merge statistics (see `merge_statistics`) of the low-rank deltas before anything is left out, the "weights"
        used, "rank": the largest written, "stacked_rank": the largest R, None for methods that work element by element,
        "error": relative Frobenius error over all deltas, 0 without `rank`, "errors": {weight: relative error}.

    Raises:
        UserError: If an adapter is damaged or does not fit the others, an adapter cannot hold what the merge gives, or
            the output cannot be written.
    """
    require_rank(rank)
    merged = open_adapters(adapters, weights, method, any_base=any_base, options=options)
    products = _products(merged, rank)
    whole = _whole_tensors(merged)
    target = claim_output(Path(output), _ARTEFACT, keep=[adapter.path for adapter in merged.adapters])
    slots = find_slots(products.names(), merged.adapters)
    if any(slot.by_parameter for slot in slots) and any(slot.layout == "bias" for slot in slots):
        raise _unfit("lora_bias beside target_parameters", "adapters of which at most one has them", "both", _FOLD)
    hashes = [adapter.hashes() for adapter in merged.adapters]
    key = digest(
        {
            "artefact": _ARTEFACT,
            "adapters": hashes,
            "weights": merged.weights,
            "method": method,
            "rank": rank,
            "options": vars(merged.options),
        }
    )
    with writing(target), new_folder(target) as folder:
        write_products(folder / WEIGHTS_FILE, products, slots, [*whole, *_missing_biases(merged, products)])
        named = _named_differently(merged)
        write_json(folder / CONFIG_FILE, exact_config(merged.adapters[0].config, slots, products, name_modules=named))
        facts = {"artefact": _ARTEFACT, "weights": merged.weights, "method": method, "rank": rank}
        seal(folder, key, {**facts, "error": _error(products)})
    return {**_statistics(merged, products), "weights": merged.weights, **_ranks(merged, products)}


class _LowRank:
    """The low-rank deltas of merged adapters, also of weights that they hold a copy of."""

    def __init__(self, merged: MergedAdapters, names: list[str]) -> None:
        self._merged, self._names = merged, names

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, int]:
        return self._merged.shape(name)

    def rank(self, name: str) -> int:
        return self._merged.rank(name)

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self._merged.product(name)


def _products(merged: MergedAdapters, rank: int | None) -> Products:
    """The products to be written, after it is known that an adapter can hold all of the merge."""
    names = []
    for name in merged.names():
        entries = _entries(merged, name)
        if any(entry.magnitude is not None for entry in entries):
            raise _unfit(f"the merged change of {name!r}", "a product of two factors", "DoRA, which is none", _FOLD)
        if all(entry.low_rank is not None and entry.tokens is None for entry in entries):
            names.append(name)
    if not merged.by_element:
        low_rank = _LowRank(merged, names)
        return low_rank if rank is None else Compressed(low_rank, rank)
    if rank is None:
        raise _unfit(
            f"merge method {merged.method!r}",
            "a product of two factors, as an adapter holds",
            "a method that works element by element",
            "Give --rank r for the closest product of rank r, or fold the adapters into the base: bam-lora fold",
        )
    return CompressedDense(merged, names, rank)


def _entries(merged: MergedAdapters, name: str) -> list[Entry]:
    return [entry for adapter in merged.adapters if (entry := adapter.entry(name)) is not None]


def _unfit(what: str, expected: str, found: str, remedy: str) -> UserError:
    return UserError.of(what, expected=expected, found=found, remedy=remedy)


def _whole_tensors(merged: MergedAdapters) -> list[Whole]:
    """What is no low-rank product: copies carried along, whole weights and trained rows averaged."""
    result = []
    for name in merged.names():
        holders = [adapter for adapter in merged.adapters if name in adapter]
        entries = _entries(merged, name)
        if name.rpartition(".")[0].endswith((*EMBEDDINGS, *HEADS)):
            _check_tying(name, holders)
        values = [(one, entry.value) for one, entry in zip(holders, entries, strict=True) if entry.value is not None]
        if values and all(entry.low_rank is not None and entry.tokens is None for entry in entries):
            if not _same_bytes(values):
                found = "others in another adapter"
                raise _unfit(f"the copy of {name!r} in {values[0][0].path}", "the same numbers in all", found, _FOLD)
            result.append(_kept(values))
        elif values:
            _check_mean(merged, name, complete=len(values) == len(merged.adapters), entries=entries)
            result.append(_kept(values) if _same_bytes(values) else _mean(merged, values))
        elif any(entry.tokens is not None for entry in entries):
            result.append(_mean_rows(merged, name, entries))
    return result


def _check_tying(name: str, holders: Sequence[Adapter]) -> None:
    if len({bool(adapter.config.get("ensure_weight_tying")) for adapter in holders}) > 1:
        raise _unfit(f"ensure_weight_tying for {name!r}", "the same in all adapters", "true and false", _FOLD)


def _check_mean(merged: MergedAdapters, name: str, *, complete: bool, entries: Sequence[Entry]) -> None:
    """A mean of whole numbers is what the fold gives only where the base has no share in it."""
    if not complete or any(entry.low_rank is not None or (entry.value and entry.tokens) for entry in entries):
        found = "not the same kind in every adapter"
    elif merged.method != "linear":
        found = f"merge method {merged.method!r}"
    elif abs(math.fsum(merged.weights) - 1) > 1e-9:
        found = f"weights that sum to {math.fsum(merged.weights):g}"
    else:
        return
    raise _unfit(
        f"the merged value of {name!r}", "whole numbers in every adapter and weights that sum to 1", found, _FOLD
    )


def _same_bytes(values: Sequence[tuple[Adapter, TensorRecord]]) -> bool:
    (first_adapter, first), *others = values
    if any((one.dtype, one.shape) != (first.dtype, first.shape) for _, one in others):
        return False
    bits = _bits(first_adapter, first)
    return all(torch.equal(_bits(adapter, record), bits) for adapter, record in others)


def _bits(adapter: Adapter, record: TensorRecord) -> torch.Tensor:
    return adapter.mapped(record).flatten().view(torch.uint8)


def _key(values: Sequence[tuple[Adapter, TensorRecord]]) -> str:
    """PEFT's name of a tensor in the merged adapter, where a module that any of them adapts is wrapped."""
    names = [record.name for _, record in values]
    return next((name for name in names if ".base_layer." in name), names[0])


def _kept(values: Sequence[tuple[Adapter, TensorRecord]]) -> Whole:
    adapter, record = values[0]
    return Whole((_key(values), record.dtype, record.shape), functools.partial(adapter.mapped, record))


def _mean(merged: MergedAdapters, values: Sequence[tuple[Adapter, TensorRecord]]) -> Whole:
    shape = values[0][1].shape

    def read() -> torch.Tensor:
        mapped = [adapter.mapped(record).view(as_matrix(shape)) for adapter, record in values]
        result = torch.empty(as_matrix(shape))
        for first, count in row_ranges(*as_matrix(shape)):
            blocks = [one[first : first + count].double() for one in mapped]
            result[first : first + count] = _weighted(merged, blocks)
        return result.view(shape)

    return Whole((_key(values), "F32", shape), read)


def _weighted(merged: MergedAdapters, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean; numbers that are the same in all stay as they are."""
    total = sum(weight * block for weight, block in zip(merged.weights, blocks, strict=True))
    assert isinstance(total, torch.Tensor), "at least one adapter"
    same = functools.reduce(torch.logical_and, (block == blocks[0] for block in blocks))
    return torch.where(same, blocks[0], total)


def _mean_rows(merged: MergedAdapters, name: str, entries: Sequence[Entry]) -> Whole:
    """The mean of rows that were trained as such."""
    tokens = [entry.tokens for entry in entries if entry.tokens is not None]
    _check_mean(merged, name, complete=len(tokens) == len(merged.adapters), entries=entries)
    first = tokens[0]
    if any(set(one.indices) != set(first.indices) for one in tokens):
        raise _unfit(f"the trained tokens of {name!r}", "the same ones in every adapter", "others", _FOLD)

    def read() -> torch.Tensor:
        places = [{index: place for place, index in enumerate(one.indices)} for one in tokens]
        blocks = [
            adapter.read(one.values)[[place[index] for index in first.indices]].double()
            for adapter, one, place in zip(merged.adapters, tokens, places, strict=True)
        ]
        return _weighted(merged, blocks).float()

    return Whole((first.values.name, "F32", first.values.shape), read)


def _missing_biases(merged: MergedAdapters, products: Products) -> list[Whole]:
    """Zeros for modules without `lora_bias` where others have one: PEFT then expects it of all of them."""
    names = set(products.names())
    slots = find_slots(names, merged.adapters)
    if not any(slot.layout == "bias" for slot in slots):
        return []
    result = []
    for slot in slots:
        if slot.layout == "linear" and f"{slot.target}.bias" not in names:
            shape = (products.shape(slot.names[0])[0],)
            key = slot.B.removesuffix("weight") + "bias"
            result.append(Whole((key, "F32", shape), functools.partial(torch.zeros, shape)))
    return result


def _named_differently(merged: MergedAdapters) -> bool:
    """Whether the first adapter's way of naming what it adapts does not hold for all of them."""

    def adapted(adapter: Adapter) -> list[tuple[str, bool]]:
        entries = [(name, adapter.entry(name)) for name in adapter.names]
        return [(name, entry.low_rank.by_parameter) for name, entry in entries if entry and entry.low_rank]

    return any(adapted(adapter) != adapted(merged.adapters[0]) for adapter in merged.adapters)


def _statistics(merged: MergedAdapters, products: Products) -> dict[str, Any]:
    if isinstance(products, CompressedDense):
        return merge_statistics(merged.adapters, {}, dense_norms=products.norms())
    return merge_statistics(merged.adapters, {name: merged.coefficients(name) for name in products.names()})


def _ranks(merged: MergedAdapters, products: Products) -> dict[str, Any]:
    names = products.names()
    stacked = None if merged.by_element else max((merged.rank(name) for name in names), default=0)
    return {
        "rank": max((products.rank(name) for name in names), default=0),
        "stacked_rank": stacked,
        "error": _error(products),
        "errors": products.errors() if isinstance(products, Compressed) else {},
    }


def _error(products: Products) -> float:
    return products.error() if isinstance(products, Compressed) else 0.0
