"""A fold's plan where the output head is tied to the input embedding: kept so, or untied where the adapters demand it.

One stored tensor serves both. PEFT trains the two apart unless it is told otherwise, so an adapter of one of them
leaves the other as it was: folded into the one tensor it would change both. Trained token rows it puts into both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bam_lora.adapter_entries import EMBEDDINGS, HEADS
from bam_lora.adapters import Factors
from bam_lora.checkpoint import Checkpoint
from bam_lora.dense_change import BranchWeight, DenseChange
from bam_lora.errors import UserError
from bam_lora.fold_plan import Changes, FoldPlan, check_apart, place
from bam_lora.outline import Outline

_EMBEDDING_ENDS = tuple(f"{module}.weight" for module in EMBEDDINGS)
_HEAD_ENDS = tuple(f"{module}.weight" for module in HEADS)
_HEAD = "lm_head.weight"
# Models that share the configuration of one with an output head and have none: there is nothing to untie.
_HEADLESS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_FLAG = "tie_word_embeddings"


def plan_fold(
    checkpoint: Checkpoint, changes: Changes, *, untied: bool = False, partly: bool = False
) -> tuple[FoldPlan, Changes]:
    """Finds where every changed weight is stored, and what becomes of tied embeddings.

    Args:
        checkpoint: The base.
        changes: What is added to it.
        partly: Whether these are some of the changes: of a resized vocabulary the embedding may come without the head.
        untied: Whether the changes are of a model in which earlier ones have untied the base's embeddings.

    Returns:
        The plan, and the changes that it is a plan of: with those of a tied head that PEFT does not write down.

    Raises:
        UserError: If a weight is not there, has another shape, or is stored in a way that its change does not allow.
    """
    stored_embedding, stored_head = stored_ends(checkpoint)
    ends = (*_EMBEDDING_ENDS, *([stored_embedding] if stored_embedding else []))
    embedding = next((name for name in changes.names() if name.endswith(ends)), None)
    head = next((name for name in changes.names() if name.endswith(_HEAD_ENDS)), None)
    if not (embedding or head) or not is_tied(checkpoint.config, stored_head):
        return _finished(checkpoint, place(checkpoint, changes, {}), stored_embedding, stored_head, partly), changes
    if stored_embedding is None:
        raise UserError.of(
            f"base {checkpoint.folder}, which ties its embeddings",
            expected=f"the input embedding, such as {_EMBEDDING_ENDS[0]}, to change {head or embedding}",
            found=f"only {stored_head or 'neither'}",
            remedy="Load the model with transformers and save it again",
        )
    if stored_head:
        _check_copy(checkpoint, stored_embedding, stored_head)
    if embedding and not untied and changes.outline(embedding).highest_row is not None:
        head = head or _HEAD
        changes = _RowsInBoth(changes, embedding, head)
    plan = place(checkpoint, changes, {head: embedding or stored_embedding} if head and not stored_head else {})
    if embedding and head and not untied and _is_same(changes, embedding, head):
        plan.same[head] = embedding
        _keep_tied(plan, stored_embedding, stored_head, head)
    else:
        _untie(plan, changes, stored_embedding, stored_head, embedding, head)
    return _finished(checkpoint, plan, stored_embedding, stored_head, partly), changes


def stored_ends(checkpoint: Checkpoint) -> tuple[str | None, str | None]:
    """The stored input embedding and output head; by their names, or by a row for each token."""
    tensors, vocabulary = checkpoint.tensors(), checkpoint.config.get("vocab_size")
    head = next((name for name in tensors if name.endswith(_HEAD_ENDS)), None)
    by_name = next((name for name in tensors if name.endswith(_EMBEDDING_ENDS)), None)
    by_size = (name for name, one in tensors.items() if len(one.shape) == 2 and one.shape[0] == vocabulary)
    return by_name or next((name for name in by_size if name != head), None), head


def _check_copy(checkpoint: Checkpoint, embedding: str, head: str) -> None:
    tensors = checkpoint.tensors()
    if tensors[head].shape != tensors[embedding].shape:
        raise UserError.of(
            f"tensor {head!r} in {checkpoint.folder}",
            expected=f"shape {list(tensors[embedding].shape)}, as {embedding!r} that it is tied to",
            found=f"{list(tensors[head].shape)}",
            remedy="Load the model with transformers and save it again",
        )


def _keep_tied(plan: FoldPlan, stored_embedding: str, stored_head: str | None, head: str) -> None:
    """Both change alike: the one tensor, and a stored copy, which loaders that do not know of the tie may read."""
    if not stored_head:
        plan.parts[stored_embedding] = [part for part in plan.parts[stored_embedding] if part.name != head]


def _untie(
    plan: FoldPlan,
    changes: Changes,
    stored_embedding: str,
    stored_head: str | None,
    embedding: str | None,
    head: str | None,
) -> None:
    """Gives the head a tensor of its own."""
    plan.config[_FLAG] = False
    if stored_head:
        return
    shared = plan.parts.get(stored_embedding, [])
    own = [part for part in shared if part.name == head]
    if own:
        plan.parts[stored_embedding] = [part for part in shared if part.name != head]
    if not own and embedding and changes.outline(embedding).adds_to_whole:
        # The embedding's own layer, saved beside what was trained on it: reloading puts it in the head, too.
        own = [replace(part, direct=True) for part in shared]
    plan.added[head or _HEAD] = (stored_embedding, own)


def is_tied(config: Mapping[str, Any], stored_head: str | None) -> bool:
    """Whether the head is the embedding, as config.json says; where it says nothing, if no head is stored."""
    if stored_head is None and str((config.get("architectures") or [""])[0]).endswith(_HEADLESS):
        return False
    text = config.get("text_config")
    stated = config.get(_FLAG, text.get(_FLAG) if isinstance(text, dict) else None)
    return stored_head is None if stated is None else bool(stated)


class _RowsInBoth:
    """Changes in which the token rows of the embedding are those of the head, too, as PEFT has it for tied models."""

    def __init__(self, changes: Changes, embedding: str, head: str) -> None:
        self._changes, self._embedding, self._head = changes, embedding, head
        self._has_own = head in changes.names()

    def names(self) -> list[str]:
        return sorted({*self._changes.names(), self._head})

    def shape(self, name: str) -> tuple[int, int]:
        return self._changes.shape(name if name != self._head or self._has_own else self._embedding)

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if name == self._head else self._changes.stacked(name)

    def start_value(self, name: str) -> torch.Tensor | None:
        # A head that is tied begins as the embedding does.
        return self._changes.start_value(name if name != self._head or self._has_own else self._embedding)

    def outline(self, name: str) -> Outline:
        if name != self._head:
            return self._changes.outline(name)
        shared = self._changes.outline(self._embedding)
        own = self._changes.outline(name) if self._has_own else replace(shared, adds_to_whole=False)
        rows_alone = not self._has_own and shared.rows_alone
        return replace(own, low_rank=False, cuttable=False, highest_row=shared.highest_row, rows_alone=rows_alone)

    def dense(self, name: str) -> DenseChange | None:
        if name != self._head:
            return self._changes.dense(name)
        shared = self._changes.dense(self._embedding)
        assert shared is not None, self._embedding
        rows = shared.each(lambda one: BranchWeight(indices=one.indices, rows=one.rows))
        rows = replace(rows, branches=tuple(None if one is None or one.rows is None else one for one in rows.branches))
        own = self._changes.dense(name) if self._has_own else None
        if own is not None:
            pairs = zip(own.branches, rows.branches, strict=True)
            return replace(own, branches=tuple(_with_rows(one, more) for one, more in pairs))
        stacked = self._changes.stacked(name) if self._has_own else None
        if stacked is None:
            return rows
        product = BranchWeight(factors=Factors(A_ri=stacked[1], B_or=stacked[0], scaling=1.0))
        return replace(rows, branches=(*rows.branches, product), weights=(*rows.weights, 1.0))


def _with_rows(one: BranchWeight | None, more: BranchWeight | None) -> BranchWeight | None:
    if more is None or (one is not None and one.rows is not None):
        return one
    return more if one is None else replace(one, indices=more.indices, rows=more.rows)


def _is_same(changes: Changes, first: str, second: str) -> bool:
    """Whether two weights change by exactly the same, so that they can stay one."""
    starts = [changes.start_value(name) for name in (first, second)]
    if starts[0] is None or starts[1] is None:
        if starts != [None, None]:
            return False
    elif not torch.equal(starts[0], starts[1]):
        return False
    dense = [changes.dense(name) for name in (first, second)]
    if dense[0] is not None and dense[1] is not None:
        return dense[0].same_as(dense[1])
    stacked = [changes.stacked(name) for name in (first, second)]
    if dense != [None, None]:
        return False
    if stacked[0] is None or stacked[1] is None:
        return stacked == [None, None] and starts[0] is not None
    return all(torch.equal(one, two) for one, two in zip(*stacked, strict=True))


def _finished(
    checkpoint: Checkpoint, plan: FoldPlan, stored_embedding: str | None, stored_head: str | None, partly: bool
) -> FoldPlan:
    """The plan with a resized vocabulary in the config; embedding and head must have it both."""
    check_apart(checkpoint, plan)
    for added, (source, parts) in plan.added.items():
        if source in plan.rows and parts:
            plan.rows[added] = plan.rows[source]
    tensors = checkpoint.tensors()
    ends = {name: tensors[name].shape[0] for name in (stored_embedding, stored_head) if name}
    ends |= {added: tensors[source].shape[0] for added, (source, _) in plan.added.items()}
    resized = {name: plan.rows.get(name, rows) for name, rows in ends.items()}
    if not partly and plan.rows and len(set(resized.values())) > 1 and len(set(ends.values())) == 1:
        found = ", ".join(f"{name} {rows}" for name, rows in resized.items())
        raise UserError.of(
            f"the resized vocabulary of {checkpoint.folder}",
            expected="as many rows in the embedding and the output head",
            found=found,
            remedy="Save the adapter again with save_embedding_layers=True, so that it holds both",
        )
    weights = [rows for name, rows in plan.rows.items() if name.endswith(".weight")]
    if weights:
        plan.config["vocab_size"] = weights[0]
    return plan
