"""Writes low-rank products, and whole tensors beside them, as a PEFT LoRA adapter whose scaling is one.

Shapes: o output, i input, R the rank of a product, E fused experts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bam_lora.adapter_entries import FUSED_ORDER, PREFIX, LowRank
from bam_lora.adapters import Adapter
from bam_lora.safetensors_stream import DTYPE_BITS, write_stream

Layout = tuple[str, str, tuple[int, ...]]


class Products(Protocol):
    """A product for each of some weights, given one at a time."""

    def names(self) -> list[str]:
        """The weights, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i)."""
        ...

    def rank(self, name: str) -> int:
        """R."""
        ...

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(B_oR, A_Ri) in fp32."""
        ...


@dataclass(frozen=True)
class Slot:
    """The one or two tensors that hold the product of a weight, or those of all fused experts of a parameter.

    Attributes:
        target: What PEFT looks a rank up by: the name of a module, or of a parameter that `target_parameters` names.
        layout: See `LowRank`; "bias" has no A.
        names: The weights, one or E of them.
        A: Name of the right factor's tensor, or None.
        B: Name of the left factor's.
        by_parameter: Whether `target_parameters` names it.
    """

    target: str
    layout: str
    names: tuple[str, ...]
    A: str | None
    B: str
    by_parameter: bool


@dataclass(frozen=True)
class Whole:
    """A tensor that is written as it is: its name, safetensors type and shape, and what reads it."""

    layout: Layout
    read: Callable[[], torch.Tensor]


def find_slots(names: Iterable[str], adapters: Iterable[Adapter]) -> list[Slot]:
    """Where PEFT looks for the products of these weights when one adapter holds them all.

    Args:
        names: Weights by the names of the model's parameters.
        adapters: Which together hold all of them.
    """
    known: dict[str, LowRank] = {}
    for adapter in adapters:
        for name in adapter.names:
            entry = adapter.entry(name)
            if entry is None or entry.low_rank is None:
                continue
            # What one of them adapts as a module is adapted as a module.
            if name not in known or known[name].by_parameter:
                known[name] = entry.low_rank
    grouped: dict[str, list[str]] = {}
    for name in sorted(names):
        grouped.setdefault(name.partition("[")[0], []).append(name)
    parameters = {name for name, group in grouped.items() if known[group[0]].by_parameter}
    return [_slot(name, sorted(group, key=_expert), known[group[0]], parameters) for name, group in grouped.items()]


def _expert(name: str) -> int:
    return int(name.partition("[")[2].rstrip("]") or 0)


def _slot(parameter: str, names: Sequence[str], low_rank: LowRank, parameters: set[str]) -> Slot:
    module, _, last = parameter.rpartition(".")
    if low_rank.layout == "bias":
        return Slot(module, "bias", tuple(names), None, f"{PREFIX}{module}.lora_B.bias", False)
    if low_rank.layout == "embedding":
        stem = f"{PREFIX}{module}.lora_embedding_"
        return Slot(module, "embedding", tuple(names), f"{stem}A", f"{stem}B", False)
    path = module
    if low_rank.by_parameter and last in FUSED_ORDER:
        # PEFT wraps the module once per parameter, the first one innermost.
        fused = [name for name in FUSED_ORDER if f"{module}.{name}" in parameters]
        path += ".base_layer" * (len(fused) - 1 - fused.index(last))
    stem = f"{PREFIX}{path}.lora_"
    target = parameter if low_rank.by_parameter else module
    return Slot(target, low_rank.layout, tuple(names), f"{stem}A.weight", f"{stem}B.weight", low_rank.by_parameter)


def write_products(path: Path, products: Products, slots: Sequence[Slot], whole: Sequence[Whole] = ()) -> None:
    """Writes adapter_model.safetensors, slot by slot, so that memory holds one at a time."""
    items: list[tuple[list[Layout], Callable[[], list[torch.Tensor]]]] = [
        (_layout(products, slot), functools.partial(_tensors, products, slot)) for slot in slots
    ]
    items += [([one.layout], functools.partial(_only, one)) for one in whole]
    items.sort(key=lambda item: -DTYPE_BITS[item[0][0][1]])  # widest type first, so that every tensor stays aligned
    layout = [one for entries, _ in items for one in entries]
    write_stream(path, layout, (tensor for _, make in items for tensor in make()), {"format": "pt"})


def _only(whole: Whole) -> list[torch.Tensor]:
    return [whole.read()]


def _layout(products: Products, slot: Slot) -> list[Layout]:
    rank, (rows, columns), experts = products.rank(slot.names[0]), products.shape(slot.names[0]), len(slot.names)
    if slot.A is None:
        return [(slot.B, "F32", (rows,))]
    if slot.layout == "embedding":
        return [(slot.A, "F32", (rank, rows)), (slot.B, "F32", (columns, rank))]
    return [(slot.A, "F32", (experts * rank, columns)), (slot.B, "F32", (rows, rank * experts))]


def _tensors(products: Products, slot: Slot) -> list[torch.Tensor]:
    """The factors as PEFT keeps them, in the order of `_layout`."""
    pairs = []
    for name in slot.names:
        stacked = products.stacked(name)
        assert stacked is not None, name
        pairs.append(stacked)
    B_oR, A_Ri = pairs[0]
    if slot.A is None:
        return [(B_oR.double() @ A_Ri.double())[:, 0].float()]
    if slot.layout == "embedding":
        return [B_oR.T, A_Ri.T]
    if len(pairs) == 1:
        return [A_Ri, B_oR]
    B_oRe = torch.stack([B_oR for B_oR, _ in pairs], dim=2)
    return [torch.cat([A_Ri for _, A_Ri in pairs]), B_oRe.reshape(len(B_oR), -1)]


def exact_config(
    config: Mapping[str, Any], slots: Sequence[Slot], products: Products, *, name_modules: bool
) -> dict[str, Any]:
    """adapter_config.json for products, their ranks as alphas too, so that the scaling is one.

    Args:
        config: Of an adapter of the same base; all but ranks and initialisation stays.
        slots: Where the products are.
        products: Which have the ranks.
        name_modules: Name every module and parameter in full, instead of as `config` does.
    """
    adapted = [slot for slot in slots if slot.layout != "bias"]
    ranks = {slot.target: products.rank(slot.names[0]) for slot in adapted}
    # Servers that make room by `r` alone, such as vLLM, must find no module with more.
    usual = max(ranks.values()) if ranks else config["r"]
    unusual = {re.escape(target): rank for target, rank in ranks.items() if rank != usual}
    parameters = sorted(slot.target for slot in adapted if slot.by_parameter)
    result = {
        **config,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if any(slot.layout == "bias" for slot in slots):
        result["lora_bias"] = True
    if parameters:
        result["lora_dropout"] = 0.0  # PEFT refuses any other beside target_parameters
    if name_modules:
        result |= {"target_modules": sorted(slot.target for slot in adapted if not slot.by_parameter)}
        result |= {"target_parameters": parameters or None, "exclude_modules": None}
        result |= {"layers_to_transform": None, "layers_pattern": None}
    return result
