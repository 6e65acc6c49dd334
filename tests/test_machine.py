"""The garbage collector around a run: it skips what was there before, finds what comes after, and is put back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from bam_lora.machine import spared_collections


class Node:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _unfrozen() -> Iterator[None]:
    assert gc.get_freeze_count() == 0
    yield
    gc.unfreeze()


def test_collections_skip_what_was_there_and_free_what_came_after() -> None:
    before = Node()
    with spared_collections():
        assert all(one is not before for one in gc.get_objects())
        after = Node()
        dead, frozen = weakref.ref(after), weakref.ref(before)
        del after, before
        gc.collect()
        assert dead() is None
        assert frozen() is not None
    gc.collect()
    assert frozen() is None


def test_it_is_put_back_after_an_error() -> None:
    with pytest.raises(KeyError), spared_collections():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_a_program_that_froze_its_own_keeps_that() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with spared_collections():
        assert gc.get_freeze_count() == count
    assert gc.get_freeze_count() == count
