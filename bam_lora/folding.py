"""Deltas into weights: a base is streamed into a new checkpoint, what changes is added in fp32 and rounded once.

Memory stays at a few row blocks and one weight's factors, whatever the size of the model or of its shards.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bam_lora.checkpoint import (
    COMPANIONS,
    CONFIG,
    INDEX,
    Checkpoint,
    claim_output,
    local_folder,
    normal_name,
    open_checkpoint,
    same_base,
    writing,
)
from bam_lora.dense_methods import DenseOptions
from bam_lora.difference import Difference, Known
from bam_lora.errors import UserError
from bam_lora.fold_blocks import exact_products
from bam_lora.fold_companions import find_companions, token_ids, tokenizer_folders
from bam_lora.fold_layout import plan_shards
from bam_lora.fold_plan import Changes
from bam_lora.fold_rounding import find_rounding
from bam_lora.fold_shard import ShardFolder
from bam_lora.fold_verify import verify_folded
from bam_lora.fold_write import ARTEFACT, Job, write_model_folder
from bam_lora.gpu_memory import room_for
from bam_lora.merge import MergedAdapters, open_adapters
from bam_lora.store import digest
from bam_lora.tied_weights import plan_fold

# (bytes just written, bytes in all)
Progress = Callable[[int, int], None]

__all__ = ["Changes", "fold", "fold_into"]

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_MAXIMUM_WORKERS = 8
_LEAVE_OUT = "Close what else uses the card, or leave out --device: the CPU takes 100 MB or so of the machine's"


def fold_into(
    base: Path,
    changes: Changes,
    output: Path,
    *,
    key: str,
    difference: Difference | None = None,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    verify: bool = False,
    device: str = "cpu",
    tokenizers: Sequence[Path] = (),
    companions_of: Path | None = None,
    tokenizer: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a base plus changes as a new model folder, sealed with `key`; whole or not at all.

    An interrupted call leaves its finished shards in a hidden folder beside the output; the next one with the same
    arguments takes over those that verify.

    Args:
        base: Folder of the full-precision base (bf16, fp16 or fp32 safetensors).
        changes: What is added to which weight.
        output: Folder to write; what stood there is replaced.
        key: Hash of everything the result is a function of.
        difference: weight · (model - base) of two other checkpoints, added on top of the changes.
        dtype: "bfloat16", "float16" or "float32" for all floating-point tensors, or None to keep each one's.
        max_shard_bytes: The most data in one file, in bytes, or None to keep the base's files.
        rounding: "nearest", or "stochastic": without bias, by draws that follow from the seed (bf16 and fp16 results).
        seed: For stochastic rounding.
        verify: Compare sampled rows with float64 before the folder is put in place.
        device: Where the products are computed; the bytes are reproducible on devices of one kind.
        tokenizers: Folders of which the first that holds a tokenizer gives it where the vocabulary is resized.
        companions_of: Model folder whose tokenizer, chat template and generation settings take the place of the base's.
        tokenizer: Folder whose tokenizer takes the place of the base's in any case.
        progress: Called with the bytes just written, or taken over, and those of all files.

    Returns:
        {"seconds", "bytes", "tensors", "changed", "weight_norm", "weight_norms": {name: ..}, "delta_norm",
        "delta_norms": {name: ..}, "tokenizer", "vocabulary", "shards", "resumed_shards", "verified"}: counts of all
        and of changed tensors; Frobenius norms of the changed weights as they are in the base, and of what was added
        to them; "base" or the folder that the tokenizer is from; the rows of a resized embedding, or None; counts of
        all files and of those taken over; what `verify_folded` returns, or None.

    Raises:
        UserError: If the base is damaged, quantised or does not fit the changes, a result is not finite or does not
            verify, or the output cannot be written or is being written by another process.
    """
    started = time.perf_counter()
    checkpoint = open_checkpoint(base)
    plan, changes = plan_fold(checkpoint, changes)
    if difference is not None:
        changes, plan = Known(changes), difference.added_to(plan, checkpoint)
    shards = plan_shards(checkpoint.shards, plan, _target_dtype(dtype), max_shard_bytes)
    options: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "rounding": [rounding, seed], "device": device}
    options["difference"] = None if difference is None else difference.identity()
    vocabulary = max(plan.rows.values(), default=None)
    model = None if companions_of is None else open_checkpoint(companions_of)
    others = [tokenizer] if tokenizer is not None else tokenizers if vocabulary is not None else ()
    companions = find_companions(checkpoint, others, model)
    job = Job(checkpoint, shards, {**plan.config, **token_ids(model)}, key, dtype, options, companions, vocabulary)
    rounds, total = find_rounding(rounding, seed), sum(shard.file_bytes() for shard in shards)
    note = None if progress is None else lambda count: progress(count, total)
    room = room_for(f"folding on {device}", _LEAVE_OUT if device != "cpu" else "Close what else uses the memory")
    with room, exact_products() as threads, writing(output), _pool(workers := min(threads, _MAXIMUM_WORKERS)) as pool:
        folder = ShardFolder(
            changes, pool, workers=workers, shards=len(shards), device=device, rounding=rounds, progress=note
        )
        check = functools.partial(verify_folded, shards=shards, changes=changes, pool=pool) if verify else None
        facts = write_model_folder(job, folder, output, check=check, progress=note)
    return {"seconds": time.perf_counter() - started, **facts}


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose waiting work is dropped when an error ends it."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fold")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _target_dtype(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in DTYPES:
        raise UserError.of("dtype", expected=f"one of {', '.join(DTYPES)}", found=repr(dtype), remedy="Choose one")
    return None if dtype is None else DTYPES[dtype]


def fold(
    base: str | Path,
    adapters: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | str | None = None,
    method: str = "linear",
    difference: tuple[str | Path, str | Path, float] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    verify: bool = False,
    any_base: bool = False,
    options: DenseOptions | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Bakes adapters into a base: W + Σ wₖ·scalingₖ·BₖAₖ, computed in fp32 and rounded once; also a frozen difference.

    Args:
        base: Model folder or Hub id, in full precision (never the 4-bit copy that was trained on).
        adapters: Folders or Hub ids of LoRA adapters of that base, of any kind that PEFT trains; there may be none if
            there is a difference. Where they resize the vocabulary, their tokenizer takes the place of the base's.
        output: New folder for the model, which any tool loads as it loads the base.
        weights: One number per adapter, used as they are, or None for their mean.
        method: A name in `merge.METHODS` or `dense_methods.DENSE_METHODS`.
        difference: (model, base, weight): weight · (model - base) is added, too, tensor by tensor, such as an instruct
            model minus the base that it was made from. Folders or Hub ids in full precision, of `base`'s architecture
            and vocabulary.
        dtype: "bfloat16", "float16" or "float32", or None to keep the base's.
        max_shard_bytes: See `fold_into`, as for the next three.
        rounding: "nearest" or "stochastic".
        seed: For stochastic rounding.
        verify: Compare sampled rows with float64.
        any_base: Allow adapters that name another base than the one given.
        options: Of the methods that work element by element.
        device: Where the products are computed, such as "cuda".
        progress: Called with the bytes just written and those of all files.

    Returns:
        What `fold_into` returns.

    Raises:
        UserError: If an input is damaged or does not fit the others, or the output cannot be written.
    """
    merged = None
    if adapters or difference is None or weights is not None:
        merged = open_adapters(adapters, weights, method, any_base=any_base, options=options)
    added = None if difference is None else Difference.open(*difference)
    folder = local_folder(base, [CONFIG, INDEX, "*.safetensors", *COMPANIONS])
    inputs = [folder, *(adapter.path for adapter in (merged.adapters if merged else ()))]
    inputs += [] if added is None else [added.model.folder, added.base.folder]
    target = claim_output(Path(output), ARTEFACT, keep=inputs)
    checkpoint = open_checkpoint(folder)
    if merged is not None and not any_base:
        _check_base_name(str(base), checkpoint, merged)
    how: dict[str, Any] = {"dtype": dtype, "max_shard_bytes": max_shard_bytes, "rounding": rounding, "seed": seed}
    how["device"] = _usable(device)
    key = _fold_key(checkpoint, merged, added, {"method": method, **how})
    changes = merged if merged is not None else Known(None)
    how |= {"tokenizers": tokenizer_folders(merged.adapters if merged is not None else ()), "progress": progress}
    return fold_into(folder, changes, target, key=key, difference=added, verify=verify, **how)


def _usable(device: str) -> str:
    kind, _, number = device.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device != "cpu" and not (kind == "cuda" and (number or "0").isdecimal() and int(number or 0) < count):
        here = f"a machine with {count} GPU{'s' if count != 1 else ''}" if count else "a machine without CUDA"
        raise UserError.of("device", expected="cpu or cuda", found=f"{device!r} on {here}", remedy="Leave it out")
    return device


def _fold_key(
    checkpoint: Checkpoint, merged: MergedAdapters | None, difference: Difference | None, how: Mapping[str, Any]
) -> str:
    """What the result is a function of; files stand for themselves by headers and sizes, adapters by their time, too.

    Hashing them would take as long as the fold.
    """
    inputs = {
        "artefact": ARTEFACT,
        "base": {name: [header.file_bytes, header.raw.hex()] for name, header in checkpoint.shards.items()},
        "adapters": [] if merged is None else [adapter.identity() for adapter in merged.adapters],
        "weights": [] if merged is None else merged.weights,
        **how,
        "options": None if merged is None else vars(merged.options),
        "difference": None if difference is None else difference.identity(),
    }
    return digest(inputs)


def _check_base_name(base: str, checkpoint: Checkpoint, merged: MergedAdapters) -> None:
    stated = checkpoint.config.get("_name_or_path")
    own_names = [base, str(checkpoint.folder.resolve()), *([stated] if isinstance(stated, str) and stated else [])]
    for adapter in merged.adapters:
        if not any(same_base(adapter.base_name, name) for name in own_names):
            raise UserError.of(
                f"the base of {adapter.path}",
                expected=f"{normal_name(base)!r}, the base given",
                found=repr(adapter.base_name),
                remedy="Give the base it was trained on, or pass --any-base if they hold the same weights",
            )
