"""Snapshots: whole fp32 weights after an iteration whose change is not low rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from bam_lora.safetensors_stream import write_tensors
from bam_lora.store import inside


def write_snapshot(root: Path, iteration: int, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes the fp32 values of weights after an iteration whose change is not low rank.

    Args:
        root: The run's folder.
        iteration: The iteration they belong to.
        tensors: Whole weights by name.

    Returns:
        The file's path relative to the root, for `Ledger.record`.
    """
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values()), "snapshots are fp32"
    path = f"snapshots/{iteration:02d}.safetensors"
    write_tensors(inside(root, path), tensors)
    return path
