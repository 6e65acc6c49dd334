"""What a finished run could be without any training: at other sizes of its delta, or other weights of its last merge.

Each model is folded from the original weights, scored at the precision of the run's own scores, and deleted, so every
point compares with every other score of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bam_lora.adapters import Adapter
from bam_lora.branch import TRAJECTORY
from bam_lora.checkpoint import claim_output
from bam_lora.errors import UserError, no_run
from bam_lora.fold_plan import Changes
from bam_lora.fold_write import ARTEFACT
from bam_lora.gpu_memory import LESS_TO_LEARN_AGAIN, room_for
from bam_lora.interrupt import stop_on_signals
from bam_lora.learned_weights import LearnedWeights
from bam_lora.ledger_view import require_factor
from bam_lora.machine import release_memory
from bam_lora.merge import MergedAdapters
from bam_lora.merge_learning import branch_folders, learn_merge, past_folders
from bam_lora.merge_weights import resolve_weights
from bam_lora.points import PointScorer, WeightedAdapters
from bam_lora.progress import RunProgress
from bam_lora.quiet import quiet, quiet_libraries
from bam_lora.rundir import fix_threads, locked
from bam_lora.scoring import Windowed
from bam_lora.scoring_sets import check_selection, selection_windows, training_load
from bam_lora.store import digest

SCALES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
DECAYS = (0.5, 0.7, 0.9)


def shrink(
    run: str | Path,
    scales: Sequence[float] | None = None,
    *,
    source_weights: Sequence[float] = (),
    checkpoints: bool = False,
    output: str | Path | None = None,
    progress: RunProgress | None = None,
) -> dict[str, Any]:
    """Scores models near a finished run's result; points that are there already are kept.

    Args:
        run: Run directory.
        scales: Values of λ, which multiplies all that the run has added: 0 is the base, 1 the result, which the run has
            scored itself. None: `SCALES`, or no λ where something else is asked for.
        source_weights: Values of μ: the weights of the run's last merge are learned anew on its selection sets, with
            target + μ · source as what is minimised.
        checkpoints: Score the checkpoints of a run of one branch too, and exponential moving averages of their deltas.
        output: New folder for the model of the one λ or μ that is asked for.
        progress: Where progress is shown; None shows it on stderr.

    Returns:
        `shrink.json`: {"format", "evaluation", "points": [{"kind", "label", "scale", "delta_norm", "scores"}]}, sorted
        by λ and by μ; the scores are those of `eval.json`.

    Raises:
        UserError: If the run is not finished, measures nothing, or it has no selection sets
            to learn by.
    """
    quiet()
    if scales is None:
        scales = () if source_weights or checkpoints else SCALES
    _check(scales, source_weights, output)
    directory_path = Path(run).expanduser().resolve()
    if not (directory_path / "plan.json").exists():
        raise no_run(Path(run))
    with locked(directory_path) as directory, stop_on_signals() as stop, progress or RunProgress() as display:
        quiet_libraries()
        fix_threads(directory)
        scorer = PointScorer(directory, display, stop)
        keep = _claimed(output, scorer) if output else None
        kept = _kept_checkpoints(scorer) if checkpoints else []
        for scale in sorted(set(scales)):
            _score_scale(scorer, scale, keep)
        if source_weights:
            _score_learned(scorer, sorted(set(source_weights)), keep)
        if kept:
            _score_checkpoints(scorer, kept)
        return scorer.record


def _check(scales: Sequence[float], source_weights: Sequence[float], output: str | Path | None) -> None:
    for option, values in (("--scale", scales), ("--source-weight", source_weights)):
        for value in values:
            require_factor(option, value)
    asked = len(set(scales)) + len(set(source_weights))
    if output and asked != 1:
        raise UserError.of(
            "--output",
            expected="one --scale or one --source-weight",
            found=f"{asked}",
            remedy="Name the one whose model you want",
        )


def _claimed(output: str | Path, scorer: PointScorer) -> Path:
    """The folder for the chosen model: none of the run's, and not its base."""
    root = scorer.directory.root.resolve()
    target = claim_output(Path(output), ARTEFACT, keep=[root, scorer.original.folder])
    if target.resolve().is_relative_to(root):
        raise UserError.of(
            f"output {output}", expected="a folder outside of the run", found="one in it", remedy="Choose another"
        )
    return target


def _score_scale(scorer: PointScorer, scale: float, keep: Path | None) -> None:
    def make() -> tuple[Changes, str]:
        return scorer.ledger.view(scale=scale), digest([scorer.ledger.key(), scale])

    scorer.score("shrink", _label(scale), scale, make, keep)


