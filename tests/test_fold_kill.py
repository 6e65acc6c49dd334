"""SIGKILL at random moments of a fold: never a folder that loads but is wrong, and the same bytes in the end."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from numerics_helpers import BF16, gaussian, random_adapter, write_base

from bam_lora import store
from bam_lora.checkpoint import open_checkpoint
from bam_lora.errors import UserError
from bam_lora.folding import fold

SHARDS = 6
SHAPES = {f"layers.{number}.q_proj": (1024, 512) for number in range(24)}
# Imports torch once; every fold is a fork of it that has run nothing yet.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["bam_lora.folding"])


def fold_once(connection: Connection, root: Path, adapter: str) -> None:
    """The body of the process that is killed; says when it begins and what it took over."""
    connection.send("begun")
    facts = fold(root / "base", [root / adapter], root / "work" / "out")
    connection.send((facts["seconds"], facts["resumed_shards"]))


class Folds:
    """Folds in processes of their own, and what is expected of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.output = root / "work" / "out"
        self.expected: dict[str, dict[str, str]] = {}
        self.resumed = 0
        self.struck = 0
        self.longest = 0.0

    def finish(self, adapter: str) -> None:
        """A fold that nobody kills; its bytes must be the expected ones."""
        ours, theirs = FORKS.Pipe()
        process = FORKS.Process(target=fold_once, args=(theirs, self.root, adapter))
        process.start()
        theirs.close()
        assert ours.recv() == "begun"
        seconds, resumed = ours.recv()
        process.join()
        assert process.exitcode == 0
        self.resumed += resumed
        self.longest = max(self.longest, seconds)
        got = weights(self.output)
        assert got == self.expected.setdefault(adapter, got)
        assert store.verify(self.output) is not None
        assert [path.name for path in self.output.parent.iterdir()] == ["out"]

    def kill(self, adapter: str, seconds: float) -> None:
        """A fold killed after a while, if it lasts so long; all that can be loaded afterwards must be right."""
        ours, theirs = FORKS.Pipe()
        process = FORKS.Process(target=fold_once, args=(theirs, self.root, adapter))
        process.start()
        theirs.close()
        assert ours.recv() == "begun"
        time.sleep(seconds)
        process.kill()
        process.join()
        self.struck += process.exitcode == -signal.SIGKILL  # else it was done before
        for folder in (path.parent for path in self.output.parent.rglob("config.json")):
            if loads(folder):
                assert weights(folder) in self.expected.values(), folder
        if self.output.exists():
            assert store.verify(self.output) is not None


def loads(folder: Path) -> bool:
    """Whether the headers, the index and the files' sizes agree: what a loader looks at."""
    try:
        open_checkpoint(folder)
    except UserError:
        return False
    return True


def weights(folder: Path) -> dict[str, str]:
    return {path.name: store.hash_file(path) for path in folder.iterdir() if "model" in path.name}


def kill_folds(root: Path, kills: int, seed: int) -> int:
    """Kills folds of two adapters into one output at random moments; returns the number of shards taken over."""
    tensors = {f"{module}.weight": gaussian(*shape, dtype=BF16) for module, shape in SHAPES.items()}
    write_base(root / "base", tensors, shards=SHARDS)
    folds = Folds(root)
    for number, adapter in enumerate(("first", "second")):
        random_adapter(root / adapter, SHAPES, rank=32, seed=number)
        folds.finish(adapter)
    moments = random.Random(seed)
    while folds.struck < kills:
        adapter = moments.choice(("first", "second"))
        folds.kill(adapter, moments.uniform(0, 1.1 * folds.longest))
        if moments.random() < 0.3:
            folds.kill(adapter, moments.uniform(0, folds.longest))  # the restart is killed, too
        folds.finish(moments.choice((adapter, adapter, "first", "second")))
        if moments.random() < 0.5:
            shutil.rmtree(folds.output)
    return folds.resumed


def test_killed_folds_end_with_the_same_bytes(tmp_path: Path) -> None:
    kill_folds(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_a_hundred_killed_folds_end_with_the_same_bytes(tmp_path: Path) -> None:
    assert kill_folds(tmp_path, 100, seed=1) > 50
