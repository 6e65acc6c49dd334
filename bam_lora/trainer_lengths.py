"""How many tokens the examples of a `BamTrainer` have, and what is left to train of them where TRL cuts them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_LABELS_MASKED = -100


def token_counts(rows: Any, limit: int | None = None) -> npt.NDArray[np.int64]:
    """Tokens of each example [examples]; of one that TRL will cut to `limit`, so many."""
    import pyarrow.compute as pc

    column = rows.with_format("arrow")[:]["input_ids"]
    counts = np.asarray(pc.list_value_length(column).to_numpy(zero_copy_only=False), dtype=np.int64)
    return counts if limit is None else np.minimum(counts, limit)


def trained_only(rows: Any, args: Any) -> Any:
    """Tokenised examples without those that TRL will drop, as what it cuts them to holds no trained token.

    Packing drops none. They go before the slices are dealt: they are nothing's share.
    """
    limit = cut_limit(args)
    if limit is None or args.packing or not len(rows):
        return rows
    kept = np.concatenate([_any_trained(batch, limit, args.truncation_mode == "keep_end")
                           for batch in rows.with_format("arrow").iter(batch_size=10_000)])  # fmt: skip
    return rows if kept.all() else rows.select(np.flatnonzero(kept))


def _any_trained(batch: Any, limit: int, at_end: bool) -> npt.NDArray[np.bool_]:
    """Whether the first (or last) `limit` labels of each example hold one that is trained [examples]."""
    import pyarrow.compute as pc

    labels = batch["labels"]
    lengths = np.asarray(pc.list_value_length(labels).to_numpy(zero_copy_only=False), dtype=np.int64)
    trained = np.asarray(pc.list_flatten(labels).to_numpy()) != _LABELS_MASKED
    before = np.concatenate([[0], np.cumsum(trained)])
    stops = np.cumsum(lengths)
    starts = stops - lengths
    if at_end:
        starts = np.maximum(starts, stops - limit)
    else:
        stops = np.minimum(stops, starts + limit)
    return np.asarray(before[stops] > before[starts])


def cut_limit(args: Any) -> int | None:
    """The number of tokens that TRL cuts an example to, or None where all its tokens are used."""
    splits = args.packing and args.packing_strategy in ("bfd_split", "wrapped")
    return None if splits or args.max_length is None else int(args.max_length)