def _score_learned(scorer: PointScorer, source_weights: Sequence[float], keep: Path | None) -> None:
    """The run's last merge with weights learned for each μ, whatever its own were."""
    recipe, last = scorer.recipe, len(scorer.plan.iterations)
    iteration = scorer.plan.iterations[-1]
    selection = selection_windows(recipe, scorer.tokenizer, scorer.directory.selection, scorer.context_tokens)
    if selection is None:
        raise UserError.of(
            f"selection of {scorer.directory.root}",
            expected="sets to learn the weights by",
            found="none",
            remedy="Run a recipe with selection.target and selection.source",
        )
    check_selection(selection, scorer.windows, recipe.bam.merge.model_copy(update={"weights": "learned"}))
    settings = recipe.bam.merge.learned
    folders = branch_folders(scorer.directory, iteration)
    if settings.scope == "run":
        folders += past_folders(scorer.directory, scorer.plan, last, recipe.quantization.compute_dtype)
    adapters = [Adapter.open(folder) for folder in folders]
    _require_low_rank(f"branches of {scorer.directory.root}", adapters)
    weights = resolve_weights("learned", len(iteration.branches), iteration.tokens, iteration.merge["scale"])
    before, hashes = scorer.ledger.view(last - 1), [adapter.hashes() for adapter in adapters]
    for source_weight in source_weights:
        wanted = {**settings.model_dump(), "source_weight": source_weight}

        def make(wanted: dict[str, Any] = wanted) -> tuple[Changes, str]:
            learned = _learned(scorer, adapters, weights, selection, wanted)
            key = digest([scorer.ledger.key(last - 1), hashes, learned.groups])
            return WeightedAdapters(before, adapters, learned.coefficients), key

        scorer.score("learned", _label(source_weight), None, make, keep)


def _learned(
    scorer: PointScorer,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    selection: Windowed,
    wanted: dict[str, Any],
) -> LearnedWeights:
    """The weights of the last merge, learned on a base that is gone again before anything is scored."""
    recipe, iteration = scorer.recipe, scorer.plan.iterations[-1]
    label = _label(wanted["source_weight"])

    def on_step(step: int, steps: int) -> None:
        scorer.stop.check()
        scorer.progress.stage(f"learning the last merge's weights for a source weight of {label}, step {step}/{steps}")

    model = scorer.load(iteration.iteration - 1, training_load(recipe))
    try:
        with room_for(f"learning the last merge's weights for a source weight of {label}", LESS_TO_LEARN_AGAIN):
            return learn_merge(model, adapters, weights, selection, recipe, iteration, wanted, on_step=on_step)
    finally:
        del model
        release_memory()


def _label(value: float) -> str:
    return f"{value:.10g}"


def _kept_checkpoints(scorer: PointScorer) -> list[Path]:
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
    _require_low_rank(f"checkpoints of {root}", [Adapter.open(root / branches[0])])
    return [*kept, root / branches[0]]


def _require_low_rank(what: str, adapters: Sequence[Adapter]) -> None:
    entries = (adapter.entry(name) for adapter in adapters for name in adapter.names)
    if any(entry is not None and (not entry.is_low_rank or entry.value) for entry in entries):
        raise UserError.of(
            what,
            expected="adapters that are low rank, which can be averaged on one base",
            found="DoRA, biases, whole modules or token rows",
            remedy="Train plain LoRA for such a curve",
        )


def _score_checkpoints(scorer: PointScorer, kept: Sequence[Path]) -> None:
    """Each by itself, and their moving averages; the last is the final adapter, whose score the run has."""
    adapters = [Adapter.open(folder) for folder in kept]
    steps = [int(folder.name.removeprefix("step-")) for folder in kept[:-1]]
    for step, adapter in zip(steps, adapters, strict=False):
        _score_sum(scorer, "checkpoint", f"step {step}", [adapter], [1.0])
    for decay in DECAYS:
        shares = [decay ** (len(adapters) - 1 - place) for place in range(len(adapters))]
        _score_sum(scorer, "ema", f"{decay:g}", adapters, [share / sum(shares) for share in shares])


def _score_sum(
    scorer: PointScorer, kind: str, label: str, adapters: Sequence[Adapter], weights: Sequence[float]
) -> None:
    """The weighted sum of adapters on what the run started from."""

    def make() -> tuple[Changes, str]:
        coefficients = MergedAdapters(adapters, weights).all_coefficients()
        key = digest([scorer.ledger.key(0), [adapter.hashes() for adapter in adapters], list(weights)])
        return WeightedAdapters(scorer.ledger.view(0), adapters, coefficients), key

    scorer.score(kind, label, None, make)
