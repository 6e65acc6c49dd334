"""Sections of the recipe about the merge: how its weights are chosen, and the step along it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bam_lora.recipe_sources import Section
from bam_lora.recipe_values import Scales


class LearnedWeights(Section):
    """How `weights: learned` trains the weights of the average, on the `selection` sets, with the deltas frozen."""

    source_weight: float = Field(
        default=1.0,
        ge=0,
        description="μ: what is minimised is target + μ · source bits per byte; more keeps more and learns less.",
    )
    scope: Literal["iteration", "run"] = Field(
        default="run",
        description="`iteration`: the weights of the branches being merged; `run`: also corrections to those of "
        "earlier iterations, the newest first, up to eight branches in all.",
    )
    groups: int = Field(
        default=7,
        ge=1,
        description="Numbers per branch and weight: groups of the delta's singular directions, of doubling size; "
        "1: one number per branch and weight.",
    )
    steps: int = Field(default=32, ge=1, description="Steps at the most.")
    windows: int = Field(
        default=6, ge=1, description="Windows of the target set, and as many of the source set, a step."
    )
    learning_rate: float = Field(default=0.05, gt=0, description="Step size of Adam on the numbers, falling to zero.")
    held_out: float = Field(
        default=0.25, gt=0, lt=1, description="Share of the selection documents that only decide which step is kept."
    )
    share: float = Field(
        default=0.035, gt=0, description="Most that it may cost, as a share of the iteration's training tokens."
    )


class SearchedWeights(Section):
    """How `weights: search` tries weights of the average, one number a branch, on the `selection` sets."""

    source_weight: float = Field(
        default=1.0,
        ge=0,
        description="μ: what is lowest wins, of target + μ · source bits per byte; more keeps more and learns less.",
    )
    scales: Scales = Field(
        default=[0.7, 0.85, 1.0, 1.2],
        description="Factors on the sum of the weights to try; with 0 among them a merge can be rejected: the base "
        "stays as it was.",
    )
    shares: bool = Field(
        default=True,
        description="Try other shares of the branches too; false: the plain average and its `scales` alone.",
    )
    evaluations: int = Field(
        default=24,
        ge=2,
        description="Candidates to score at the most, with the plain average: two branches: a grid of shares and "
        "`scales`; more: the scales, then steps along each branch's share.",
    )
    held_out: float = Field(
        default=0.25,
        gt=0,
        lt=1,
        description="Share of the selection documents that only decide between the best and the plain average.",
    )
    share: float = Field(
        default=0.035, gt=0, description="Most that it may cost, as a share of the iteration's training tokens."
    )


class Outer(Section):
    """The step along the merged delta: 1 and 0 add it as it is; else DiLoCo's, with Nesterov momentum."""

    learning_rate: float = Field(default=1.0, gt=0, description="lr: factor on the step.")
    momentum: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="m: how much of the merged deltas of the iterations before, of this run, is added again: "
        "v = m · v + ΔW, and lr · (ΔW + m · v) is the step.",
    )
