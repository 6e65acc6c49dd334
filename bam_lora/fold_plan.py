"""What a fold will write: which part of which stored tensor changes by what, found from names and shapes alone.

Shapes: o output, i input, R stacked rank. A changed weight has the name of a parameter of the model in memory; the
checkpoint may store it under another name, in pieces, as one matrix of several, or transposed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bam_lora.adapter_entries import EMBEDDINGS, HEADS
from bam_lora.adapters import Factors
from bam_lora.checkpoint import Checkpoint
from bam_lora.dense_change import Blocks, DenseChange, Resolver, turned
from bam_lora.errors import UserError, some
from bam_lora.fold_blocks import as_matrix
from bam_lora.outline import Outline
from bam_lora.parameter_names import Piece, has_inputs_first, stored_parameters
from bam_lora.safetensors_stream import TORCH_DTYPES, TensorRecord

if TYPE_CHECKING:
    from bam_lora.difference import StoredDifference

# Square matrices do not tell which way round they are; these architectures have layers that keep the inputs first.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_MODULES = (".c_attn.weight", ".q_attn.weight", ".c_proj.weight", ".c_fc.weight")
EMBEDDING_NAMES = (*(f"{module}.weight" for module in (*EMBEDDINGS, *HEADS)), *(f"{module}.bias" for module in HEADS))


class Changes(Protocol):
    """What is added to a base: a ledger's view or merged adapters."""

    def names(self) -> list[str]:
        """The weights that change, by the names of the model's parameters, sorted; `name[e]` is a fused expert."""
        ...

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i) of such a weight; a vector is one column."""
        ...

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(B_oR, A_Ri) in fp32, whose product is added, or None."""
        ...

    def start_value(self, name: str) -> torch.Tensor | None:
        """(o, i) in fp32, to be taken instead of the base's value, or None."""
        ...

    def dense(self, name: str) -> DenseChange | None:
        """A change that is no low-rank product, or None."""
        ...

    def outline(self, name: str) -> Outline:
        """The kind of the change, without reading a number of it."""
        ...


@dataclass(frozen=True)
class Part:
    """Rows [first, stop) of a changed weight and the matrix of the checkpoint that stores them.

    `flipped`: the adapters see the weight transposed; `transposed`: the checkpoint stores it transposed.
    `difference`: what is added to the stored matrix in the end.
    """

    name: str
    record: TensorRecord
    first: int
    stop: int
    flipped: bool
    transposed: bool
    whole: bool  # the weight is stored in one piece
    direct: bool = False  # only what the adapters hold whole, without what they add to it
    difference: StoredDifference | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the stored matrix as it becomes: a resized vocabulary has other rows."""
        rows, columns = as_matrix(self.record.shape)
        return (rows if self.transposed else self.stop - self.first, columns)

    @property
    def identity(self) -> str:
        """A name of its own for the stored matrix: methods by element see a weight as the checkpoint cuts it."""
        return self.name if self.whole else f"{self.name}: {self.record.name}"

    def low_rank(self, B_oR: torch.Tensor, A_Ri: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of what is added to the stored matrix."""
        factors = Factors(A_ri=A_Ri, B_or=B_oR, scaling=1.0)
        factors = turned(factors) if self.flipped else factors
        factors = replace(factors, B_or=factors.B_or[self.first : self.stop])
        factors = turned(factors) if self.transposed else factors
        return factors.B_or, factors.A_ri

    def dense(self, change: DenseChange) -> DenseChange:
        """The change of the stored matrix."""
        change = change.each(lambda one: one.transposed()) if self.flipped else change
        change = change.each(lambda one: one.cut(self.first, self.stop))
        change = change.each(lambda one: one.transposed()) if self.transposed else change
        return change.each(lambda one: replace(one, factors=None, magnitude=None)) if self.direct else change

    def resolver(self, change: DenseChange | None, blocks: Blocks) -> Resolver | None:
        """What computes blocks of the stored matrix once low-rank products are added, or None if that is all.

        Args:
            change: Of the weight, where it is no low-rank product.
            blocks: The stored matrix with its low-rank products.
        """
        resolve = None if change is None else self.dense(change).bind(blocks, self.identity)
        return resolve if self.difference is None else self.difference.after(resolve)

    def start(self, value: torch.Tensor) -> torch.Tensor:
        """The stored matrix in place of the base's."""
        value = value[self.first : self.stop]
        return value.T.contiguous() if self.transposed else value


