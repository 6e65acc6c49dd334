"""What Branch-and-Merge adds to a trainer's own arguments."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from bam_lora.errors import UserError


@dataclass(frozen=True)
class BamConfig:
    """How a `BamTrainer` branches and merges; all else is said by the trainer's own arguments.

    Args:
        slices: N, the number of disjoint parts of the training data.
        branches: K, the number of slices trained apart, then merged, in one iteration.
        merge: Merge method, such as "linear" or "slerp", or all of a recipe's `bam.merge` as a mapping.
        weights: Weight of each branch: "uniform", "tokens", a list, or "learned" or "search", which want
            `selection_dataset`.
        scale: Factor on the merged delta.
        outer: A recipe's `bam.outer`: learning rate and momentum of the step along the merged delta.
        replay_share: Replay's share of the tokens of every slice; None: 0.2 if there is a `replay_dataset`.
        slicing: How the examples are dealt out: "random", "contiguous", "by_dataset" (one group for each data set of
            a mapping `train_dataset`) or "by_column".
        slicing_column: The column that "by_column" groups by.
        deduplicate: Leave out copies among all training examples: "none", "exact" or "near".
        contamination: What is done with training examples that hold text of the evaluation or selection sets: "warn",
            "drop" or "error".
        base: Folder or Hub id of the unmodified weights of a model that is passed loaded.
        tokens: Most training tokens to take of each data set, such as 5_000_000 or "5M"; a stream must have it.
        score_branches: Score every branch too, not only what their merges give.
        documents: Score only the first so many examples of each evaluation set.
        samples: Prompts that base and result continue, shown in the report.
        keep: A recipe's `keep`: which folded bases stay on disk.
        max_hours: Wall-clock hours over all sittings; no iteration begins that would not end within them.
        max_tokens: Training tokens, such as 50_000_000 or "50M"; the run ends after the last iteration within them.
            Raised, either goes on where the run ended.
    """

    slices: int = 8
    branches: int = 2
    merge: str | Mapping[str, Any] = "linear"
    weights: str | Sequence[float] = "uniform"
    scale: float = 1.0
    outer: Mapping[str, Any] = field(default_factory=dict)
    replay_share: float | None = None
    slicing: str = "random"
    slicing_column: str | None = None
    deduplicate: str = "none"
    contamination: str = "warn"
    base: str | None = None
    tokens: int | str | None = None
    score_branches: bool = True
    documents: int | None = None
    samples: Sequence[str] = ()
    keep: Mapping[str, Any] = field(default_factory=dict)
    max_hours: float | None = None
    max_tokens: int | str | None = None

    @classmethod
    def of(cls, given: BamConfig | Mapping[str, Any] | None) -> BamConfig:
        """It from what a `BamTrainer` takes as `bam`.

        Raises:
            UserError: If that is something else, such as the collator that is `SFTTrainer`'s third argument, or has
                other keys.
        """
        if given is None or isinstance(given, Mapping):
            names = [one.name for one in fields(cls)]
            for name in (given or {}).keys() - set(names):
                near = difflib.get_close_matches(str(name), names, n=1)
                raise UserError.of(
                    f"bam, key {name!r}", expected=f"one of {', '.join(names)}", found="no such key",
                    remedy=f"Write {near[0]!r}" if near else "Leave it out",
                )  # fmt: skip
            return cls(**(given or {}))
        if not isinstance(given, cls):
            raise UserError.of(
                "bam", expected="a BamConfig", found=type(given).__name__,
                remedy="Pass bam=BamConfig(slices=..., branches=...), and what else there is by its name",
            )  # fmt: skip
        return given

    def merge_section(self) -> dict[str, Any]:
        """`bam.merge` of the recipe."""
        plain: dict[str, Any] = {"method": self.merge} if isinstance(self.merge, str) else dict(self.merge)
        weights = self.weights if isinstance(self.weights, str) else list(self.weights)
        for name, value, default in (("weights", weights, "uniform"), ("scale", self.scale, 1.0)):
            if value != default or name not in plain:
                plain[name] = value
        return plain

    def share(self, has_replay: bool) -> float:
        """Replay's share of all training tokens."""
        if self.replay_share is None:
            return 0.2 if has_replay else 0.0
        return self.replay_share
