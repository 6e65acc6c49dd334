"""Texts from where the user keeps them: Hub data sets, folders, JSON, JSONL, Parquet and text files, globs."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bam_lora import columns
from bam_lora.data_files import builder_of, file_hashes, find_files
from bam_lora.errors import UserError, first_line
from bam_lora.hub_data import hub_data, unreadable
from bam_lora.hub_errors import Repository
from bam_lora.library_versions import first_rows
from bam_lora.row_filter import RowFilter, Where

if TYPE_CHECKING:
    from bam_lora.recipe import EvaluationSource, Source


@dataclass(frozen=True)
class TextSource:
    """Where some text is. A `path` that is absolute is local (file, folder or glob), any other is a Hub id.

    `mode` "chat" says that the rows are conversations, not texts; `where` chooses rows by their columns.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text: str = "text"
    mode: str = "text"
    where: Where | None = None

    def described(self) -> dict[str, Any]:
        """In plain types, for keys and records; `where` only if there is one: earlier versions had none."""
        chosen = {"where": self.where.to_json()} if self.where is not None else {}
        return {**{name: value for name, value in vars(self).items() if name != "where"}, **chosen}

    @property
    def is_local(self) -> bool:
        """Whether the source is on this machine."""
        return Path(self.path).is_absolute()


def text_source(source: Source | EvaluationSource) -> TextSource:
    """Where a source of the recipe is."""
    where = Where.of(source.where)
    return TextSource(
        source.path, source.name, source.split, source.revision, source.text, source.mode or "text", where
    )


_MOST_ROWS, _MOST_SECONDS = 100_000, 60.0  # looked through where only a sample is wanted and `where` may choose few


@dataclass
class OpenSource:
    """A source ready to be read: an iterable of rows and what exactly it is."""

    rows: Any
    facts: dict[str, Any] = field(default_factory=dict)
    empty_rows: int = 0  # rows without text, of those read so far
    filter: RowFilter | None = None  # what its `where` made of those read so far
    most_rows: int | None = None  # of which only so many, or fewer, are given
    say: Callable[[str], None] | None = None  # receives a line now and then where its `where` chooses few
    patience_seconds: float | None = None  # how long rows that its `where` chooses are looked for
    may_be_empty: bool = False  # whether it is no error if none is found among the rows that are looked at

    @property
    def left_out(self) -> int:
        """Rows that the source's `where` left out, of those read so far."""
        return self.filter.left_out if self.filter is not None else 0

    def take(self, rows: int) -> None:
        """Gives the first rows only."""
        if hasattr(self.rows, "take"):
            self.rows = first_rows(self.rows, rows)
            self.most_rows = rows

    def sample(self, *, may_be_empty: bool = False) -> None:
        """Looks for rows that its `where` chooses among the first 100,000 only, and for a minute."""
        self.take(_MOST_ROWS)
        self.patience_seconds, self.may_be_empty = _MOST_SECONDS, may_be_empty


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
            return OpenSource(_shuffled(_load_saved(source), shuffle), {"files": file_hashes([Path(source.path)])})
        files = find_files(source.path)
        if not any(file.stat().st_size for file in files):
            return OpenSource([], {"files": file_hashes(files)})
        arguments.update(data_files=[glob.escape(str(file)) for file in files])
        builder = builder_of(source.path, files)
        if builder == "text":
            arguments["sample_by"] = "document"
        facts: dict[str, Any] = {"files": file_hashes(files)}
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

    Rows that the source's `where` leaves out are passed over; they count in the numbers.

    Raises:
        UserError: If the data cannot be read, or `where` names a column or a value that is not there.
    """
    if source.where is not None and opened.filter is None:
        opened.filter = RowFilter(source.path, source.where, opened.say, opened.patience_seconds)
    if hasattr(opened.rows, "__len__") and len(opened.rows) <= skip_rows:
        return
    rows = opened.rows.skip(skip_rows) if skip_rows else opened.rows
    iterator = enumerate(rows, start=skip_rows)
    while True:
        try:
            number, row = next(iterator)
        except StopIteration:
            if opened.filter is not None and not skip_rows:  # what is read on may hold none of it
                cut = opened.most_rows is not None and opened.filter.read >= opened.most_rows
                if not (cut and opened.may_be_empty):
                    opened.filter.require_found(all_values=opened.most_rows is None, cut=cut)
            return
        except Exception as error:
            raise _unreadable(source, error) from error
        if opened.filter is not None and not opened.filter.takes(row):
            if opened.filter.tired:
                if not opened.may_be_empty:
                    opened.filter.require_found(all_values=False, cut=True)
                return
            continue
        if note is not None:
            note(number, row)
        yield number, row


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
        found=f"{type(error).__name__}: {first_line(error.__cause__ or error).rstrip('.')}",
        remedy="Check the file",
    )
