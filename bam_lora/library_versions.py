"""Where the oldest libraries that are allowed behave otherwise than the newest, and what makes them alike."""

from __future__ import annotations

from typing import Any


def seed_the_adapter(seed: int) -> None:
    """Seeds every generator before a trainer is made, which draws the adapter's first values.

    TRL 1.16 does this itself with the trainer's seed; 1.10 draws them from whatever came before, so that a branch would
    begin otherwise in a run that was interrupted than in one that was not.

    Args:
        seed: The trainer's seed, so that nothing changes where TRL seeds, too.
    """
    import transformers

    transformers.set_seed(seed)


def first_rows(rows: Any, count: int) -> Any:
    """The first rows of a data set, or all of it where it has fewer.

    datasets 5.2 takes what is there; 5.0 raises IndexError where a data set that is not streamed has too few.

    Args:
        rows: A `Dataset` or `IterableDataset`.
        count: How many at the most.
    """
    return rows.take(min(count, len(rows)) if hasattr(rows, "__len__") else count)