@dataclass
class FoldPlan:
    """Parts by the stored tensor that they change, tensors that are new, new shapes and what the config must say.

    Attributes:
        parts: In the order in which they lie in the tensor.
        added: {new name: (the stored tensor it begins as, its parts)}: an output head that was tied.
        rows: {stored tensor: its new number of rows}: a resized vocabulary.
        config: Values of config.json that change.
        same: {output head: the input embedding that it stays tied to}, where both change.
    """

    parts: dict[str, list[Part]] = field(default_factory=dict)
    added: dict[str, tuple[str, list[Part]]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)


def place(checkpoint: Checkpoint, changes: Changes, names: Mapping[str, str]) -> FoldPlan:
    """Finds where every changed weight is stored.

    Args:
        checkpoint: The base.
        changes: What is added to it.
        names: {changed weight: another, in whose place it is looked for}.

    Raises:
        UserError: If a weight is not there, has another shape, or is stored in a way that its change does not allow.
    """
    plan, missing, wrong = FoldPlan(), [], []
    tensors = checkpoint.tensors()
    stored = stored_parameters(checkpoint.config, tensors)
    for name in changes.names():
        pieces = find_pieces(names.get(name, name), tensors, stored)
        if pieces is None:
            missing.append(name)
            continue
        problem = _place_one(plan, checkpoint, changes, name, pieces)
        if problem:
            wrong.append(problem)
    if missing:
        found, expected = f"no {some(missing)}", f"the {len(changes.names())} weights that the adapters change"
    elif wrong:
        found, expected = some(wrong), "weights of the adapters' shapes"
    else:
        for parts in plan.parts.values():
            parts.sort(key=lambda part: part.record.start)
        return plan
    raise UserError.of(
        f"base {checkpoint.folder}", expected=expected, found=found, remedy="The adapters belong to another base"
    )


def check_apart(checkpoint: Checkpoint, plan: FoldPlan) -> None:
    """Refuses two names for one stored matrix: adapters of other versions of a library may name a module otherwise.

    Raises:
        UserError: Naming the tensor and both names.
    """
    for stored, parts in plan.parts.items():
        for one, two in itertools.pairwise(parts):
            if two.record.start < one.record.stop:
                raise UserError.of(
                    f"tensor {stored!r} in {checkpoint.folder}",
                    expected="one name for it in all adapters",
                    found=f"{one.name!r} and {two.name!r}",
                    remedy="Save the adapters again with one version of transformers and PEFT, or fold them in turn",
                )


def find_pieces(
    name: str, tensors: Mapping[str, TensorRecord], stored: Mapping[str, list[Piece]]
) -> list[Piece] | None:
    """Where a parameter is stored, or None; `stored` are the parameters whose names are not those of tensors."""
    record = tensors.get(name)
    if record is not None and len(record.shape) <= 2:
        return [Piece(name, None, (0, as_matrix(record.shape)[0]), False)]
    return stored.get(name)


