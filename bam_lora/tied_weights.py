"""A fold's plan where the output head is tied to the input embedding: kept so, or untied where the adapters demand it.

One stored tensor serves both. PEFT trains the two apart unless it is told otherwise, so an adapter of one of them
leaves the other as it was: folded into the one tensor it would change both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bam_lora.adapter_entries import EMBEDDINGS, HEADS
from bam_lora.checkpoint import Checkpoint
from bam_lora.errors import UserError
from bam_lora.fold_plan import Changes, FoldPlan, place

_EMBEDDING_ENDS = tuple(f"{module}.weight" for module in EMBEDDINGS)
_HEAD_ENDS = tuple(f"{module}.weight" for module in HEADS)
_HEAD = "lm_head.weight"
_FLAG = "tie_word_embeddings"


def plan_fold(checkpoint: Checkpoint, changes: Changes) -> FoldPlan:
    """Finds where every changed weight is stored, and what becomes of tied embeddings.

    Raises:
        UserError: If a weight is not there, has another shape, or is stored in a way that its change does not allow.
    """
    names = changes.names()
    embedding = next((name for name in names if name.endswith(_EMBEDDING_ENDS)), None)
    head = next((name for name in names if name.endswith(_HEAD_ENDS)), None)
    stored_embedding, stored_head = (
        next((name for name in checkpoint.tensors() if name.endswith(ends)), None)
        for ends in (_EMBEDDING_ENDS, _HEAD_ENDS)
    )
    if not (embedding or head) or not _is_tied(checkpoint.config, stored_head):
        return _resized(checkpoint, place(checkpoint, changes, {}))
    if stored_embedding is None:
        raise UserError.of(
            f"base {checkpoint.folder}, which ties its embeddings",
            expected=f"the input embedding, such as {_EMBEDDING_ENDS[0]}, to change {head or embedding}",
            found=f"only {stored_head or 'neither'}",
            remedy="Load the model with transformers and save it again",
        )
    borrowed = {head: embedding or stored_embedding} if head and not stored_head else {}
    plan = place(checkpoint, changes, borrowed)
    own = [part for part in plan.parts.get(stored_embedding, []) if part.name == head]
    if own:
        plan.parts[stored_embedding] = [part for part in plan.parts[stored_embedding] if part.name != head]
    if embedding and (_is_same(changes, embedding, head) if head else _is_rows(changes, embedding)):
        if stored_head:  # a copy that loaders pass over, but for those that do not know of the tie
            _change_copy(checkpoint, plan, stored_embedding, stored_head)
        return _resized(checkpoint, plan)
    if not stored_head:
        plan.added[head or _HEAD] = (stored_embedding, own)
    plan.config[_FLAG] = False
    return _resized(checkpoint, plan)


def _change_copy(checkpoint: Checkpoint, plan: FoldPlan, embedding: str, head: str) -> None:
    """Enters into the plan what changes the embedding for the stored head, too."""
    tensors = checkpoint.tensors()
    if tensors[head].shape != tensors[embedding].shape:
        raise UserError.of(
            f"tensor {head!r} in {checkpoint.folder}",
            expected=f"shape {list(tensors[embedding].shape)}, as {embedding!r} that it is tied to",
            found=f"{list(tensors[head].shape)}",
            remedy="Load the model with transformers and save it again",
        )
    plan.parts[head] = [replace(part, record=tensors[head]) for part in plan.parts[embedding]]
    if embedding in plan.rows:
        plan.rows[head] = plan.rows[embedding]


def _is_tied(config: Mapping[str, Any], stored_head: str | None) -> bool:
    """As config.json says; where it says nothing, a model without a stored head has its embedding as one."""
    text = config.get("text_config")
    stated = config.get(_FLAG, text.get(_FLAG) if isinstance(text, dict) else None)
    return stored_head is None if stated is None else bool(stated)


def _is_rows(changes: Changes, name: str) -> bool:
    """Whether only rows were trained, which PEFT ties by itself."""
    dense = changes.dense(name)
    return dense is not None and dense.last_row is not None


def _is_same(changes: Changes, first: str, second: str) -> bool:
    """Whether two weights change by exactly the same, so that they can stay one."""
    dense = [changes.dense(name) for name in (first, second)]
    if dense[0] is not None and dense[1] is not None:
        return dense[0].same_as(dense[1])
    stacked = [changes.stacked(name) for name in (first, second)]
    if dense != [None, None] or stacked[0] is None or stacked[1] is None:
        return False
    return all(torch.equal(one, two) for one, two in zip(*stacked, strict=True))


def _resized(checkpoint: Checkpoint, plan: FoldPlan) -> FoldPlan:
    """Notes a resized vocabulary in the config."""
    for name, rows in plan.rows.items():
        plan.config["vocab_size"] = rows
        for added, (source, _) in plan.added.items():
            if source == name:
                plan.rows = {**plan.rows, added: rows}
        assert rows != checkpoint.tensors()[name].shape[0]
    return plan
