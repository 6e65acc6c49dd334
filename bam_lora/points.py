"""Models near a finished run's result, folded from the original weights, scored as the run scores, and recorded."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bam_lora.adapters import Adapter
from bam_lora.base import (
    Loading,
    context_length,
    file_hashes,
    find_base,
    load_model,
    load_tokenizer,
    require_same_files,
    weight_bytes,
)
from bam_lora.coefficients import Coefficients, branch_parts, gathered
from bam_lora.dense_change import DenseChange
from bam_lora.errors import UserError
from bam_lora.fold_plan import Changes
from bam_lora.folding import fold_into
from bam_lora.front import Front
from bam_lora.growing import found_base, grow, run_windows
from bam_lora.interrupt import StopRequest
from bam_lora.ledger import Ledger
from bam_lora.ledger_view import LedgerView
from bam_lora.limits import reached
from bam_lora.machine import release_memory
from bam_lora.outline import Outline
from bam_lora.plan import Plan
from bam_lora.progress import RunProgress
from bam_lora.recipe import load_recipe
from bam_lora.report.format import scores_line
from bam_lora.report.records import read_record as read_whole_record
from bam_lora.rundir import RunDirectory
from bam_lora.scoring import Windowed, score_sets
from bam_lora.scoring_sets import scoring_load
from bam_lora.store import digest, read_record, require_space, write_record

_FORMAT = 1


class WeightedAdapters:
    """Adapters with coefficients that are given, on top of an earlier state of a run, as changes to fold."""

    def __init__(
        self, start: LedgerView, adapters: Sequence[Adapter], coefficients: Mapping[str, Coefficients]
    ) -> None:
        self._start, self._adapters, self._coefficients = start, list(adapters), dict(coefficients)
        self._files = [adapter.hashes() for adapter in adapters]  # reads every byte: once, not for each weight

    def names(self) -> list[str]:
        """All weights that differ from the original base."""
        return sorted({*self._start.names(), *self._coefficients})

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i) of a weight in `names()`."""
        adapter = next((adapter for adapter in self._adapters if name in adapter), None)
        return adapter.shape(name) if adapter else self._start.shape(name)

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(B_oR, A_Ri) in fp32 of all that is added."""
        return gathered(itertools.chain(self._start.parts(name), self._own(name)))

    def _own(self, name: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        if name not in self._coefficients:
            return
        factors = [adapter.factors(name) for adapter in self._adapters]
        yield from branch_parts(self._files, factors, self._coefficients[name])

    def dense(self, name: str) -> DenseChange | None:
        """None: a ledger keeps low-rank products, and whole weights where they are none."""
        return None

    def outline(self, name: str) -> Outline:
        """See `LedgerView.outline`; what the adapters add is low rank."""
        return self._start.outline(name)

    def start_value(self, name: str) -> torch.Tensor | None:
        """What it is added to, if not the original base."""
        return self._start.start_value(name)


class PointScorer:
    """Folds, scores and records one model after another in a run's `shrink.json`.

    A model is deleted once it is scored, unless it is to be kept; one that is recorded already is not made again.
    """

    def __init__(self, directory: RunDirectory, progress: RunProgress, stop: StopRequest) -> None:
        self.directory, self.progress, self.stop = directory, progress, stop
        self.recipe = load_recipe(directory.recipe)
        self.how = scoring_load(self.recipe)
        self.ledger = Ledger.load(directory.root)
        self.plan = self._finished_plan()
        self.ledger.verify()
        self.original = find_base(self.ledger.base["name"], self.ledger.base["revision"])
        require_same_files(self.original, file_hashes(self.original, directory.root), self.ledger.base["files"])
        self.original = grow(directory, self.recipe, self.ledger, self.original, progress)
        self.tokenizer = load_tokenizer(directory.model)
        self.context_tokens = context_length(directory.model)
        found = found_base(directory, self.recipe, self.ledger, Front(self.recipe))
        windows = run_windows(found, self.recipe, self.tokenizer, directory.evaluation, self.context_tokens)
        if windows is None:
            raise UserError.of(
                f"evaluation of {directory.root}", expected="sets to score on", found="none",
                remedy="Run a recipe with evaluation.target and evaluation.source",
            )  # fmt: skip
        self.windows: Windowed = windows
        self.key = digest([self.ledger.key(), windows.key, self.how.facts()])
        self.record = read_record(directory.shrink, self.key) or {
            "format": _FORMAT, "evaluation": windows.key, "points": [],
        }  # fmt: skip

    def _finished_plan(self) -> Plan:
        record = read_whole_record(self.directory.plan)
        plan = reached(self.directory.root, Plan.from_json(record)) if record else None
        planned = len(plan.iterations) if plan else 0
        if plan is None or len(self.ledger.iterations) != planned or not self.directory.model.is_dir():
            raise UserError.of(
                str(self.directory.root),
                expected="a finished run",
                found=f"{len(self.ledger.iterations)} of {planned} iterations merged",
                remedy="Finish it first with `bam-lora run`",
            )
        return plan

    def score(
        self,
        kind: str,
        label: str,
        scale: float | None,
        make: Callable[[], tuple[Changes, str]],
        keep: Path | None = None,
    ) -> None:
        """Scores one model and records it, unless it is in the record and need not be kept.

        Args:
            kind: What kind of point it is.
            label: Which one of its kind.
            scale: λ, if it is one of the shrink curve.
            make: Gives the model as changes to the original weights, and the hash of all that they come from.
            keep: New folder for the model if it is to stay; then it is made anew.
        """
        known = {(point["kind"], point["label"]) for point in self.record["points"]}
        if (kind, label) in known and keep is None:
            return
        others = [known for known in self.record["points"] if (known["kind"], known["label"]) != (kind, label)]
        self.stop.check()
        changes, key = make()
        self.progress.stage(f"scoring {kind} {label}")
        with self.folded(changes, key, keep) as (folder, facts):
            scores = score_sets(
                load_model(folder, self.how),
                self.tokenizer,
                self.windows,
                batch_size=self.recipe.evaluation.batch_size,
                dtype=self.how.compute_dtype,
                on_batch=lambda count: self.stop.check(),
            )
        release_memory()
        self.progress.say(f"{kind} {label}: {scores_line(scores['scores'])}")
        point = {"kind": kind, "label": label, "scale": scale, "delta_norm": facts["delta_norm"]}
        points = [*others, {**point, "scores": scores["scores"]}]
        points.sort(key=_place)
        self.record = {**self.record, "points": points}
        write_record(self.directory.shrink, self.key, self.record)

    @contextmanager
    def folded(self, changes: Changes, key: str, keep: Path | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A folded model and the fold's facts, at `keep` or else for as long as it is needed."""
        folder = keep or self.directory.root / ".tmp-shrink"  # swept like every temporary file, should it stay behind
        require_space(folder.parent, weight_bytes(self.original.folder), "a folded model")
        try:
            yield folder, fold_into(self.original.folder, changes, folder, key=key)
        finally:
            if keep is None:
                shutil.rmtree(folder, ignore_errors=True)

    def load(self, iteration: int, how: Loading) -> Any:
        """The model after an iteration (0: what the run started from)."""
        if iteration == 0 and not self.ledger.inherited:
            return load_model(self.original.folder, how)
        with self.folded(self.ledger.view(iteration), self.ledger.key(iteration)) as (folder, _):
            return load_model(folder, how)


def _place(point: Mapping[str, Any]) -> tuple[str, float]:
    """λ in order, μ in order; checkpoints and averages stay as they came."""
    return point["kind"], float(point["label"]) if point["kind"] in ("shrink", "learned") else 0.0
