"""Packed rows on disk: pieces of documents side by side, one slice after the other, as an Arrow file."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bam_lora import slicing

ROWS = "rows.arrow"
_BATCH_ROWS = 256
Tokens = npt.NDArray[np.int32]


def load_rows(folder: Path, rows: tuple[int, int]) -> Any:
    """The rows `[start, stop)` of prepared data, as a memory-mapped `datasets.Dataset`."""
    import datasets

    return datasets.Dataset.from_file(str(folder / ROWS)).select(range(*rows))


def write_rows(
    path: Path,
    stores: Sequence[Tokens],
    dealt: Sequence[tuple[slicing.Pieces, slicing.Pieces]],
    sequence_length: int,
    seed: int,
    groups: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Packs each slice and writes its rows, in shuffled order, one slice after the other.

    Returns:
        Per slice its rows, its tokens, and with `groups` the group that it is of.
    """
    facts: list[dict[str, Any]] = []
    row_count = 0
    with contextlib.closing(_RowWriter(path)) as writer:
        for index, (target, replay) in enumerate(dealt):
            pieces = np.concatenate([target, replay])
            rows = slicing.pack(pieces["length"], sequence_length)
            shuffled = np.random.Generator(np.random.PCG64([seed, index])).permutation(len(rows))
            for row in shuffled:
                writer.write(stores, pieces[rows[row]])
            tokens = {"target_tokens": int(target["length"].sum()), "replay_tokens": int(replay["length"].sum())}
            group = {} if groups is None else {"group": groups[index]}
            facts.append({"rows": [row_count, row_count + len(rows)], **tokens, **group})
            row_count += len(rows)
    return facts


class _RowWriter:
    """Writes packed rows as an Arrow stream, which `datasets` memory-maps."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._pa = pa
        self._schema = pa.schema({"input_ids": pa.list_(pa.int32()), "seq_lengths": pa.list_(pa.int32())})
        self._file = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        self._tokens: list[npt.NDArray[np.int32]] = []
        self._lengths: list[list[int]] = []

    def write(self, stores: Sequence[Tokens], pieces: slicing.Pieces) -> None:
        parts = [stores[piece["store"]][piece["start"] : piece["start"] + piece["length"]] for piece in pieces]
        self._tokens.append(np.concatenate(parts))
        self._lengths.append(pieces["length"].tolist())
        if len(self._tokens) >= _BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = {"input_ids": self._tokens, "seq_lengths": self._lengths}
        self._stream.write_batch(self._pa.RecordBatch.from_pydict(columns, schema=self._schema))
        self._tokens, self._lengths = [], []

    def close(self) -> None:
        if self._tokens:
            self._flush()
        self._stream.close()
        self._file.close()
