"""A base with a larger vocabulary: rows for new tokens, the means of their pieces' rows, folded in by streaming.

Shapes: V rows of the old embedding, W of the new one, d hidden size, n new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bam_lora.checkpoint import Checkpoint, open_checkpoint
from bam_lora.dense_change import BranchWeight, DenseChange
from bam_lora.errors import UserError
from bam_lora.fold_plan import EMBEDDING_NAMES
from bam_lora.folding import fold_into
from bam_lora.outline import Outline
from bam_lora.safetensors_stream import TensorRecord, map_tensor
from bam_lora.tied_weights import is_tied, stored_ends


def grown_rows(rows_Vd: torch.Tensor, pieces: Sequence[Sequence[int]], first: int, count: int) -> torch.Tensor:
    """An embedding, or output head, with rows for new tokens.

    w_t = 1/|p(t)| · Σ_{j ∈ p(t)} w_j over the pieces p(t) that the old tokenizer makes of a token: the start that
    arXiv 2112.07210 (FVT) gives it. In fp32, piece by piece, rounded once to the type of the rows.

    Args:
        rows_Vd: The old rows, which keep every bit.
        pieces: (n,) the pieces of each new token, as row numbers.
        first: The row of the first new token; padding rows of the base there are overwritten.
        count: W, at least `first + n`. Rows that no token has, and had none, get the mean of all old rows: a zero would
            give a token that is none a middling logit.

    Returns:
        (W, d) of the type of the rows.
    """
    assert first + len(pieces) <= count, (first, len(pieces), count)
    grown = torch.empty((count, *rows_Vd.shape[1:]), dtype=rows_Vd.dtype)
    kept = min(len(rows_Vd), count)
    grown[:kept] = rows_Vd[:kept]
    if kept < count:
        grown[kept:] = rows_Vd[:first].float().mean(dim=0).to(rows_Vd.dtype)
    by_length: dict[int, list[int]] = {}
    for place, one in enumerate(pieces):
        by_length.setdefault(len(one), []).append(place)
    for length, places in by_length.items():
        index = torch.tensor([list(pieces[place]) for place in places])
        total = rows_Vd[index[:, 0]].float()
        for column in range(1, length):
            total += rows_Vd[index[:, column]].float()
        grown[torch.tensor(places) + first] = (total / length).to(rows_Vd.dtype)
    return grown


def row_count(base: Path, needed: int, multiple: int | None) -> int:
    """W: the rows for so many tokens, no fewer than the base has, at a multiple of some number."""
    rows = max(needed, _vocabulary_rows(open_checkpoint(base)))
    return rows if multiple is None else -(-rows // multiple) * multiple


def embedding_modules(base: Path) -> tuple[list[str], bool]:
    """The modules with a row for each token, by the ends of their names, and whether there is one because of a tie."""
    checkpoint = open_checkpoint(base)
    embedding, head = stored_ends(checkpoint)
    tied = is_tied(checkpoint.config, head)
    stored = [name for name in (embedding, None if tied else head) if name]
    return [name.removesuffix(".weight").rpartition(".")[2] for name in stored], tied


def grow_base(
    base: Path,
    pieces: Sequence[Sequence[int]],
    first: int,
    count: int,
    tokenizer: Path,
    output: Path,
    *,
    key: str,
) -> dict[str, Any]:
    """Writes a base with new rows and a new tokenizer as a model folder, sealed with `key`.

    Args:
        base: Folder of the full-precision base.
        pieces: See `grown_rows`, as for the next two.
        first: The row of the first new token.
        count: W.
        tokenizer: Folder of the new tokenizer.
        output: Folder to write.
        key: Hash of everything the result is a function of.

    Returns:
        What `fold_into` returns.

    Raises:
        UserError: If the base has other tables by token than an embedding and a head, or `fold_into` refuses it.
    """
    changes = _GrownEmbeddings(open_checkpoint(base), pieces, first, count)
    return fold_into(base, changes, output, key=key, tokenizer=tokenizer)


def _vocabulary_rows(checkpoint: Checkpoint) -> int:
    embedding, head = stored_ends(checkpoint)
    name = embedding or head
    if name is None:
        raise UserError.of(
            f"base {checkpoint.folder}", expected="an input embedding", found="none", remedy="Leave out `vocabulary`"
        )
    return checkpoint.tensors()[name].shape[0]


class _GrownEmbeddings:
    """The changes that a larger vocabulary makes: the embedding, the head and its bias, whole."""

    def __init__(self, checkpoint: Checkpoint, pieces: Sequence[Sequence[int]], first: int, count: int) -> None:
        rows = _vocabulary_rows(checkpoint)
        tensors = checkpoint.tensors()
        embedding, head = stored_ends(checkpoint)
        self._stored = {name: name for name in tensors if name.endswith(EMBEDDING_NAMES)}
        self._stored |= {name: name for name in (embedding, head) if name}
        if head is None and embedding is not None:
            self._stored["lm_head.weight"] = embedding  # tied: both change alike, so they stay one
        self._check(checkpoint, rows)
        self._paths = {name: one.path for one in checkpoint.shards.values() for name in one.tensors}
        self._tensors, self._pieces, self._first, self._count = tensors, pieces, first, count
        self._known: dict[str, DenseChange] = {}

    def _check(self, checkpoint: Checkpoint, rows: int) -> None:
        odd = [name for name in self._stored.values() if checkpoint.tensors()[name].shape[0] != rows]
        odd += [
            name for name, one in checkpoint.tensors().items()
            if len(one.shape) == 2 and "embed" in name and one.shape[0] == rows and name not in self._stored.values()
        ]  # fmt: skip
        if odd:
            raise UserError.of(
                f"base {checkpoint.folder}",
                expected="one input embedding and one output head with a row for each token",
                found=f"{odd[0]!r} beside them",
                remedy="Leave out `vocabulary`",
            )

    def names(self) -> list[str]:
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, int]:
        record = self._record(name)
        return self._count, record.shape[1] if len(record.shape) == 2 else 1

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None

    def start_value(self, name: str) -> torch.Tensor | None:
        return None

    def outline(self, name: str) -> Outline:
        return Outline(low_rank=False, cuttable=False, stored_rows=self._count, whole_share=1.0)

    def dense(self, name: str) -> DenseChange | None:
        stored = self._stored[name]
        if stored not in self._known:
            rows = map_tensor(self._paths[stored], self._record(name))
            value = grown_rows(rows, self._pieces, self._first, self._count)
            value = value if value.ndim == 2 else value[:, None]
            self._known[stored] = DenseChange((BranchWeight(value=value),), (1.0,))
        return self._known[stored]

    def _record(self, name: str) -> TensorRecord:
        return self._tensors[self._stored[name]]
