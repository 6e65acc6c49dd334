"""Artefacts on disk: written whole or not at all, and trusted only by their manifest.

Everything is written under a temporary name beside its place, fsynced and renamed. A folder counts only if its
manifest (`done.json`, written last) verifies; a JSON record carries its own key and hash. A *key* is the hash of
everything an artefact is a function of, so "is this step done?" is "does the artefact with this key verify?".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError

MANIFEST = "done.json"
_TEMPORARY = ".tmp-"
_HASHED_AT_ONCE = 4  # disks read no faster by more


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Sequence[Path]) -> list[str]:
    """SHA-256 (hex) of each file's bytes, several files at a time where there are cores: one hashes 1 to 2 GB/s."""
    threads = min(len(paths), (os.cpu_count() or 1) // 2, _HASHED_AT_ONCE)
    if threads < 2:
        return [hash_file(path) for path in paths]
    with ThreadPoolExecutor(threads, thread_name_prefix="hash") as pool:
        return list(pool.map(hash_file, paths))


def fsync_path(path: Path) -> None:
    """Makes a file's bytes, or a folder's entries, survive a power cut. Folders cannot be synced on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")


def write_text(path: Path, text: str) -> None:
    """Replaces a text file atomically (UTF-8)."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: If it is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError.of(str(path), expected="a file", found="nothing", remedy="Check the path") from None
    except IsADirectoryError:
        raise UserError.of(str(path), expected="a file", found="a folder", remedy="Check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError.of(str(path), expected="JSON", found=str(error), remedy="Restore or delete the file") from None


def write_record(path: Path, key: str, value: Mapping[str, Any]) -> None:
    """Writes a JSON artefact: the value plus its `key` and the `sha256` of both."""
    body = {**value, "key": key}
    write_json(path, {**body, "sha256": digest(body)})


def read_record(path: Path, key: str | None = None) -> dict[str, Any] | None:
    """Reads a JSON artefact back, or None if it is missing, damaged or was made from other inputs than `key`."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        stated = body.pop("sha256")
        whole = stated == digest(body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not whole or (key is not None and body.get("key") != key):
        return None
    return dict(body)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name whole, or not at all.

    Yields the temporary folder to fill; on success its files are synced and it takes the place of whatever stood
    at `path`. On any exception it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            fsync_path(entry)
        fsync_path(temporary)
        replace_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Renames a finished folder into its place; what stood there is moved aside first, then deleted."""
    if path.exists():
        old = _temporary(path.with_name(path.name + ".old"))
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(path)
    fsync_path(path.parent)


def seal(
    folder: Path,
    key: str,
    facts: Mapping[str, Any] | None = None,
    *,
    hashes: Mapping[str, str] | None = None,
    parts: Sequence[str] = (".",),
) -> None:
    """Writes the manifest of a folder, last: every file's size and hash, the key, and facts about the artefact.

    Args:
        folder: The finished folder.
        key: Hash of everything the artefact is a function of.
        facts: JSON values to keep with it (seconds, counts).
        hashes: SHA-256 of files by path relative to the folder, where they are known already; the rest are read.
        parts: Files and folders that make up the artefact, relative to `folder`; all of it by default.
    """
    files = {}
    found = (p for part in parts for p in ((folder / part).rglob("*") if (folder / part).is_dir() else [folder / part]))
    for path in sorted(p for p in found if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST:
            continue
        known = (hashes or {}).get(name)
        files[name] = {"bytes": path.stat().st_size, "sha256": known or hash_file(path)}
    write_record(folder / MANIFEST, key, {"format": 1, "facts": dict(facts or {}), "files": files})


def verify(folder: Path, key: str | None = None, *, quick: bool = False) -> dict[str, Any] | None:
    """The manifest of a folder if every file it lists is there unchanged, else None.

    Args:
        folder: The artefact.
        key: The key it must have, or None for any.
        quick: Compare sizes only, for files that this process has hashed already.
    """
    manifest = read_record(folder / MANIFEST, key)
    if manifest is None:
        return None
    try:
        paths = {inside(folder, name): stated for name, stated in manifest["files"].items()}
        if any(path.stat().st_size != stated["bytes"] for path, stated in paths.items()):
            return None
        if not quick and hash_files(list(paths)) != [stated["sha256"] for stated in paths.values()]:
            return None
    except (OSError, UserError, KeyError, TypeError):
        return None
    return manifest


def inside(root: Path, name: str) -> Path:
    """`root / name`, refusing absolute names, `..` and links that lead out of `root`.

    Raises:
        UserError: If the path would leave `root`.
    """
    path = root / name
    if Path(name).is_absolute() or not path.resolve().is_relative_to(root.resolve()):
        raise UserError.of(
            f"{root}", expected="paths inside this folder", found=repr(name), remedy="The file that names it is damaged"
        )
    return path


def sweep(root: Path) -> None:
    """Deletes what interrupted writers left under temporary names anywhere below `root`."""
    for path in sorted(root.rglob(f"{_TEMPORARY}*")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Checks that the disk below `folder` (or its nearest existing parent) has room.

    Raises:
        UserError: If fewer than `needed_bytes` are free.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError.of(
            f"disk space for {purpose} in {folder}",
            expected=f"{needed_bytes / 1e9:.2f} GB free",
            found=f"{free / 1e9:.2f} GB",
            remedy="Free some space or choose another output folder",
        )


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`: a hard link where the file system allows, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
