"""What the GPU benchmark does, the most important first, and about how long each part takes.

A job that by its guess does not fit into what is left of the time is passed over. The guesses are of one H200, until a
run has measured them, from these parts: 15 s to start Python with its libraries and CUDA; 15 s to read 16 GB from the
page cache and to quantise them; 16,384 tokens of an 8 B model are 2.6e14 operations forward, as many for the backward
pass and as many again for checkpointing, at a third of the 7.9e14 a second that a large product reaches: 2 s a step
without checkpointing, 3 s with it. What a job writes is counted apart, as the disk's speed is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEARNING_RATE = 2e-4
WAYS = ("ours", "trl-best", "trl-defaults", "trl-best-fp32", "ours-again", "unsloth", "axolotl")
"""Whose speed is measured; `ours-again` says how much two runs differ that are the same in everything."""
SPEED = {"length": 2048, "batch": 1, "accumulation": 8, "checkpointing": False}
"""Of all who are compared in speed: what `check --fit` chooses for the 8 B shape on 24 GB."""
_STEP_TOKENS = 16384


@dataclass(frozen=True)
class Job:
    """One job: a script of this folder with its settings.

    Attributes:
        name: What results call it.
        kind: "branch", "speed", "fold" or "run".
        order: Jobs go by this.
        shape: The model, which has to be made before.
        settings: What the script is given, but for `work` and `device`.
        seconds: About how long it takes, writing apart.
        written_gb: What it writes and syncs, in 10^9 bytes.
        card_gib: Memory of the card that the GPU is held down to; None: all of it.
        way: For "speed": who trains.
        instead_of: The job that this one is done for if it has failed; None: done anyway.
    """

    name: str
    kind: str
    order: int
    shape: str
    settings: dict[str, Any]
    seconds: float
    card_gib: float | None = None
    way: str | None = None
    written_gb: float = 0.0
    instead_of: str | None = None


@dataclass(frozen=True)
class Scale:
    """How much of everything a shape gets."""

    step_tokens: int
    branch_steps: int
    speed: dict[str, Any]
    speed_steps: int
    scored_documents: int
    text_tokens: int
    input_seconds: float
    base_gb: float
    adapters_gb: float = 1.3

    @property
    def input_gb(self) -> float:
        """What the making of its inputs writes."""
        return self.base_gb + self.adapters_gb


def _large(base_gb: float, adapters_gb: float) -> Scale:
    return Scale(_STEP_TOKENS, 8, SPEED, 20, 64, 500_000, 40, base_gb, adapters_gb)


_TINY_SPEED = {"length": 64, "batch": 1, "accumulation": 1, "checkpointing": False}
SCALES = {
    "llama-3.1-8b": _large(16.1, 1.3),
    "mistral-7b-v0.3": _large(14.5, 1.3),
    "qwen3-4b": _large(8.0, 1.1),
    "qwen3-0.6b": _large(1.2, 0.3),
    "tiny": Scale(64, 3, _TINY_SPEED, 3, 1, 8_000, 20, 0.0, 0.0),
}
"""Every shape, the most important first."""
# Shape: (order, card in GiB, sequence length, seconds) of its branches.
_BRANCHES: dict[str, list[tuple[int, float, int, float]]] = {
    "llama-3.1-8b": [(10, 12, 2048, 85), (11, 24, 8192, 90), (60, 24, 2048, 75), (61, 24, 512, 75),
                     (62, 24, 4096, 85), (63, 24, 1024, 75), (70, 16, 2048, 85), (71, 16, 8192, 90)],
    "mistral-7b-v0.3": [(80, 12, 2048, 85), (81, 24, 8192, 90)],
    "qwen3-4b": [(72, 8, 2048, 70), (73, 12, 8192, 75)],
    "qwen3-0.6b": [(74, 8, 2048, 50), (75, 8, 8192, 55)],
    "tiny": [(10, 12, 32, 30), (11, 24, 64, 30)],
}  # fmt: skip
_INSTEAD = [("llama-3.1-8b", 12, 2048)]  # tried again in the least memory if what `check --fit` chooses does not fit
_SPEED_ORDER = {"ours": 20, "trl-best": 21, "trl-best-fp32": 33, "trl-defaults": 34, "ours-again": 35, "unsloth": 50,
                "axolotl": 90}  # fmt: skip
_SPEED_SECONDS = {"unsloth": 180.0, "axolotl": 300.0}  # they compile
LEAST = ", one row at a time"  # of a job's name
_COMPARED = ("llama-3.1-8b", "tiny")  # shapes that are folded, run as a whole, and trained by the peers, too


def jobs(shapes: Sequence[str], ways: Sequence[str]) -> list[Job]:
    """All jobs of some shapes in the order of their importance; inputs are made when a job first needs them."""
    found: list[Job] = []
    for shape in shapes:
        found += branches(shape)
        if shape in _COMPARED:
            found += [speed(shape, way) for way in ways] + [fold(shape), run(shape)]
    return sorted(found, key=lambda job: job.order)


def branches(shape: str) -> list[Job]:
    """Branches of a shape at several lengths, each on a card."""
    scale = SCALES[shape]
    found = []
    for order, card, length, seconds in _BRANCHES[shape]:
        name = f"branch {shape}, length {length}, {card:g} GB"
        settings = {"shape": shape, "length": length, "step_tokens": max(length, scale.step_tokens),
                    "steps": scale.branch_steps, "learning_rate": LEARNING_RATE, "card_gib": card}  # fmt: skip
        found.append(Job(name, "branch", order, shape, settings, seconds, card))
        if (shape, card, length) in _INSTEAD:
            least = {**settings, "fit": False}
            found.append(Job(f"{name}{LEAST}", "branch", order, shape, least, seconds, card, instead_of=name))
    return found


def speed(shape: str, way: str) -> Job:
    """A branch of a peer or of ours by the peers' script, all with the same settings and the whole GPU."""
    scale = SCALES[shape]
    common = {"rank": 64, "learning_rate": LEARNING_RATE, "seed": 0, "steps": scale.speed_steps}
    seconds = _SPEED_SECONDS.get(way, 95.0) if shape != "tiny" else 30.0
    settings = {**scale.speed, **common, "way": way.removesuffix("-again")}
    return Job(f"speed {shape}, {way}", "speed", _SPEED_ORDER[way], shape, settings, seconds, way=way)


def fold(shape: str) -> Job:
    """The fold on the GPU and on the CPU, beside a copy, and a quarter of one."""
    seconds, written_gb = 75.0 if shape != "tiny" else 30.0, 3.25 * SCALES[shape].base_gb
    return Job(f"fold {shape}", "fold", 30, shape, {"shape": shape}, seconds, written_gb=written_gb)


def run(shape: str) -> Job:
    """A whole run of one iteration on a card of 24 GB."""
    scale = SCALES[shape]
    settings = {
        "shape": shape, "length": scale.speed["length"], "step_tokens": scale.step_tokens, "steps": scale.branch_steps,
        "learning_rate": LEARNING_RATE, "scored_documents": scale.scored_documents, "card_gib": 24,
    }  # fmt: skip
    seconds, written_gb = 150.0 if shape != "tiny" else 60.0, scale.base_gb + scale.adapters_gb
    return Job(f"run {shape}, 24 GB", "run", 32, shape, settings, seconds, 24, written_gb=written_gb)
