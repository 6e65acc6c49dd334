"""What a finished run's delta is worth at other sizes: the scores of λ·ΔW for a curve of λ, and of its checkpoints.

Nothing is trained. Each model is folded from the original weights, scored at the precision of the run's own scores, and
deleted, so every point compares with every other score of the run.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bam_lora.adapters import Adapter
from bam_lora.base import context_length, find_base, load_model, load_tokenizer
from bam_lora.branch import TRAJECTORY
from bam_lora.errors import UserError
from bam_lora.fold_shard import Changes
from bam_lora.folding import fold_into
from bam_lora.interrupt import StopRequest, stop_on_signals
from bam_lora.ledger import Ledger
from bam_lora.ledger_view import LedgerView
from bam_lora.merge import MergedAdapters
from bam_lora.progress import RunProgress
from bam_lora.quiet import quiet, quiet_libraries
from bam_lora.recipe import load_recipe
from bam_lora.report.records import read_record as read_whole_record
from bam_lora.rundir import RunDirectory, fix_threads, locked
from bam_lora.scoring import Windowed, score_sets
from bam_lora.scoring_sets import evaluation_windows, scoring_load
from bam_lora.store import digest, read_record, require_space, write_record

SCALES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
DECAYS = (0.5, 0.7, 0.9)
_FORMAT = 1


def shrink(
    run: str | Path,
    scales: Sequence[float] = SCALES,
    *,
    checkpoints: bool = False,
    progress: RunProgress | None = None,
) -> dict[str, Any]:
    """Scores a finished run's model with its whole delta scaled; points that are there already are kept.

    Args:
        run: Run directory.
        scales: Values of λ; 0 is the base and 1 the result, which the run has scored itself.
        checkpoints: Score the checkpoints of a run of one branch too, and exponential moving averages of their deltas.
        progress: Where progress is shown; None shows it on stderr.

    Returns:
        `shrink.json`: {"format", "evaluation", "points": [{"kind", "label", "scale", "delta_norm", "scores"}]}, sorted
        by λ; the scores are those of `eval.json`.

    Raises:
        UserError: If the run is not finished, measures nothing, or its delta is not low rank.
    """
    quiet()
    wrong = next((scale for scale in scales if not math.isfinite(scale) or scale < 0), None)
    if wrong is not None:
        raise UserError.of("--scale", expected="a number of at least 0", found=f"{wrong:g}", remedy="Try 0.5")
    directory_path = Path(run).expanduser().resolve()
    if not (directory_path / "plan.json").exists():
        raise UserError.of(str(run), expected="a run directory", found="none", remedy="Give the folder of a run")
    with locked(directory_path) as directory, stop_on_signals() as stop, progress or RunProgress() as display:
        quiet_libraries()
        fix_threads(directory)
        scorer = _Scorer(directory, display, stop)
        kept = _kept_checkpoints(scorer) if checkpoints else []
        for scale in sorted(set(scales)):
            point = {"kind": "shrink", "label": f"{scale:g}", "scale": scale}
            scorer.score(point, scorer.ledger.view(scale=scale), digest([scorer.ledger.key(), scale]))
        if kept:
            _score_checkpoints(scorer, kept)
        return scorer.record


def _kept_checkpoints(scorer: _Scorer) -> list[Path]:
    """Folders of the adapters kept along the run's only branch."""
    root = scorer.directory.root
    branches = [adapter["path"] for entry in scorer.ledger.iterations for adapter in entry["adapters"]]
    kept = sorted((scorer.directory.branch(1, 1) / TRAJECTORY).glob("step-*"))
    if len(branches) != 1 or not kept:
        raise UserError.of(
            f"checkpoints of {root}",
            expected="a run of one branch that kept them",
            found=f"{len(branches)} branches" if len(branches) != 1 else "none kept",
            remedy="Run `strategy: single` with `keep.checkpoints: true` and a training.save_steps to match",
        )
    return [*kept, root / branches[0]]


def _score_checkpoints(scorer: _Scorer, kept: Sequence[Path]) -> None:
    """Each by itself, and their moving averages; the last is the final adapter, whose score the run has."""
    adapters = [Adapter.open(folder) for folder in kept]
    steps = [int(folder.name.removeprefix("step-")) for folder in kept[:-1]]
    for step, adapter in zip(steps, adapters, strict=False):
        scorer.score_adapters({"kind": "checkpoint", "label": f"step {step}", "scale": None}, [adapter], [1.0])
    for decay in DECAYS:
        shares = [decay ** (len(adapters) - 1 - place) for place in range(len(adapters))]
        weights = [share / sum(shares) for share in shares]
        scorer.score_adapters({"kind": "ema", "label": f"{decay:g}", "scale": None}, adapters, weights)


