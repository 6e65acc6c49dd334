"""The ledger's entries as plain JSON values: their hash, their files, and the same entry elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.store import digest, hash_file, inside, link_or_copy

FORMAT = 1
PARENT = "parent"  # the folder of a run that holds the files of one that it continues
_VOCABULARY = "vocabulary"
Entry = Mapping[str, Any]


def history_key(base: Mapping[str, Any], history: Iterable[Entry]) -> str:
    """Hash of all that the weights after a history are a function of; no path or name is part of it."""
    steps = [
        {
            "adapters": [_content(adapter["files"]) for adapter in entry["adapters"]],
            "coefficients": entry["coefficients"],
            "matrices": entry["matrices"] and entry["matrices"]["sha256"],
            "snapshot": entry["snapshot"] and entry["snapshot"]["sha256"],
            **({"same": entry["snapshot"]["same"]} if entry["snapshot"] and entry["snapshot"].get("same") else {}),
        }
        for entry in history
    ]
    grown = {"vocabulary": _content(base["vocabulary"]["files"])} if base.get("vocabulary") else {}
    return digest({"format": FORMAT, "base": _content(base["files"]), "history": steps, **grown})


def _content(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {name: stated["sha256"] for name, stated in sorted(files.items())}


def file_record(root: Path, path: str) -> dict[str, Any]:
    """{"path", "bytes", "sha256"} of a file below `root`."""
    file = inside(root, path)
    return {"path": path, "bytes": file.stat().st_size, "sha256": hash_file(file)}


def snapshot_record(root: Path, path: str, names: Iterable[str], same: Mapping[str, str]) -> dict[str, Any]:
    """What a ledger's entry says of whole weights: the file, and which weights it gives.

    Args:
        root: The run's folder.
        path: The file, relative to it.
        names: The weights that it gives.
        same: {one of them that is no tensor of its own: the tensor that it is equal to}.
    """
    record = file_record(root, path) | {"names": sorted(names)}
    return record | {"same": dict(sorted(same.items()))} if same else record


def newest_snapshot(history: Sequence[Entry], name: str) -> tuple[int, tuple[str, str] | None]:
    """Where a weight's newest snapshot is.

    Returns:
        (position of the first iteration after it, (its file, the tensor in it)), or (0, None).
    """
    for position in range(len(history), 0, -1):
        snapshot = history[position - 1]["snapshot"]
        if snapshot and name in snapshot["names"]:
            return position, (snapshot["path"], snapshot.get("same", {}).get(name, name))
    return 0, None


def superseded(history: Sequence[Entry]) -> set[str]:
    """Paths of the snapshots whose every weight has a newer one in the history: replay never reads them."""
    newer: set[str] = set()
    found = set()
    for entry in reversed(history):
        if entry["snapshot"]:
            names = set(entry["snapshot"]["names"])
            if names <= newer:
                found.add(entry["snapshot"]["path"])
            newer |= names
    return found


def history_files(history: Sequence[Entry]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, {"bytes", "sha256"}) of every file that a history rests on."""
    needless = superseded(history)
    for entry in history:
        for adapter in entry["adapters"]:
            for name, stated in sorted(adapter["files"].items()):
                yield f"{adapter['path']}/{name}", stated
        for extra in (entry["matrices"], entry["snapshot"]):
            if extra and extra["path"] not in needless:
                yield extra["path"], extra


def vocabulary_files(base: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(path, {"bytes", "sha256"}) of every file of the new tokens that a ledger's base was given, if it was."""
    if vocabulary := base.get("vocabulary"):
        for name, stated in sorted(vocabulary["files"].items()):
            yield f"{vocabulary['path']}/{name}", stated


def verify_files(root: Path, base: Mapping[str, Any], history: Sequence[Entry]) -> None:
    """Compares every file of a run with its hash; UserError names the first that is missing or has changed."""
    for path, stated in [*vocabulary_files(base), *history_files(history)]:
        file = inside(root, path)
        there = file.is_file()
        if not there or file.stat().st_size != stated["bytes"] or hash_file(file) != stated["sha256"]:
            whole = "names" in stated and not there
            raise UserError.of(
                str(file),
                expected="the file that the ledger records",
                found="another one" if there else "nothing",
                remedy="Whole weights of earlier iterations are kept with keep.bases: all only"
                if whole
                else "Restore it from a backup; the model cannot be rebuilt without it",
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


def link_vocabulary(root: Path, base: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A run's base for one that continues it; links (or copies) what grew its vocabulary into its `parent/`."""
    if not base.get("vocabulary"):
        return dict(base)
    moved_to = f"{PARENT}/{_VOCABULARY}"
    there = {**base, "vocabulary": {**base["vocabulary"], "path": moved_to}}
    for (source, _), (target, _) in zip(vocabulary_files(base), vocabulary_files(there), strict=True):
        link_or_copy(inside(root, source), folder / Path(target).relative_to(PARENT))
    return there


def link_history(root: Path, history: Sequence[Entry], folder: Path) -> list[dict[str, Any]]:
    """Links (or copies) the files of a run's history into a folder that will stand at `parent/` of another run.

    Args:
        root: The run whose history it is.
        history: Its entries.
        folder: Where the files go.

    Returns:
        The entries with their paths there.
    """
    needless = superseded(history)
    result = []
    for number, entry in enumerate(history, start=1):
        there = moved(entry, f"{PARENT}/{number:02d}")
        for (source, _), (target, _) in zip(history_files([entry]), history_files([there]), strict=True):
            if source not in needless:
                link_or_copy(inside(root, source), folder / Path(target).relative_to(PARENT))
        result.append(there)
    return result
