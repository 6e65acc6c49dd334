"""Texts from where the user keeps them: Hub data sets, folders, JSON, JSONL, Parquet and text files, globs."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bam_lora import columns
from bam_lora.errors import UserError, first_line
from bam_lora.hub_data import hub_data, unreadable
from bam_lora.hub_errors import Repository
from bam_lora.store import hash_file

if TYPE_CHECKING:
    from bam_lora.recipe import EvaluationSource, Source

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}
DATA_SUFFIXES = {*_BUILDERS, *_COMPRESSED}


@dataclass(frozen=True)
class TextSource:
    """Where some text is. A `path` that is absolute is local (file, folder or glob), any other is a Hub id.

    `mode` "chat" says that the rows are conversations, not texts.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text: str = "text"
    mode: str = "text"

    @property
    def is_local(self) -> bool:
        """Whether the source is on this machine."""
        return Path(self.path).is_absolute()


def text_source(source: Source | EvaluationSource) -> TextSource:
    """Where a source of the recipe is."""
    return TextSource(source.path, source.name, source.split, source.revision, source.text, source.mode or "text")


@dataclass
class OpenSource:
    """A source ready to be read: an iterable of rows and what exactly it is."""

    rows: Any
    facts: dict[str, Any] = field(default_factory=dict)
    empty_rows: int = 0  # rows without text, of those read so far


@dataclass(frozen=True)
class Shuffle:
    """Reading in another order: `buffer` rows of a stream are held at once; `seed` decides."""

    buffer: int
    seed: int


def open_source(
    source: TextSource, *, streaming: bool, cache: Path, shuffle: Shuffle | None = None, commit: str | None = None
) -> OpenSource:
    """Finds a source and opens it without reading it.

    Args:
        source: Where the text is.
        streaming: Read rows as they come instead of fetching or converting everything first. A split with a range
            (`train[:50%]`) cannot be streamed and is converted whatever this says.
        cache: Folder for what `datasets` converts; the caller deletes it.
        shuffle: Give the rows in shuffled order, the same for the same data, streaming and shuffle.
        commit: Commit of a Hub data set that was read before and is read on; None takes that of its revision.

    Returns:
        The rows and facts: Hub commit, or SHA-256 of each file.

    Raises:
        UserError: If it is missing, empty of data files, or cannot be opened.
    """
    import datasets

    arguments: dict[str, Any] = {"split": source.split, "streaming": streaming and "[" not in source.split}
    if not arguments["streaming"]:
        arguments["cache_dir"] = str(cache)
    builder = None
    if source.is_local:
        if _is_saved_dataset(Path(source.path)):
            return OpenSource(_shuffled(_load_saved(source), shuffle), {"files": _hashes([Path(source.path)])})
        files = find_files(source.path)
        if not any(file.stat().st_size for file in files):
            return OpenSource([], {"files": _hashes(files)})
        arguments.update(data_files=[glob.escape(str(file)) for file in files])
        builder = _builder(source.path, files)
        if builder == "text":
            arguments["sample_by"] = "document"
        facts: dict[str, Any] = {"files": _hashes(files)}
    else:
        data = hub_data(_repository(source), commit, streaming=arguments["streaming"])
        facts = {"commit": data.at.revision}
    try:
        rows = datasets.load_dataset(builder, **arguments) if builder else data.load(arguments, source.name, cache)
        return OpenSource(_shuffled(rows, shuffle), facts)
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(source, error) from error


def _shuffled(rows: Any, shuffle: Shuffle | None) -> Any:
    if shuffle is None:
        return rows
    if hasattr(rows, "__len__"):  # in memory: beside a saved data set no index file of ours should appear
        return rows.shuffle(seed=shuffle.seed, keep_in_memory=True)
    return rows.shuffle(seed=shuffle.seed, buffer_size=shuffle.buffer)


def read_texts(
    source: TextSource,
    opened: OpenSource,
    *,
    skip_rows: int = 0,
    note: Callable[[int, Mapping[str, Any]], None] | None = None,
) -> Iterator[tuple[int, str]]:
    """Row numbers and texts of an open source; rows whose text is empty or missing are passed over.

    Rows are numbered from 0 in the order in which they are read.
    `note` sees every row that has text, with its number.

    Raises:
        UserError: If the text column is missing or does not hold text, or the data cannot be read.
    """
    for number, row in read_rows(source, opened, skip_rows=skip_rows):
        if source.text not in row:
            raise UserError.of(
                source.path,
                expected=f"a column {source.text!r}",
                found=f"columns {columns.names(row)}",
                remedy=columns.text_remedy(row),
            )
        text = row[source.text]
        if text is not None and not isinstance(text, str):
            raise UserError.of(
                f"{source.path}, row {number + 1}, column {source.text!r}",
                expected="text",
                found=type(text).__name__,
                remedy="Name another column in this source's `text:`",
            )
        if text and not text.isspace():
            if note is not None:
                note(number, row)
            yield number, text
        else:
            opened.empty_rows += 1


def read_rows(
    source: TextSource,
    opened: OpenSource,
    *,
    skip_rows: int = 0,
    note: Callable[[int, Mapping[str, Any]], None] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers, from 0 in the order of reading, and rows of an open source; `note` sees every one.

    Raises:
        UserError: If the data cannot be read.
    """
    if hasattr(opened.rows, "__len__") and len(opened.rows) <= skip_rows:
        return
    rows = opened.rows.skip(skip_rows) if skip_rows else opened.rows
    iterator = enumerate(rows, start=skip_rows)
    while True:
        try:
            number, row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise _unreadable(source, error) from error
        if note is not None:
            note(number, row)
        yield number, row


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


def _builder(path: str, files: list[Path]) -> str:
    kinds = {_BUILDERS.get(_suffix(file), "") for file in files}
    if len(kinds) != 1 or "" in kinds:
        raise UserError.of(
            path,
            expected=f"data files of one kind ({', '.join(sorted(_BUILDERS))})",
            found=", ".join(sorted({_suffix(file) or file.name for file in files})),
            remedy="Give files of these kinds, each kind as a source of its own",
        )
    return kinds.pop()


def _hashes(paths: list[Path]) -> dict[str, str]:
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {str(file): hash_file(file) for file in files if file.is_file()}


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _load_saved(source: TextSource) -> Any:
    import datasets

    loaded = datasets.load_from_disk(source.path)
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise UserError.of(
                source.path,
                expected=f"a split {source.split!r}",
                found=", ".join(sorted(map(str, loaded))),
                remedy="Name one of them in this source's `split:`",
            )
        return loaded[source.split]
    return loaded


def _repository(source: TextSource) -> Repository:
    return Repository(source.path, source.revision, "dataset")


def _unreadable(source: TextSource, error: Exception) -> UserError:
    if not source.is_local:
        return unreadable(_repository(source), error)
    return UserError.of(
        source.path,
        expected="readable data",
        found=f"{type(error).__name__}: {first_line(error.__cause__ or error)}",
        remedy="Check the file",
    )
