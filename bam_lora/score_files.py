"""Scores of any model on any files, without a run: `bam-lora eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bam_lora.base import Loading, context_length, find_base, load_model, load_tokenizer
from bam_lora.default_template import settle_template
from bam_lora.errors import UserError
from bam_lora.quiet import quiet_libraries
from bam_lora.scoring import SetSource, prepare_evaluation, score_sets
from bam_lora.sources import TextSource
from bam_lora.task_scores import score_model_tasks
from bam_lora.tasks import TaskSpec, find_tasks, require_known


def score_files(
    model: str,
    target: Sequence[str] | None,
    source: Sequence[str] | None,
    *,
    text: str = "text",
    chat: bool = False,
    precision: str = "4bit",
    window_bytes: int | None = None,
    tasks: Sequence[TaskSpec] = (),
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Scores a model on text files.

    Args:
        model: Model folder, Hub id, or the folder of a finished run.
        target: Files, folders or Hub data sets in the language learned.
        source: The same for what the base knew.
        text: Column that holds the text.
        chat: Rows are conversations; the answers are scored, by the model's chat template (or a plain one).
        precision: "4bit" (NF4) or "16bit"; scores of different precisions do not compare.
        window_bytes: Bytes in a window; None chooses the largest up to 4096 that fits the model's context.
        tasks: Benchmarks of lm-evaluation-harness to score it on, too.
        say: Told what is being scored, where that takes long.

    Returns:
        {"model", "precision", "scores": [...], "tasks": [...]}, with files also "window_bytes", "overlap_bytes" and
        "seconds".

    Raises:
        UserError: If there is nothing to score, or something cannot be read or loaded.
    """
    sources = [
        SetSource(_set_name(path), role, TextSource(_local(path), text=text, mode="chat" if chat else "text"))
        for role, paths in (("target", target or []), ("source", source or []))
        for path in paths
    ]
    if not sources and not tasks:
        remedy = "Give --target, --source or --tasks"
        raise UserError.of("eval", expected="text to score, or tasks", found="none", remedy=remedy)
    bits = {"4bit": 4, "16bit": 16}.get(precision)
    if bits is None:
        raise UserError.of("--precision", expected="4bit or 16bit", found=precision, remedy="Choose one of them")
    if window_bytes is not None and window_bytes < 16:
        raise UserError.of("--window-bytes", expected="at least 16", found=str(window_bytes), remedy="Raise it")
    quiet_libraries()
    finished = Path(model) / "model"
    base = find_base(str(finished) if (finished / "config.json").is_file() else model)
    tokenizer = load_tokenizer(base.folder)
    if chat:
        settle_template(tokenizer)
    for one in find_tasks(tasks) if tasks else ():  # before the model is loaded
        require_known(one)
    evaluation = None
    if sources:
        evaluation = prepare_evaluation(
            sources, tokenizer, None, window_bytes=window_bytes, overlap_bytes=None,
            context_tokens=context_length(base.folder),
        )  # fmt: skip
    how = Loading(bits)
    loaded = load_model(base.folder, how)
    scores: dict[str, Any] = {"scores": []}
    if evaluation is not None:
        scores = score_sets(loaded, tokenizer, evaluation, batch_size=8, dtype=how.compute_dtype)
    done = score_model_tasks(model, base, loaded, tokenizer, how, tasks, chat=chat, say=say) if tasks else []
    return {"model": model, "precision": precision, **scores, "tasks": done}


def _set_name(path: str) -> str:
    return Path(path).stem


def _local(path: str) -> str:
    """An existing path or a pattern, made absolute; anything else is a Hub id."""
    if Path(path).exists() or "*" in path or Path(path).suffix in {".json", ".jsonl", ".parquet", ".txt"}:
        return str(Path(path).absolute())
    return path
