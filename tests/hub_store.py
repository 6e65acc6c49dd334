"""What a local Hub holds: repositories with their commits, tokens, and how files of data sets are made."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Rows = Iterable[Mapping[str, Any]]
Files = Mapping[str, bytes | str]

LARGE = (".safetensors", ".parquet", ".bin", ".arrow", ".gz", ".zst", ".model")  # by LFS, as the real Hub's defaults
LARGE_BYTES = 10_000_000


@dataclass(frozen=True)
class Token:
    """Whose it is, whether it may write (role `read` or `write`), and to which gated repositories it has access."""

    user: str
    role: str
    access: frozenset[str] = frozenset()


@dataclass
class Repository:
    """One repository: each commit is all of its files, by path."""

    name: str
    kind: str  # "model" or "dataset"
    gated: bool = False
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], message: str, branch: str = "main") -> str:
        """Makes these the files of a branch; returns the commit."""
        parent = self.branches.get(branch, "")
        listing = json.dumps([self.kind, self.name, parent, message, {n: object_id(n, c) for n, c in files.items()}])
        commit = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.messages[commit] = message
        self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit, or None."""
        if revision in self.commits:
            return revision
        return self.branches.get(revision, self.tags.get(revision))


def is_large(path: str, size: int) -> bool:
    """Whether a file is kept by its SHA-256 (LFS) instead of in git."""
    return size > 0 and (path.endswith(LARGE) or size > LARGE_BYTES)


def git_hash(content: bytes) -> str:
    """The hash that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def object_id(path: str, content: bytes) -> str:
    """The ETag of a file: SHA-256 of a large one, git's hash of any other."""
    return hashlib.sha256(content).hexdigest() if is_large(path, len(content)) else git_hash(content)


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the tree lists it."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
    if is_large(path, len(content)):
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return found


def listing(files: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]] | None:
    """The files and folders below a folder; None if there is no such folder."""
    prefix = f"{folder}/" if folder else ""
    below = {path: content for path, content in files.items() if path.startswith(prefix)}
    if folder and not below:
        return None
    folders = set()
    found = []
    for path, content in sorted(below.items()):
        parts = path[len(prefix) :].split("/")
        depth = len(parts) if recursive else min(len(parts), 2)
        folders |= {prefix + "/".join(parts[:end]) for end in range(1, depth)}
        if recursive or len(parts) == 1:
            found.append(entry(path, content))
    names = [{"type": "directory", "path": name, "size": 0, "oid": git_hash(name.encode())} for name in sorted(folders)]
    return names + found


def read_files(source: Path | Files) -> dict[str, bytes]:
    """The content of every file of a folder, or of a mapping of texts and bytes, by path."""
    if isinstance(source, Path):
        return {p.relative_to(source).as_posix(): p.read_bytes() for p in sorted(source.rglob("*")) if p.is_file()}
    return {path: content.encode() if isinstance(content, str) else content for path, content in source.items()}


def dataset_files(
    configs: Mapping[str, Mapping[str, Rows]], *, format: str, layout: str, card: str
) -> dict[str, bytes]:
    """The files of a data set.

    Args:
        configs: Rows by configuration and split; the first configuration is the default one.
        format: parquet or jsonl.
        layout: "card": configurations are declared in README.md; "folders": in `data/` by the names of files alone,
            which is one configuration.
        card: Text of README.md below its front matter.
    """
    files: dict[str, bytes] = {}
    declared = []
    for number, (config, splits) in enumerate(configs.items()):
        folder = "data" if layout == "folders" else config
        paths = []
        for split, rows in splits.items():
            path = f"{folder}/{split}-00000-of-00001.{format}" if format == "parquet" else f"{folder}/{split}.{format}"
            files[path] = encode_rows(list(rows), format)
            paths.append({"split": split, "path": path})
        declared.append({"config_name": config, "data_files": paths, **({"default": True} if number == 0 else {})})
    front = {"license": "cc0-1.0", **({"configs": declared} if layout == "card" else {})}
    files["README.md"] = f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{card}\n".encode()
    return files


def encode_rows(rows: list[Mapping[str, Any]], format: str) -> bytes:
    """Rows as the bytes of a Parquet or JSON Lines file."""
    if format == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    import pyarrow as pa
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()
