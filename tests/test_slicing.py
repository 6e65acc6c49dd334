"""Every token of the target is in exactly one slice and one row, whatever the lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_lora import slicing
from bam_lora.errors import UserError

LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=60)


def tokens_of(pieces: slicing.Pieces) -> list[tuple[int, int]]:
    """Every (store, token) that the pieces hold."""
    return [
        (int(piece["store"]), token)
        for piece in pieces
        for token in range(int(piece["start"]), int(piece["start"] + piece["length"]))
    ]


@given(st.lists(LENGTHS, min_size=1, max_size=3), st.integers(8, 64), st.integers(1, 5), st.integers(0, 9))
def test_slices_are_disjoint_exhaustive_and_balanced(
    stores: list[list[int]], length: int, count: int, seed: int
) -> None:
    table = slicing.documents([np.array(lengths) for lengths in stores])
    pieces = slicing.cut(slicing.order(table, "random", seed), length)
    total = int(table["length"].sum())
    if len(pieces) < 4 * count:
        return
    slices = slicing.deal(pieces, count)
    every = [token for part in slices for token in tokens_of(part)]
    assert len(every) == total
    assert set(every) == set(tokens_of(table))
    assert all(part["length"].max() <= length for part in slices)
    assert max(abs(int(part["length"].sum()) - total / count) for part in slices) <= length


@given(LENGTHS, st.integers(0, 2**31))
def test_order_depends_on_the_seed_alone(lengths: list[int], seed: int) -> None:
    table = slicing.documents([np.array(lengths)])
    assert np.array_equal(slicing.order(table, "random", seed), slicing.order(table, "random", seed))
    assert np.array_equal(slicing.order(table, "contiguous", seed), table)


@given(st.lists(st.integers(1, 32), min_size=1, max_size=200))
def test_packing_loses_nothing_and_overfills_nothing(lengths: list[int]) -> None:
    rows = slicing.pack(lengths, 32)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[piece] for piece in row) <= 32 for row in rows)
    half_empty = [row for row in rows if sum(lengths[piece] for piece in row) <= 16]
    assert len(half_empty) <= 1  # two of them would have been put into one


def test_packing_is_as_tight_as_trl() -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    lengths = np.random.default_rng(0).integers(1, 256, 1000).tolist()
    theirs = trl.pack_dataset(
        datasets.Dataset.from_dict({"input_ids": [[0] * length for length in lengths]}), 256, "bfd_split"
    )
    assert len(slicing.pack(lengths, 256)) <= len(theirs)


@given(LENGTHS, st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_exact_parts_are_exact(lengths: list[int], amounts: list[int]) -> None:
    table = slicing.documents([np.array(lengths)])
    available = int(table["length"].sum())
    if sum(amounts) > available:
        return
    parts = slicing.deal_exactly(table, amounts)
    assert [int(part["length"].sum()) for part in parts] == amounts
    every = [token for part in parts for token in tokens_of(part)]
    assert every == tokens_of(table)[: sum(amounts)]


def test_too_little_text_for_the_slices_is_an_error() -> None:
    pieces = slicing.cut(slicing.documents([np.array([5, 3])]), 64)
    with pytest.raises(UserError, match=r"data\.target: expected enough text for 4 slices, found 8 tokens in 2 pieces"):
        slicing.deal(pieces, 4)


@pytest.mark.parametrize(
    ("available", "weights", "total", "wanted"),
    [
        ([100, 50], [None, None], None, [100, 50]),
        ([100, 50], [None, None], 60, [40, 20]),
        ([100, 50], [3.0, 1.0], None, [100, 33]),
        ([100, 50], [1.0, 1.0], 60, [30, 30]),
        ([100, 50], [1.0, 1.0], 200, [50, 50]),
        ([10, 10, 10], [1.0, 1.0, 1.0], 10, [4, 3, 3]),
        ([3, 10, 10], [1.0, 1.0, 1.0], 10, [3, 3, 3]),
        ([100, 100], [1e-9, 1e-9], None, [100, 100]),
    ],
)
def test_quotas(available: list[int], weights: list[float | None], total: int | None, wanted: list[int]) -> None:
    assert slicing.quotas(available, weights, total) == wanted
