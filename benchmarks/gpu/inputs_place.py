"""Where a shape's inputs are; apart from what makes them, as run.py must not import torch."""

from __future__ import annotations

from pathlib import Path

MADE = "made.json"  # written last: what lies beside it is whole


def folder_of(shape: str, work: Path) -> Path:
    """Where the inputs of a shape are: base/, adapter-1/, adapter-2/, text.jsonl, held-out.jsonl."""
    return work / "inputs" / shape


def is_made(shape: str, work: Path) -> bool:
    """Whether they are there, whole."""
    return (folder_of(shape, work) / MADE).is_file()
