"""A map from 64-bit keys to row numbers in sorted numpy arrays: 12 bytes an entry, filled and asked in batches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]


class SortedRuns:
    """Keys with the rows they belong to; a key may have many rows.

    Each batch becomes one sorted run; a run is merged with the one before it as soon as that is not twice as long
    (a log-structured merge), so there are about log2 of the entries of them, and merging needs as much room again.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[Keys, npt.NDArray[np.int32]]] = []

    def add(self, keys: Keys, rows: Rows) -> None:
        """Enters keys (n,) with their rows (n,)."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        self._runs.append((keys[order], rows[order].astype(np.int32)))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            (older, older_rows), (newer, newer_rows) = self._runs[-2:]
            merged = np.concatenate([older, newer])
            order = np.argsort(merged, kind="stable")
            self._runs[-2:] = [(merged[order], np.concatenate([older_rows, newer_rows])[order])]

    def find(self, keys: Keys, limit: int | None = None) -> tuple[Rows, Rows]:
        """All entries under the keys asked for (q,).

        Args:
            keys: What is looked for.
            limit: At most so many entries per key and run, the oldest; None for all.

        Returns:
            Which of `keys` each entry found answers (m,), and its row (m,).
        """
        asked: list[Rows] = [np.zeros(0, np.int64)]
        found: list[Rows] = [np.zeros(0, np.int64)]
        for run, rows in self._runs:
            first = np.searchsorted(run, keys, side="left")
            hit = np.flatnonzero(run[np.minimum(first, len(run) - 1)] == keys)
            first = first[hit]
            counts = np.searchsorted(run, keys[hit], side="right") - first
            if limit is not None:
                counts = np.minimum(counts, limit)
            offset = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            asked.append(np.repeat(hit, counts))
            found.append(rows[np.repeat(first, counts) + offset].astype(np.int64))
        return np.concatenate(asked), np.concatenate(found)