class _Sum:
    """What a run started from, plus merged adapters, as changes to fold."""

    def __init__(self, start: LedgerView, merged: MergedAdapters) -> None:
        self.start, self.merged = start, merged

    def names(self) -> list[str]:
        return sorted({*self.start.names(), *self.merged.names()})

    def shape(self, name: str) -> tuple[int, int]:
        return (self.merged if name in self.merged.names() else self.start).shape(name)

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        parts = [part for part in (self.start.stacked(name), self.merged.stacked(name)) if part is not None]
        return (torch.cat([B for B, _ in parts], dim=1), torch.cat([A for _, A in parts])) if parts else None

    def start_value(self, name: str) -> torch.Tensor | None:
        return self.start.start_value(name)


class _Scorer:
    """Folds, scores and keeps one point after another."""

    def __init__(self, directory: RunDirectory, progress: RunProgress, stop: StopRequest) -> None:
        self.directory, self.progress, self.stop = directory, progress, stop
        self.recipe = load_recipe(directory.recipe)
        self.how = scoring_load(self.recipe)
        self.ledger = Ledger.load(directory.root)
        self._require_finished()
        self.ledger.verify()
        self.original = find_base(self.ledger.base["name"], self.ledger.base["revision"])
        self.tokenizer = load_tokenizer(directory.model)
        windows = evaluation_windows(self.recipe, self.tokenizer, directory.evaluation, context_length(directory.model))
        if windows is None:
            raise UserError.of(
                f"evaluation of {directory.root}", expected="sets to score on", found="none",
                remedy="Run a recipe with evaluation.target and evaluation.source",
            )  # fmt: skip
        self.windows: Windowed = windows
        self.key = digest([self.ledger.key(), windows.key, vars(self.how)])
        self.record = read_record(directory.shrink, self.key) or {
            "format": _FORMAT, "evaluation": windows.key, "points": [],
        }  # fmt: skip

    def _require_finished(self) -> None:
        plan = read_whole_record(self.directory.plan)
        planned = len(plan["iterations"]) if plan else 0
        if len(self.ledger.iterations) != planned or not self.directory.model.is_dir():
            raise UserError.of(
                str(self.directory.root),
                expected="a finished run",
                found=f"{len(self.ledger.iterations)} of {planned} iterations merged",
                remedy="Finish it first with `bam-lora run`",
            )

    def score(self, point: dict[str, Any], changes: Changes, key: str) -> None:
        """Scores one point and writes the record, unless it is in it."""
        if any(all(known[name] == value for name, value in point.items()) for known in self.record["points"]):
            return
        self.stop.check()
        self.progress.stage(f"scoring {point['kind']} {point['label']}")
        folder = self.directory.root / ".shrink"
        require_space(self.directory.root, sum(f.stat().st_size for f in self.original.folder.glob("*.safetensors")),
                      "a folded model")  # fmt: skip
        try:
            facts = fold_into(self.original.folder, changes, folder, key=key)
            scores = score_sets(
                load_model(folder, self.how),
                self.tokenizer,
                self.windows,
                batch_size=self.recipe.evaluation.batch_size,
                dtype=self.how.compute_dtype,
                on_batch=lambda count: self.stop.check(),
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.progress.say(
            f"{point['kind']} {point['label']}: "
            + ", ".join(f"{s['set']} {s['bits_per_byte']:.4f}" for s in scores["scores"])
            + " bits per byte"
        )
        points = [*self.record["points"], {**point, "delta_norm": facts["delta_norm"], "scores": scores["scores"]}]
        points.sort(key=lambda one: (one["kind"], one["scale"] or 0.0))  # of one kind without λ: in their order
        self.record = {**self.record, "points": points}
        write_record(self.directory.shrink, self.key, self.record)

    def score_adapters(self, point: dict[str, Any], adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
        """Scores the weighted sum of adapters on what the run started from."""
        key = digest([self.ledger.key(0), [adapter.hashes() for adapter in adapters], list(weights)])
        self.score(point, _Sum(self.ledger.view(0), MergedAdapters(adapters, weights)), key)
