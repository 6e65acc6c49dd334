"""The ledger: the original base and, per iteration, the adapters and the coefficients that merged them.

A base is never folded from a rounded one: the weights after any iteration are the original ones plus everything the
ledger holds, in fp32, rounded once (why that matters: docs/concepts.md). So the ledger is all that has to be kept.

`ledger.json` lies in the run's folder; every path in it is relative to that folder and stays inside. Iterations of a
run that this one continues are in `inherited`, with their files under `parent/`; `upto` counts this run's own
iterations only, so `upto=0` is the state at this run's start and None the newest.
Shapes: o output, i input, R the stacked rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bam_lora.adapters import Adapter, Factors
from bam_lora.coefficients import Coefficients, branch_parts, gathered, gram, identity_of
from bam_lora.errors import UserError
from bam_lora.ledger_history import (
    FORMAT,
    PARENT,
    file_record,
    history_key,
    link_history,
    link_vocabulary,
    newest_snapshot,
    snapshot_record,
    superseded,
    verify_files,
)
from bam_lora.ledger_view import LedgerView
from bam_lora.safetensors_stream import map_tensor, read_header, read_tensor, write_tensors
from bam_lora.store import inside, new_folder, read_record, write_record

LEDGER_FILE = "ledger.json"
_IN_FILES = ("matrix", "blocks")  # coefficients too many for JSON


class Ledger:
    """The ordered history of merges since the original base; serves any weight at any iteration."""

    def __init__(
        self,
        root: Path,
        base: Mapping[str, Any],
        inherited: Sequence[Mapping[str, Any]] = (),
        iterations: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.root = root
        self.base = dict(base)
        self.inherited = [dict(entry) for entry in inherited]
        self.iterations = [dict(entry) for entry in iterations]
        self._opened: dict[str, Adapter] = {}

    @classmethod
    def start(cls, root: Path, base: Mapping[str, Any]) -> Ledger:
        """A new ledger, not yet on disk.

        Args:
            root: The run's folder.
            base: {"name", "revision", "files": {name: {"bytes", "sha256"}}} of the original base, and its `vocabulary`.
        """
        return cls(root, base)

    @classmethod
    def load(cls, root: Path) -> Ledger:
        """Reads `root/ledger.json`.

        Raises:
            UserError: If it is missing, damaged (its own hash fails) or of another format.
        """
        path = root / LEDGER_FILE
        if not path.is_file():
            raise UserError.of(str(path), expected="a ledger", found="nothing", remedy="Give the folder of a run")
        body = read_record(path)
        if body is None:
            raise UserError.of(
                str(path),
                expected="a ledger that matches its own hash",
                found="another hash",
                remedy="Restore the file",
            )
        if body.get("format") != FORMAT:
            raise UserError.of(
                str(path), expected=f"format {FORMAT}", found=repr(body.get("format")), remedy="Update bam_lora"
            )
        return cls(root, body["base"], body["inherited"], body["iterations"])

    def save(self) -> None:
        """Writes `root/ledger.json` atomically."""
        body = {"format": FORMAT, "base": self.base, "inherited": self.inherited, "iterations": self.iterations}
        write_record(self.root / LEDGER_FILE, self.key(), body)

    def record(
        self,
        iteration: int,
        adapters: Sequence[str],
        method: str,
        coefficients: Mapping[str, Coefficients],
        snapshot: str | None = None,
        same: Mapping[str, str] | None = None,
    ) -> None:
        """Appends an iteration; recording one again replaces it and drops what came later. `save` makes it last.

        Args:
            iteration: Its number, from 1; at most one more than there are.
            adapters: Its branches' adapter folders, relative to the root, in branch order.
            method: The merge method's name.
            coefficients: What the method chose for each weight that a branch changes.
            snapshot: A file made by `write_snapshot`: its tensors are those weights after this iteration.
            same: {weight: the one in the snapshot that it is equal to}, such as a tied output head.

        Raises:
            UserError: If an adapter is damaged, or a path leaves the run's folder.
        """
        assert 1 <= iteration <= len(self.iterations) + 1, (iteration, len(self.iterations))
        self._opened.clear()  # a folder recorded again may have new content
        opened = [self._adapter(path) for path in adapters]
        replaced = {*read_header(inside(self.root, snapshot)).tensors, *(same or ())} if snapshot else set()
        changed = {name for adapter in opened for name in adapter.names}
        assert changed - replaced <= set(coefficients) <= changed, "coefficients for each changed weight, no others"
        small = {name: value.to_json() for name, value in coefficients.items() if value.kind not in _IN_FILES}
        entry = {
            "iteration": iteration,
            "method": method,
            "adapters": [
                {"path": path, "files": adapter.hashes()} for path, adapter in zip(adapters, opened, strict=True)
            ],
            "coefficients": dict(sorted(small.items())),
            "matrices": self._write_matrices(iteration, coefficients),
            "snapshot": snapshot_record(self.root, snapshot, replaced, same or {}) if snapshot else None,
        }
        self.iterations[iteration - 1 :] = [entry]

    def _write_matrices(self, iteration: int, coefficients: Mapping[str, Coefficients]) -> dict[str, Any] | None:
        matrices = {name: value.values for name, value in coefficients.items() if value.kind in _IN_FILES}
        if not matrices:
            return None
        path = f"coefficients/{iteration:02d}.safetensors"
        write_tensors(inside(self.root, path), matrices)
        return file_record(self.root, path)

    def _history(self, upto: int | None) -> list[dict[str, Any]]:
        assert upto is None or 0 <= upto <= len(self.iterations), (upto, len(self.iterations))
        return [*self.inherited, *self.iterations[:upto]]

    def key(self, upto: int | None = None) -> str:
        """Hash of all that the weights after iteration `upto` are a function of; no path or name is part of it."""
        return history_key(self.base, self._history(upto))

    def names(self, upto: int | None = None) -> list[str]:
        """All weights that differ from the original base after iteration `upto`, sorted."""
        found = {name for adapter in self._adapters(self._history(upto)) for name in adapter.names}
        return sorted(found.union(*(entry["snapshot"]["names"] for entry in self._history(upto) if entry["snapshot"])))

    def shape(self, name: str, upto: int | None = None) -> tuple[int, int]:
        """(o, i) of a weight in `names(upto)`."""
        found = self.snapshot_shape(name, upto)
        holding = (adapter for adapter in self._adapters(self._history(upto)) if name in adapter)
        return found or next(holding).shape(name)

    def snapshot_shape(self, name: str, upto: int | None = None) -> tuple[int, int] | None:
        """(o, i) of a weight's newest snapshot, or None if there is none."""
        _, place = newest_snapshot(self._history(upto), name)
        if place is None:
            return None
        rows, columns = read_header(inside(self.root, place[0])).tensors[place[1]].shape
        return rows, columns

    def rank(self, name: str, upto: int | None = None) -> int:
        """R of what `stacked` gives for a weight."""
        start, _ = newest_snapshot(self._history(upto), name)
        listed = {
            identity_of(one["files"]): one["path"] for entry in self._history(upto)[start:] for one in entry["adapters"]
        }
        opened = [self._adapter(path) for path in listed.values()]
        return sum(adapter.rank(name) for adapter in opened if name in adapter)

    def stacked(
        self, name: str, upto: int | None = None, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Everything added to a weight since its start value, as one product ΔW_oi = B_oR · A_Ri.

        Args:
            name: The weight.
            upto: The iteration, None for the newest.
            scale: Multiplies what this run's own iterations added (not those it inherited).

        Returns:
            (B_oR, A_Ri) in fp32, oldest iteration first, or None if nothing was added.

        Raises:
            UserError: If an adapter file is missing or damaged, or holds NaN or Inf.
        """
        return gathered(self.parts(name, upto, scale))

    def parts(
        self, name: str, upto: int | None = None, scale: float = 1.0
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """What `stacked` is made from, branch by branch; one that a later iteration has corrected comes up again.

        Yields:
            (identity of the adapter's files, B_or, A_ri), oldest iteration first.
        """
        start, _ = newest_snapshot(self._history(upto), name)
        for position, entry in enumerate(self._history(upto)[start:], start=start):
            factors = [self._adapter(adapter["path"]).factors(name) for adapter in entry["adapters"]]
            if all(factor is None for factor in factors):
                continue
            own_scale = scale if position >= len(self.inherited) else 1.0
            files = [adapter["files"] for adapter in entry["adapters"]]
            for identity, B_or, A_ri in branch_parts(files, factors, self._coefficients(entry, name)):
                yield identity, B_or * own_scale if own_scale != 1 else B_or, A_ri

    def start_value(self, name: str, upto: int | None = None) -> torch.Tensor | None:
        """The weight's newest fp32 snapshot, to which `stacked` is added, or None: the original base's value.

        Its numbers stay on the disk until they are used.
        """
        _, place = newest_snapshot(self._history(upto), name)
        if place is None:
            return None
        file = inside(self.root, place[0])
        return map_tensor(file, read_header(file).tensors[place[1]])

    def is_own_whole(self, name: str, upto: int | None = None) -> bool:
        """Whether one of this run's own iterations has left a weight whole, its change being no low-rank product."""
        return newest_snapshot(self._history(upto), name)[0] > len(self.inherited)

    def view(self, upto: int | None = None, scale: float = 1.0) -> LedgerView:
        """The state after iteration `upto`, as `fold_into` takes it; `scale` multiplies what this run has added."""
        return LedgerView(self, len(self.iterations) if upto is None else upto, scale)

    def norms(self, upto: int | None = None) -> dict[str, float]:
        """Frobenius norm of `stacked`'s product by weight, in float64 from the factors (snapshots are not in it)."""
        result = {}
        for name in self.names(upto):
            stacked = self.stacked(name, upto)
            factors = None if stacked is None else Factors(A_ri=stacked[1], B_or=stacked[0], scaling=1.0)
            result[name] = 0.0 if factors is None else math.sqrt(max(gram(factors, factors), 0.0))
        return result

    def verify(self, upto: int | None = None) -> None:
        """Compares every file of the history with its hash.

        Raises:
            UserError: Naming the first file that is missing or has changed.
        """
        verify_files(self.root, self.base, self._history(upto))

    def drop_snapshots(self, before: int) -> None:
        """Deletes whole weights of own iterations before that one which replay does not read: newer ones are there."""
        for path in superseded(self._history(None)) & {
            entry["snapshot"]["path"] for entry in self.iterations[: before - 1] if entry["snapshot"]
        }:
            inside(self.root, path).unlink(missing_ok=True)

    def adopt(self, parent_root: Path) -> None:
        """Continues a finished run: its base and history become this run's, its files links (or copies) in `parent/`.

        Args:
            parent_root: The finished run's folder; its files are verified first.

        Raises:
            UserError: If its ledger or one of its files is damaged.
        """
        assert not self.iterations, "adopt before the first iteration"
        parent = Ledger.load(parent_root)
        parent.verify()
        with new_folder(self.root / PARENT) as folder:
            self.inherited = link_history(parent_root, parent._history(None), folder)
            self.base = link_vocabulary(parent_root, parent.base, folder)
        self._opened.clear()

    def _adapters(self, entries: Sequence[Mapping[str, Any]]) -> list[Adapter]:
        return [self._adapter(adapter["path"]) for entry in entries for adapter in entry["adapters"]]

    def _adapter(self, path: str) -> Adapter:
        if path not in self._opened:
            self._opened[path] = Adapter.open(path, root=self.root)
        return self._opened[path]

    def _coefficients(self, entry: Mapping[str, Any], name: str) -> Coefficients:
        if name in entry["coefficients"]:
            return Coefficients.from_json(entry["coefficients"][name])
        file = inside(self.root, entry["matrices"]["path"])
        values = read_tensor(file, read_header(file).tensors[name])
        return Coefficients("matrix" if values.ndim == 2 else "blocks", values)
