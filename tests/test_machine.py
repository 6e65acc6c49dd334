"""The machine: the garbage collector around a run, put back afterwards; memory that goes back to the system."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from bam_lora.machine import holds_frozen_objects, spared_collections


class Node:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def alone(program: str) -> None:
    """Runs it in a process of its own: threads that other tests have left here take and free memory meanwhile."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def _unfrozen() -> Iterator[None]:
    assert not holds_frozen_objects()
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
        assert holds_frozen_objects()
    gc.collect()
    assert frozen() is None


def test_it_is_put_back_after_an_error() -> None:
    with pytest.raises(KeyError), spared_collections():
        raise KeyError
    assert not holds_frozen_objects()


ITS_OWN = """
import gc
from bam_lora.machine import spared_collections
gc.freeze()
count = gc.get_freeze_count()
with spared_collections():
    assert gc.get_freeze_count() == count
assert gc.get_freeze_count() == count
"""


def test_a_program_that_froze_its_own_keeps_that() -> None:
    alone(ITS_OWN)


LARGE_BLOCKS = """
import psutil
import torch
from bam_lora import machine

def resident():
    return int(psutil.Process().memory_info().rss)

with machine.large_blocks_apart():
    blocks = [torch.ones(2 << 20) for _ in range(20)]  # 8 MB each
    small = [torch.ones(1 << 14) for _ in range(20)]  # what keeps a heap from shrinking
    before = resident()
    del blocks
    assert before - resident() > 120 << 20
assert len(small) == 20
machine.trim_heap()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc only")
def test_large_blocks_go_back_to_the_system_when_they_are_freed() -> None:
    alone(LARGE_BLOCKS)


def test_compiled_kernels_of_ever_new_shapes_are_let_go() -> None:
    """On processors that compile them they are 2 MB a shape: 500 MB for 250 shapes."""
    alone("""
import psutil
import torch

from bam_lora.machine import bound_kernel_caches

bound_kernel_caches()
weight = torch.ones(256, 512, dtype=torch.bfloat16)
sizes = []
for rows in range(300, 700):
    torch.ones(rows, 512, dtype=torch.bfloat16) @ weight.T
    if rows in (449, 699):
        sizes.append(psutil.Process().memory_info().rss)
assert sizes[1] - sizes[0] < 60e6, sizes
""")


def test_a_loaded_base_has_bounded_them_and_the_users_own_setting_stays(tiny_base: Path) -> None:
    alone(f"""
import os
os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
os.environ["LRU_CACHE_CAPACITY"] = "7"
from pathlib import Path
from bam_lora.base import Loading, load_model
load_model(Path({str(tiny_base)!r}), Loading(16))
assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
assert os.environ["LRU_CACHE_CAPACITY"] == "7"
""")
