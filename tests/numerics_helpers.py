"""Adapters, bases and references for the tests of the numerical rooms. Shapes: o output, i input, r rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bam_lora.adapters import Adapter

# Smallest normal exponent and bits of mantissa of the narrow types.
BF16 = torch.bfloat16
GRID = {torch.bfloat16: (-126, 7), torch.float16: (-14, 10)}


def ulp(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbours of `dtype` at these float64 values."""
    smallest, mantissa_bits = GRID[dtype]
    _, exponent = np.frexp(values)  # |value| = m * 2**exponent with 0.5 <= m < 1
    return np.ldexp(1.0, np.maximum(exponent - 1, smallest) - mantissa_bits)


def round_directly(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 to `dtype` with one rounding, half to even (`Tensor.to` goes through fp32 and rounds twice)."""
    exact = values.double().numpy()
    step = ulp(exact, dtype)
    return torch.from_numpy(np.rint(exact / step) * step).to(dtype)


def gaussian(*shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def delta(A_ri: torch.Tensor, B_or: torch.Tensor, scaling: float) -> torch.Tensor:
    """The dense float64 reference."""
    return scaling * (B_or.double() @ A_ri.double())


def write_adapter(
    folder: Path, modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]], *, alpha: float = 16, **config: Any
) -> Path:
    """An adapter of {module: (A_ri, B_or)}; differing ranks go into rank_pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, ranks = {}, {}
    for module, (A_ri, B_or) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A_ri.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B_or.contiguous()
        ranks[module] = A_ri.shape[0]
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    r = next(iter(ranks.values()))
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "target_modules": sorted(modules),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def random_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int = 4,
    seed: int = 0,
    scale: float = 0.02,
    **config: Any,
) -> Path:
    """A Gaussian adapter for modules of (o, i) shapes."""
    modules = {
        module: (
            gaussian(rank, columns, seed=seed * 1000 + 2 * number, scale=scale),
            gaussian(rows, rank, seed=seed * 1000 + 2 * number + 1, scale=scale),
        )
        for number, (module, (rows, columns)) in enumerate(shapes.items())
    }
    return write_adapter(folder, modules, **config)


def write_base(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """A model folder with these tensors, dealt out over `shards` files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **(config or {})}))
    names = sorted(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


SMALL_SHAPES = {"model.layers.0.q_proj": (12, 8), "model.layers.0.up_proj": (20, 8)}


def small_tensors(dtype: torch.dtype = BF16) -> dict[str, torch.Tensor]:
    tensors = {f"{module}.weight": gaussian(*shape, seed=5, dtype=dtype) for module, shape in SMALL_SHAPES.items()}
    tensors["model.norm.weight"] = torch.ones(8, dtype=dtype)
    tensors["model.embed_tokens.weight"] = gaussian(30, 8, seed=6, dtype=dtype)
    return tensors


class Small(NamedTuple):
    base: Path
    adapter: Path
    out: Path


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def dense_delta(adapter: Path, name: str) -> torch.Tensor:
    factors = Adapter.open(adapter).factors(name)
    assert factors is not None
    return delta(factors.A_ri, factors.B_or, factors.scaling)


def make_sharded(root: Path, shards: int) -> Small:
    """As `make_small`, its base in several files and with a tokenizer's file."""
    base = write_base(root / "base", small_tensors(), shards=shards)
    (base / "tokenizer.json").write_text("{}")
    return Small(base, random_adapter(root / "a", SMALL_SHAPES), root / "out")


def make_small(root: Path) -> Small:
    """A base of four small weights and an adapter that fits it."""
    base = write_base(root / "base", small_tensors())
    return Small(base, random_adapter(root / "a", SMALL_SHAPES), root / "out")
