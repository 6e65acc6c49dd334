"""Writes low-rank products B·A as a PEFT LoRA adapter whose scaling is one.

Shapes: o output, i input, R the rank of a product.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from bam_lora.safetensors_stream import write_stream


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


def write_products(path: Path, products: Products) -> None:
    """Writes adapter_model.safetensors, weight by weight, so that memory holds one at a time."""
    layout: list[tuple[str, str, tuple[int, ...]]] = []
    for name in products.names():
        prefix, rank, (rows, columns) = f"base_model.model.{_module(name)}", products.rank(name), products.shape(name)
        layout.append((f"{prefix}.lora_A.weight", "F32", (rank, columns)))
        layout.append((f"{prefix}.lora_B.weight", "F32", (rows, rank)))
    write_stream(path, layout, _halves(products), {"format": "pt"})


def exact_config(config: Mapping[str, Any], ranks: Mapping[str, int], *, name_modules: bool) -> dict[str, Any]:
    """adapter_config.json for products, their ranks as alphas too, so that the scaling is one.

    Args:
        config: Of an adapter of the same base; all but ranks and initialisation stays.
        ranks: R by weight name.
        name_modules: Name every module in full, instead of as `config` does.
    """
    by_module = {_module(name): rank for name, rank in ranks.items()}
    usual = Counter(by_module.values()).most_common(1)[0][0]
    unusual = {re.escape(module): rank for module, rank in by_module.items() if rank != usual}
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
    if name_modules:
        result |= {"target_modules": sorted(by_module), "exclude_modules": None}
        result |= {"layers_to_transform": None, "layers_pattern": None}
    return result


def _halves(products: Products) -> Iterator[torch.Tensor]:
    for name in products.names():
        stacked = products.stacked(name)
        assert stacked is not None
        yield stacked[1]
        yield stacked[0]


def _module(name: str) -> str:
    return name.removesuffix(".weight")
