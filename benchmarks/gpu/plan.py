"""What the GPU benchmark does, the most important first, and about how long each part takes.

The seconds are guesses for one H200-class GPU with a disk of 1 GB/s until a run has measured them; a job that by its
guess does not fit into what is left of the time is passed over.
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
        seconds: About how long it takes.
        card_gib: Memory of the card that the GPU is held down to; None: all of it.
        way: For "speed": who trains.
    """

    name: str
    kind: str
    order: int
    shape: str
    settings: dict[str, Any]
    seconds: float
    card_gib: float | None = None
    way: str | None = None


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


LARGE = Scale(_STEP_TOKENS, 8, SPEED, 20, 64, 500_000, 120)
SMALL = Scale(_STEP_TOKENS, 8, SPEED, 20, 64, 500_000, 60)
TINY = Scale(64, 3, {"length": 64, "batch": 1, "accumulation": 1, "checkpointing": False}, 3, 1, 8_000, 20)
SCALES = {
    "llama-3.1-8b": LARGE,
    "mistral-7b-v0.3": LARGE,
    "qwen3-4b": SMALL,
    "qwen3-0.6b": SMALL,
    "tiny": TINY,
}
"""Every shape, the most important first."""
# Shape: (order, card in GiB, sequence length, seconds) of its branches.
_BRANCHES: dict[str, list[tuple[int, float, int, float]]] = {
    "llama-3.1-8b": [(10, 12, 2048, 110), (11, 24, 8192, 120), (60, 24, 2048, 100), (61, 24, 512, 100),
                     (62, 24, 4096, 100), (63, 24, 1024, 100), (70, 16, 2048, 110), (71, 16, 8192, 110)],
    "mistral-7b-v0.3": [(80, 12, 2048, 100), (81, 24, 8192, 110)],
    "qwen3-4b": [(72, 8, 2048, 80), (73, 12, 8192, 90)],
    "qwen3-0.6b": [(74, 8, 2048, 60), (75, 8, 8192, 60)],
    "tiny": [(10, 12, 32, 30), (11, 24, 64, 30)],
}  # fmt: skip
_SPEED_ORDER = {"ours": 20, "trl-best": 21, "trl-defaults": 22, "trl-best-fp32": 35, "ours-again": 36, "unsloth": 50,
                "axolotl": 90}  # fmt: skip
_SPEED_SECONDS = {"unsloth": 240.0, "axolotl": 300.0}
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
    return [
        Job(
            f"branch {shape}, length {length}, {card:g} GB", "branch", order, shape,
            {"shape": shape, "length": length, "step_tokens": max(length, scale.step_tokens),
             "steps": scale.branch_steps, "learning_rate": LEARNING_RATE, "card_gib": card},
            seconds, card,
        )
        for order, card, length, seconds in _BRANCHES[shape]
    ]  # fmt: skip


def speed(shape: str, way: str) -> Job:
    """A branch of a peer or of ours by the peers' script, all with the same settings and the whole GPU."""
    scale = SCALES[shape]
    common = {"rank": 64, "learning_rate": LEARNING_RATE, "seed": 0, "steps": scale.speed_steps}
    seconds = _SPEED_SECONDS.get(way, 150.0) if shape != "tiny" else 30.0
    settings = {**scale.speed, **common, "way": way.removesuffix("-again")}
    return Job(f"speed {shape}, {way}", "speed", _SPEED_ORDER[way], shape, settings, seconds, way=way)


def fold(shape: str) -> Job:
    """The fold on the GPU and on the CPU."""
    return Job(f"fold {shape}", "fold", 30, shape, {"shape": shape}, 200.0 if shape != "tiny" else 30.0)


def run(shape: str) -> Job:
    """A whole run of one iteration on a card of 24 GB."""
    scale = SCALES[shape]
    settings = {
        "shape": shape, "length": scale.speed["length"], "step_tokens": scale.step_tokens, "steps": scale.branch_steps,
        "learning_rate": LEARNING_RATE, "scored_documents": scale.scored_documents, "card_gib": 24,
    }  # fmt: skip
    return Job(f"run {shape}, 24 GB", "run", 32, shape, settings, 300.0 if shape != "tiny" else 60.0, 24)
