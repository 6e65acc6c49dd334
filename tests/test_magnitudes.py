"""Exact order statistics from blocks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from dense_reference import NAME
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics_helpers import gaussian

from bam_lora.dense_methods import DenseOptions, prepare
from bam_lora.magnitudes import magnitudes_at


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    st.data(),
)
def test_magnitudes_at_ranks_are_exact(values: list[float], data: st.DataObject) -> None:
    """Also among zeros, subnormal and equal numbers, however they are cut."""
    tensor = torch.tensor(values, dtype=torch.float32)
    height = data.draw(st.integers(1, len(values)))
    ranks = data.draw(st.lists(st.integers(1, len(values)), min_size=1, max_size=3))
    got = magnitudes_at("x", lambda: iter(tensor.split(height)), lambda count: ranks if count == len(values) else [])
    ordered = sorted((abs(value) for value in tensor.tolist()), reverse=True)
    assert got == [ordered[rank - 1] for rank in ranks]


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_no_more_than_a_few_blocks_are_alive(method: str) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def blocks(branch: int) -> Iterator[torch.Tensor]:
        nonlocal most
        for number in range(12):
            block = gaussian(8, 16, seed=number + 100 * branch)
            alive.append(weakref.ref(block))
            most = max(most, sum(reference() is not None for reference in alive))
            yield block

    combine = prepare(method, NAME, blocks, 2, [0.5, 0.5], DenseOptions())
    assert len(alive) == 2 * 2 * 12  # two passes over two branches
    assert most <= 2
    assert sum(reference() is not None for reference in alive) == 0
    assert combine([gaussian(8, 16), gaussian(8, 16, seed=1)], 0).shape == (8, 16)