def _place_one(plan: FoldPlan, checkpoint: Checkpoint, changes: Changes, name: str, pieces: list[Piece]) -> str | None:
    """Enters one weight into the plan, or says what is wrong with its shape."""
    records = [stored_matrix(checkpoint, piece) for piece in pieces]
    turned_sizes = [
        as_matrix(record.shape)[:: -1 if piece.transposed else 1] for record, piece in zip(records, pieces, strict=True)
    ]
    shape, wanted = (sum(rows for rows, _ in turned_sizes), turned_sizes[0][1]), changes.shape(name)
    outline = changes.outline(name)
    flipped = _is_flipped(checkpoint.config, name, wanted, shape)
    if flipped is None:
        flipped = False
        if not _fits_by_rows(plan, outline, wanted, shape, pieces):
            return f"{name} {list(shape)}, not {list(wanted)}"
    if not outline.cuttable and (len(pieces) > 1 or pieces[0].transposed):
        raise _not_whole(checkpoint, name, "several tensors, or its transpose")
    for record, piece in zip(records, pieces, strict=True):
        first, stop = piece.rows
        stop = plan.rows.get(piece.tensor, stop)
        part = Part(name, record, first, stop, flipped, piece.transposed, whole=len(pieces) == 1)
        plan.parts.setdefault(piece.tensor, []).append(part)
    return None


def stored_matrix(checkpoint: Checkpoint, piece: Piece) -> TensorRecord:
    """The part of a stored tensor that a piece is, as a record of its own."""
    record = checkpoint.tensors()[piece.tensor]
    if record.dtype not in TORCH_DTYPES:
        raise UserError.of(
            f"tensor {record.name!r} in {checkpoint.folder}",
            expected=f"one of {', '.join(TORCH_DTYPES)}",
            found=record.dtype,
            remedy="Use the 16-bit or 32-bit model",
        )
    if piece.index is not None:
        size = (record.stop - record.start) // record.shape[0]
        start = record.start + piece.index * size
        record = replace(record, shape=record.shape[1:], start=start, stop=start + size)
    if piece.stored_rows is not None:
        rows, _ = as_matrix(record.shape)
        row = (record.stop - record.start) // rows
        if piece.transposed and piece.stored_rows != (0, rows):
            raise _not_whole(checkpoint, record.name, "some columns of it")
        first, stop = piece.stored_rows
        shape = (stop - first, *record.shape[1:])
        record = replace(record, shape=shape, start=record.start + first * row, stop=record.start + stop * row)
    return record


def _not_whole(checkpoint: Checkpoint, name: str, found: str) -> UserError:
    return UserError.of(
        f"weight {name!r} in {checkpoint.folder}",
        expected="a change of a tensor that is stored as it is in memory",
        found=found,
        remedy="Adapt it with plain LoRA, or leave it out of the target modules",
    )


def _is_flipped(config: Mapping[str, Any], name: str, wanted: tuple[int, int], shape: tuple[int, int]) -> bool | None:
    """Whether the adapters see the matrix of this shape transposed; None: they see another one.

    PEFT trains (outputs, inputs) for every layer; transformers' Conv1D and some fused experts hold (inputs, outputs).
    """
    if wanted != shape[::-1]:
        return False if wanted == shape else None
    if wanted != shape:
        return True
    kinds = {config.get("model_type"), (config.get("text_config") or {}).get("model_type")}
    if name.endswith("]"):
        return has_inputs_first(config, name.rpartition("[")[0])
    return name.endswith(_CONV1D_MODULES) and bool(kinds.intersection(_CONV1D))


def _fits_by_rows(
    plan: FoldPlan, outline: Outline, wanted: tuple[int, int], shape: tuple[int, int], pieces: list[Piece]
) -> bool:
    """Whether the weight has other rows because only some were trained, or because the vocabulary was resized."""
    if wanted[1] != shape[1] or len(pieces) > 1:
        return False
    if outline.last_row is not None:
        return outline.last_row < shape[0]
    if outline.by_element:
        return False  # new rows have no value to add a delta to
    if outline.stored_rows != wanted[0] or not pieces[0].tensor.endswith(EMBEDDING_NAMES):
        return False
    if abs(outline.whole_share - 1) > 1e-9:
        raise UserError.of(
            f"the weights of {pieces[0].tensor!r}, whose vocabulary was resized",
            expected="a sum of 1 over the adapters that hold it",
            found=f"{outline.whole_share:g}",
            remedy="Give weights that sum to 1; new rows have no value in the base",
        )
    plan.rows[pieces[0].tensor] = wanted[0]
    return True
