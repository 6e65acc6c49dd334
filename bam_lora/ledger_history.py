"""The ledger's entries as plain JSON values: their hash, their files, and the same entry elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.store import digest, hash_file, inside

FORMAT = 1
Entry = Mapping[str, Any]


def history_key(base: Mapping[str, Any], history: Iterable[Entry]) -> str:
    """Hash of all that the weights after a history are a function of; no path or name is part of it."""
    steps = [
        {
            "adapters": [_content(adapter["files"]) for adapter in entry["adapters"]],
            "coefficients": entry["coefficients"],
            "matrices": entry["matrices"] and entry["matrices"]["sha256"],
            "snapshot": entry["snapshot"] and entry["snapshot"]["sha256"],
        }
        for entry in history
    ]
    return digest({"format": FORMAT, "base": _content(base["files"]), "history": steps})


def _content(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {name: stated["sha256"] for name, stated in sorted(files.items())}


def file_record(root: Path, path: str) -> dict[str, Any]:
    """{"path", "bytes", "sha256"} of a file below `root`."""
    file = inside(root, path)
    return {"path": path, "bytes": file.stat().st_size, "sha256": hash_file(file)}


def history_files(history: Iterable[Entry]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, {"bytes", "sha256"}) of every file that a history rests on."""
    for entry in history:
        for adapter in entry["adapters"]:
            for name, stated in sorted(adapter["files"].items()):
                yield f"{adapter['path']}/{name}", stated
        for extra in (entry["matrices"], entry["snapshot"]):
            if extra:
                yield extra["path"], extra


def verify_files(root: Path, history: Iterable[Entry]) -> None:
    """Compares every file of a history with its hash; UserError names the first that is missing or has changed."""
    for path, stated in history_files(history):
        file = inside(root, path)
        there = file.is_file()
        if not there or file.stat().st_size != stated["bytes"] or hash_file(file) != stated["sha256"]:
            raise UserError.of(
                str(file),
                expected="the file that the ledger records",
                found="another one" if there else "nothing",
                remedy="Restore it from a backup; the model cannot be rebuilt without it",
            )


def moved(entry: Entry, folder: str) -> dict[str, Any]:
    """The same iteration with its files under `folder`, in the order of `history_files`."""
    adapters = [
        {**adapter, "path": f"{folder}/branch-{number}"} for number, adapter in enumerate(entry["adapters"], start=1)
    ]
    extras = {
        kind: {**entry[kind], "path": f"{folder}/{kind}.safetensors"} if entry[kind] else None
        for kind in ("matrices", "snapshot")
    }
    return {**entry, **extras, "adapters": adapters}
