"""Data files on this machine: which there are under a path, of what kind, and their hashes."""

from __future__ import annotations

import glob
from pathlib import Path

from bam_lora.errors import UserError
from bam_lora.store import hash_file

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}
DATA_SUFFIXES = {*_BUILDERS, *_COMPRESSED}


def find_files(path: str) -> list[Path]:
    """The data files a local path, folder or glob stands for, sorted.

    Raises:
        UserError: If there are none.
    """
    if any(character in path for character in "*?[") and not Path(path).exists():
        found = [Path(name) for name in glob.glob(path, recursive=True)]
    elif Path(path).is_dir():
        found = [file for file in Path(path).rglob("*") if _suffix(file) in _BUILDERS]
    else:
        found = [Path(path)]
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise UserError.of(
            path,
            expected=f"a file, folder or glob with {', '.join(sorted(_BUILDERS))} data",
            found="no such file" if not Path(path).exists() else "no data file",
            remedy="Check the path; a relative one is relative to the recipe",
        )
    return files


def _suffix(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def builder_of(path: str, files: list[Path]) -> str:
    """What `datasets` reads these files with.

    Raises:
        UserError: If they are of several kinds, or of none that it reads.
    """
    kinds = {_BUILDERS.get(_suffix(file), "") for file in files}
    if len(kinds) != 1 or "" in kinds:
        raise UserError.of(
            path,
            expected=f"data files of one kind ({', '.join(sorted(_BUILDERS))})",
            found=", ".join(sorted({_suffix(file) or file.name for file in files})),
            remedy="Give files of these kinds, each kind as a source of its own",
        )
    return kinds.pop()


def file_hashes(paths: list[Path]) -> dict[str, str]:
    """SHA-256 of each file, and of all files in folders."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {str(file): hash_file(file) for file in files if file.is_file()}
