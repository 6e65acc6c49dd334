"""Packed rows on disk: pieces of documents side by side, one slice after the other, as an Arrow file.

With chat data they have `labels`, too: the tokens that are trained, and `NOT_TRAINED` elsewhere.
"""

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
Mask = npt.NDArray[np.uint8]
NOT_TRAINED = -100  # what the loss passes over


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
    masks: Sequence[Mask | None] = (),
) -> list[dict[str, Any]]:
    """Packs each slice and writes its rows, in shuffled order, one slice after the other.

    Args:
        path: The Arrow file.
        stores: Tokens of each store.
        dealt: Per slice its target and replay pieces.
        sequence_length: Tokens a row can hold.
        seed: Of the order.
        groups: The group that each slice is of, or None.
        masks: Per store, 1 where a token is trained [tokens], or None: all are. Rows have labels if any has a mask.

    Returns:
        Per slice its rows [start, stop), its tokens and, with `groups`, its group. `trained_tokens` are those that the
        loss counts: a document's first token is none of them, as nothing predicts it.
    """
    facts: list[dict[str, Any]] = []
    row_count = 0
    with contextlib.closing(_RowWriter(path, masks)) as writer:
        for index, (target, replay) in enumerate(dealt):
            pieces = np.concatenate([target, replay])
            rows = slicing.pack(pieces["length"], sequence_length)
            shuffled = np.random.Generator(np.random.PCG64([seed, index])).permutation(len(rows))
            trained = sum(writer.write(stores, pieces[rows[row]]) for row in shuffled)
            tokens = {"target_tokens": int(target["length"].sum()), "replay_tokens": int(replay["length"].sum())}
            group = {} if groups is None else {"group": groups[index]}
            tokens["trained_tokens"] = trained
            facts.append({"rows": [row_count, row_count + len(rows)], **tokens, **group})
            row_count += len(rows)
    return facts


class _RowWriter:
    """Writes packed rows as an Arrow stream, which `datasets` memory-maps."""

    def __init__(self, path: Path, masks: Sequence[Mask | None] = ()) -> None:
        import pyarrow as pa

        self._pa = pa
        self._masks = masks
        names = ["input_ids", "seq_lengths"]
        if any(mask is not None for mask in masks):
            names.insert(1, "labels")
        self._schema = pa.schema({name: pa.list_(pa.int32()) for name in names})
        self._file = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        self._columns: dict[str, list[Any]] = {name: [] for name in names}

    def write(self, stores: Sequence[Tokens], pieces: slicing.Pieces) -> int:
        """Writes a row, and returns how many of its tokens are trained."""
        parts = [stores[piece["store"]][piece["start"] : piece["start"] + piece["length"]] for piece in pieces]
        self._columns["input_ids"].append(np.concatenate(parts))
        self._columns["seq_lengths"].append(pieces["length"].tolist())
        if "labels" in self._columns:
            labels = np.concatenate([self._labels(part, piece) for part, piece in zip(parts, pieces, strict=True)])
            self._columns["labels"].append(labels)
            trained = int((labels != NOT_TRAINED).sum())
        else:
            trained = int(pieces["length"].sum()) - len(pieces)
        if len(self._columns["input_ids"]) >= _BATCH_ROWS:
            self._flush()
        return trained

    def _labels(self, tokens: Tokens, piece: np.void) -> Tokens:
        mask = self._masks[piece["store"]]
        labels = tokens.copy()
        if mask is not None:
            labels[mask[piece["start"] : piece["start"] + piece["length"]] == 0] = NOT_TRAINED
        labels[0] = NOT_TRAINED  # else the last token of the document before would be trained to say it
        return labels

    def _flush(self) -> None:
        self._stream.write_batch(self._pa.RecordBatch.from_pydict(self._columns, schema=self._schema))
        self._columns = {name: [] for name in self._columns}

    def close(self) -> None:
        if self._columns["input_ids"]:
            self._flush()
        self._stream.close()
        self._file.close()
