"""Which group a document is of, where the data is sliced by data set or by the values of a column."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from bam_lora.data_files import DATA_SUFFIXES
from bam_lora.errors import UserError
from bam_lora.slicing import Lengths
from bam_lora.sources import TextSource

GROUPED = ("by_dataset", "by_column")  # values of data.slicing that deal by groups


class ColumnValues:
    """Notes the value of one column in the rows of a source as they are read: a dozen bytes a row.

    Args:
        source: What is read, for the error.
        column: The column.
    """

    def __init__(self, source: TextSource, column: str) -> None:
        self._source = source
        self._column = column
        self._codes: dict[str, int] = {}
        self._rows = array("q")
        self._values = array("i")

    def note(self, number: int, row: Mapping[str, Any]) -> None:
        """Takes row `number`, counted from 0; rows come in ascending order.

        Raises:
            UserError: If the row has no value in the column, or one that is neither text nor a number.
        """
        value = row.get(self._column)
        if not isinstance(value, str | int | bool) or value == "":
            raise UserError.of(
                f"{self._source.path}, row {number + 1}, column {self._column!r}",
                expected="text or a whole number to slice by",
                found=f"columns {', '.join(sorted(row))}" if self._column not in row else repr(value)[:60],
                remedy="Give every row a value, or name another data.slicing_column",
            )
        self._rows.append(number)
        self._values.append(self._codes.setdefault(str(value), len(self._codes)))

    @property
    def names(self) -> list[str]:
        """The values, in the order in which they came."""
        return list(self._codes)

    def labels(self, rows: Sequence[int]) -> Lengths:
        """The value of each of these rows, as an index into `names` [rows]."""
        noted = np.frombuffer(self._rows, np.int64) if self._rows else np.zeros(0, np.int64)
        values = np.frombuffer(self._values, np.int32) if self._values else np.zeros(0, np.int32)
        wanted = np.asarray(rows, dtype=np.int64)
        at = np.searchsorted(noted, wanted)
        assert np.array_equal(noted[at], wanted)
        return values[at].astype(np.int64)


def dataset_names(sources: Sequence[TextSource]) -> list[str]:
    """A short name for each source, every one different: the file or data set, and what it takes to tell them apart."""
    short = [_short(source.path) for source in sources]
    fuller = [
        "/".join([name, *([source.name] if source.name else [])]) for name, source in zip(short, sources, strict=True)
    ]
    longest = [
        f"{name} {source.split} {source.text}" if fuller.count(name) > 1 else name
        for name, source in zip(fuller, sources, strict=True)
    ]
    return [
        f"{name} ({longest[:index].count(name) + 1})" if longest.count(name) > 1 else name
        for index, name in enumerate(longest)
    ]


def _short(path: str) -> str:
    """The name of a file, folder or data set; a pattern has that of its folder."""
    parts = [part for part in PurePath(path).parts if "*" not in part and part.strip("/.~")]
    name = PurePath(parts[-1] if parts else path)
    while PurePath(path).is_absolute() and name.suffix.lower() in DATA_SUFFIXES:
        name = PurePath(name.stem)
    return name.name


def combine(names: Sequence[Sequence[str]], labels: Sequence[Lengths]) -> tuple[list[str], Lengths]:
    """The groups of several sources as one list, in the order in which they first come.

    Args:
        names: Per source the groups it holds; none for a source that is not grouped.
        labels: Per source the group of each of its documents, as an index into its names.

    Returns:
        All groups, and the group of every document of every source in order, as an index into them; -1 for those of a
        source without groups.
    """
    every = list(dict.fromkeys(name for listed in names for name in listed))
    place = {name: index for index, name in enumerate(every)}
    parts = [
        np.array([place[name] for name in listed], dtype=np.int64)[part] if listed else np.full(len(part), -1)
        for listed, part in zip(names, labels, strict=True)
    ]
    return every, np.concatenate(parts)
