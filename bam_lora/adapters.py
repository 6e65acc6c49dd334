"""PEFT LoRA adapters on disk as named low-rank factors; every tensor of the file is accounted for.

Shapes: o output, i input, r rank. The delta of a weight W_oi is scaling · B_or · A_ri (Hu et al., arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bam_lora.adapter_config import CONFIG_FILE, check_config
from bam_lora.adapter_entries import Entry, LowRank, entries_of
from bam_lora.adapter_promises import check_promises
from bam_lora.errors import UserError
from bam_lora.safetensors_stream import Header, TensorRecord, all_finite, map_tensor, read_header, read_tensor
from bam_lora.store import hash_file, inside, read_json

__all__ = ["CONFIG_FILE", "SCALES_FILE", "WEIGHTS_FILE", "Adapter", "Entry", "Factors"]

WEIGHTS_FILE = "adapter_model.safetensors"
SCALES_FILE = "dora_scales.safetensors"  # beside the adapters of runs only


@dataclass(frozen=True)
class Factors:
    """The two halves of one delta, on the CPU as stored, and its scaling: ΔW_oi = scaling · B_or · A_ri."""

    A_ri: torch.Tensor
    B_or: torch.Tensor
    scaling: float


class Adapter:
    """A checked PEFT LoRA adapter; its tensors are read only when asked for."""

    def __init__(self, path: Path, config: Mapping[str, Any], entries: Mapping[str, Entry], header: Header) -> None:
        self.path = path
        self._header = header
        self.config = dict(config)
        self._entries = dict(entries)
        self._known_finite: set[str] = set()

    @classmethod
    def open(cls, path: str | Path, *, root: Path | None = None) -> Adapter:
        """Reads the configuration and the header, and checks that nothing is missing, left over or not understood.

        Args:
            path: Folder with adapter_config.json and adapter_model.safetensors.
            root: If given, `path` is relative to it and must stay inside.

        Raises:
            UserError: If it is not a LoRA adapter whose every tensor is used, naming the tensor and file.
        """
        folder = inside(root, str(path)) if root is not None else Path(path)
        if not (folder / WEIGHTS_FILE).is_file():
            raise _no_weights(folder)
        config = read_json(folder / CONFIG_FILE)
        check_config(folder / CONFIG_FILE, config)
        entries = entries_of(folder, config, header := read_header(folder / WEIGHTS_FILE))
        if not entries:
            raise UserError.of(
                str(header.path), expected="LoRA tensors", found="none", remedy="Train or export the adapter again"
            )
        check_promises(header.path, config, entries)
        return cls(folder, config, entries, header)

    @property
    def names(self) -> list[str]:
        """The weights it changes, by the names of the model's parameters, sorted; `name[e]`: a fused expert."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        """Whether it changes the weight of that name."""
        return name in self._entries

    def entry(self, name: str) -> Entry | None:
        """What it holds for a weight, or None."""
        return self._entries.get(name)

    @property
    def base_name(self) -> str | None:
        """The base it was trained on, as PEFT recorded it."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i): the shape of the weight, a vector as one column."""
        return self._entries[name].shape

    def rank(self, name: str) -> int:
        """The rank of the weight's delta."""
        return self._low_rank(name).rank

    def scaling(self, name: str) -> float:
        """The number that multiplies B·A."""
        return self._low_rank(name).scaling

    def _low_rank(self, name: str) -> LowRank:
        low_rank = self._entries[name].low_rank
        assert low_rank is not None, f"{name} is not low rank"
        return low_rank

    def factors(self, name: str) -> Factors | None:
        """Reads one delta's factors.

        Args:
            name: The weight's name.

        Returns:
            The factors in their stored type, or None if the adapter has none for this weight.

        Raises:
            UserError: If one holds NaN or Inf, or the file has changed since it was opened.
        """
        entry = self._entries.get(name)
        if entry is None or entry.low_rank is None:
            return None
        # The factors of fused experts lie side by side in one tensor each: of it is read what belongs to one of them.
        B_or, A_ri = entry.low_rank.factors(self.mapped if entry.low_rank.experts > 1 else self.read)
        return Factors(A_ri, B_or, entry.low_rank.scaling)

    def read(self, record: TensorRecord) -> torch.Tensor:
        """One of its tensors, as stored.

        Raises:
            UserError: If it holds NaN or Inf, or the file has changed since it was opened.
        """
        tensor = read_tensor(self.path / WEIGHTS_FILE, record)
        self._check_finite(tensor, record)
        return tensor

    def _check_finite(self, tensor: torch.Tensor, record: TensorRecord) -> None:
        if not all_finite(tensor):
            raise UserError.of(
                f"tensor {record.name!r} in {self.path / WEIGHTS_FILE}",
                expected="finite numbers",
                found="NaN or Inf",
                remedy="The training diverged or the file is damaged; train this adapter again",
            )

    def mapped(self, record: TensorRecord) -> torch.Tensor:
        """One of its tensors, as stored, read from the disk only where it is used."""
        tensor = map_tensor(self.path / WEIGHTS_FILE, record)
        if record.name not in self._known_finite:
            self._check_finite(tensor, record)
            self._known_finite.add(record.name)
        return tensor

    def trained_scales(self, name: str) -> torch.Tensor | None:
        """(o,) what DoRA multiplied each row of a weight by when its training ended; None where none was recorded."""
        path = self.path / SCALES_FILE
        if self._entries[name].magnitude is None or not path.is_file():
            return None
        record = read_header(path).tensors[name]
        tensor = read_tensor(path, record)
        self._check_finite(tensor, record)
        return tensor

    def is_rows(self, name: str) -> bool:
        """Whether it holds nothing but single rows of a weight."""
        entry = self._entries[name]
        return entry.low_rank is None and entry.value is None

    def identity(self) -> dict[str, Any]:
        """What tells it from another: its configuration, and of the weights the header, the size and the time."""
        status = (self.path / WEIGHTS_FILE).stat()
        config, header = hash_file(self.path / CONFIG_FILE), self._header.raw.hex()
        return {"config": config, "header": header, "bytes": status.st_size, "time_ns": status.st_mtime_ns}

    def hashes(self) -> dict[str, dict[str, Any]]:
        """{file: {"bytes", "sha256"}} of the two files that make the adapter."""
        paths = [self.path / CONFIG_FILE, self.path / WEIGHTS_FILE]
        return {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in paths}


def _no_weights(folder: Path) -> UserError:
    if (folder / "adapter_model.bin").exists():
        found, remedy = "adapter_model.bin", "Load it with PEFT and save it again with safe_serialization=True"
    else:
        found = "no such file" if folder.is_dir() else "no such folder"
        remedy = "Give the folder that PEFT's save_pretrained wrote"
    return UserError.of(str(folder), expected=f"an adapter with {WEIGHTS_FILE}", found=found, remedy=remedy)
