"""From the tensors of an adapter file to what it holds for each weight; none is left over.

Shapes: o output, i input, r rank, E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bam_lora.adapter_config import CONFIG_FILE, is_inside, is_saved_whole, rank_of, scaling_of, token_indices
from bam_lora.errors import UserError
from bam_lora.safetensors_stream import Header, TensorRecord

Read = Callable[[TensorRecord], torch.Tensor]

_FLOATING = ("F64", "F32", "F16", "BF16")
PREFIX = "base_model.model."
_KINDS = {
    "factor": re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight"),
    "bias": re.compile(r"(?P<module>.+)\.lora_(?P<half>B)\.bias"),
    "embedding": re.compile(r"(?P<module>.+)\.lora_embedding_(?P<half>[AB])"),
    "magnitude": re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?"),
    "tokens": re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta"),
    "duplicate": re.compile(r"(?P<module>.+)\.(original_module|modules_to_save)\.(weight|bias)"),
    "value": re.compile(r"(?P<module>.+)\.(weight|bias)"),
}
# What PEFT leaves aside when it loads a tensor of this kind and the configuration does not say so.
_SAID_BY = {"bias": "lora_bias", "magnitude": "use_dora", "tokens": "trainable_token_indices"}
_WRAPPERS = ("base_layer", "token_adapter")  # what PEFT puts between a module and its own weight
_COPIES = ("original_module", "modules_to_save")
_VECTORS = ("bias", "magnitude")
_ANY_SHAPE = ("value", "duplicate")
# The order in which modules of fused experts define their parameters, which is the order of PEFT's nested wrappers.
FUSED_ORDER = ("gate_up_proj", "down_proj")
# Input embeddings and output heads, which PEFT saves whole when the vocabulary was resized or they are adapted.
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True)
class LowRank:
    """Where the factors of scaling · B_or · A_ri lie, and how.

    `layout`: "linear" A (r, i), B (o, r); "embedding" A (r, o), B (i, r), whose product is the transpose; "bias" a
    vector, B (o,) and no A; "expert" A (E·r, i), B (o, r·E), of which `expert` is one. `by_parameter`: adapted through
    `target_parameters`, not as a module.
    """

    B: TensorRecord
    A: TensorRecord | None
    scaling: float
    layout: Literal["linear", "embedding", "bias", "expert"] = "linear"
    expert: int = 0
    experts: int = 1
    by_parameter: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i); a bias has one column."""
        if self.A is None:
            return self.B.shape[0], 1
        rows, columns = self.B.shape[0], self.A.shape[1]
        return (columns, rows) if self.layout == "embedding" else (rows, columns)

    @property
    def rank(self) -> int:
        """The rank r of this delta."""
        return 1 if self.A is None else self.A.shape[0] // self.experts

    def factors(self, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
        """(B_or, A_ri) as stored."""
        B = read(self.B)
        if self.A is None:
            return B[:, None], torch.ones(1, 1, dtype=B.dtype)
        A = read(self.A)
        if self.layout == "embedding":
            return A.T.contiguous(), B.T.contiguous()
        if self.layout == "expert":
            rank = self.rank
            A_ri = A[self.expert * rank : (self.expert + 1) * rank].clone()  # which holds no other expert's, nor a file
            return B.view(B.shape[0], rank, self.experts)[:, :, self.expert].contiguous(), A_ri
        return B, A


@dataclass(frozen=True)
class Tokens:
    """Rows of a weight that were trained as such: values (n, i) of the rows `indices`."""

    indices: tuple[int, ...]
    values: TensorRecord


@dataclass(frozen=True)
class Entry:
    """All that an adapter holds for one weight: a low-rank delta, DoRA's magnitudes, the weight whole, rows of it."""

    low_rank: LowRank | None = None
    magnitude: TensorRecord | None = None
    value: TensorRecord | None = None
    tokens: Tokens | None = None

    @property
    def is_low_rank(self) -> bool:
        """Whether its delta is a low-rank product, whatever the base; a copy of the base beside it changes nothing."""
        return self.low_rank is not None and self.magnitude is None and self.tokens is None

    @property
    def value_shape(self) -> tuple[int, int]:
        """(o, i) of the weight that it holds whole."""
        assert self.value is not None
        return self.value.shape[0], math.prod(self.value.shape[1:])

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i) of the weight; a vector has one column. Of trained rows only (1 + the last of them, i)."""
        if self.low_rank is not None:
            return self.low_rank.shape
        if self.value is not None:
            return self.value_shape
        assert self.tokens is not None
        return 1 + max(self.tokens.indices, default=0), self.tokens.values.shape[1]


def entries_of(folder: Path, config: Mapping[str, Any], header: Header) -> dict[str, Entry]:
    """What an adapter holds, by the names of the model's parameters (`name[e]` for one of several fused experts).

    Raises:
        UserError: Naming the first tensor that is not understood, or whose partner is missing.
    """
    found: dict[str, dict[str, TensorRecord]] = {kind: {} for kind in _KINDS}
    for record in header.tensors.values():
        kind, key = _kind(config, header.path, record)
        if key in found[kind]:
            raise _twice(header.path, record, f"{found[kind][key].name!r} as well")
        found[kind][key] = record
    path = folder / CONFIG_FILE
    entries: dict[str, Entry] = {}
    for kind in ("factor", "embedding"):
        for module in sorted({key.rpartition(":")[0] for key in found[kind]}):
            for name, entry in _pair(header.path, path, config, module, found[kind], kind).items():
                if name in entries:
                    raise _twice(header.path, found[kind][f"{module}:A"], "another pair for the same weight")
                entries[name] = entry
    _add_to_pairs(header.path, path, config, found, entries)
    for module, record in found["tokens"].items():
        tokens = Tokens(token_indices(path, config, module, record.shape[0]), record)
        entries[f"{module}.weight"] = replace(entries.get(f"{module}.weight", Entry()), tokens=tokens)
    for name, record in found["value"].items():
        entries[name] = replace(entries.get(name, Entry()), value=record)
    for key, record in found["duplicate"].items():
        name = key.partition(":")[0]
        value = found["value"].get(name)
        if value is None or value.shape != record.shape:
            shape = "nothing" if value is None else f"{list(value.shape)}"
            raise _unused(header.path, record, f"{name} of shape {list(record.shape)} beside it", shape)
    return entries


def _add_to_pairs(
    weights: Path,
    path: Path,
    config: Mapping[str, Any],
    found: Mapping[str, Mapping[str, TensorRecord]],
    entries: dict[str, Entry],
) -> None:
    """Adds biases and magnitudes to the deltas that they belong to."""
    for kind, mark in (("bias", "bias"), ("magnitude", "magnitude")):
        for key, record in found[kind].items():
            module = key.rpartition(":")[0] if kind == "bias" else key
            pair = entries.get(f"{module}.weight")
            if pair is None or pair.low_rank is None:
                raise _unused(weights, record, f"lora_A and lora_B of {module} too", f"a {mark} alone")
            rows, columns = pair.low_rank.shape
            outputs = columns if pair.low_rank.layout == "embedding" else rows
            if record.shape != (outputs,):
                raise UserError.of(
                    f"tensor {record.name!r} in {weights}",
                    expected=f"{outputs} numbers, one for each output of {module}",
                    found=f"{record.shape[0]}",
                    remedy="The file is damaged; save the adapter again",
                )
            if kind == "magnitude":
                entries[f"{module}.weight"] = replace(pair, magnitude=record)
            else:
                entries[f"{module}.bias"] = Entry(LowRank(record, None, scaling_of(path, config, module), "bias"))


def _kind(config: Mapping[str, Any], path: Path, record: TensorRecord) -> tuple[str, str]:
    """(kind of tensor, module or weight name, with the half of a pair)."""
    name = record.name.removeprefix(PREFIX)
    if name == record.name:
        raise _unused(path, record, f"a name that begins with {PREFIX}", "another")
    for kind, pattern in _KINDS.items():
        match = pattern.fullmatch(name)
        if match is None or (kind == "value" and ".lora_" in name):
            continue
        _check_shape(path, record, kind)
        if not config.get(_SAID_BY.get(kind, "peft_type")):
            break
        if kind not in _ANY_SHAPE:
            return kind, match["module"] + (f":{match['half']}" if "half" in match.groupdict() else "")
        # With a resized vocabulary PEFT writes all that an embedding's wrapper holds: the trained weight under its own
        # name and under that of the wrapper, and the frozen original, which no forward pass uses.
        name = ".".join(part for part in name.split(".") if part not in (*_WRAPPERS, *_COPIES))
        if is_saved_whole(config, name) or name.split(".")[-2] in (*EMBEDDINGS, *HEADS):
            return kind, name if kind == "value" else f"{name}:{record.name}"
        break
    else:
        if ".lora_" not in name and any(is_inside(saved, name) for saved in config.get("modules_to_save") or ()):
            kinds = "weights and biases alone in modules_to_save"
            raise _unused(path, record, kinds, f"a parameter {name.rpartition('.')[2]!r}")
    raise _unused(path, record, f"a tensor of LoRA or of a module saved whole, as {CONFIG_FILE} says", "neither")


def _check_shape(path: Path, record: TensorRecord, kind: str) -> None:
    """Refuses what is no vector or matrix of floating-point numbers, as its kind demands."""
    wanted = "vector" if kind in _VECTORS else "vector or matrix" if kind in _ANY_SHAPE else "matrix"
    dimensions = len(record.shape)
    fitting = dimensions > 0 if kind in _ANY_SHAPE else dimensions == (1 if kind in _VECTORS else 2)
    if record.dtype not in _FLOATING or not fitting:
        raise _unused(path, record, f"a floating-point {wanted}", f"{record.dtype} of shape {list(record.shape)}")


def _twice(path: Path, record: TensorRecord, found: str) -> UserError:
    return _unused(path, record, "one tensor for what it holds", found, "Save the adapter again")


def _unused(
    path: Path, record: TensorRecord, expected: str, found: str, remedy: str = "This is not in this version"
) -> UserError:
    return UserError.of(f"tensor {record.name!r} in {path}", expected=expected, found=found, remedy=remedy)


def _pair(
    weights: Path, path: Path, config: Mapping[str, Any], module: str, halves: Mapping[str, TensorRecord], kind: str
) -> dict[str, Entry]:
    """The delta, or the deltas of a module's fused experts, that two halves make."""
    missing = next((half for half in "AB" if f"{module}:{half}" not in halves), None)
    mark = "lora_" if kind == "factor" else "lora_embedding_"
    if missing:
        raise UserError.of(
            f"module {module!r} in {weights}",
            expected=f"{mark}{missing} too",
            found=f"only {mark}{'B' if missing == 'A' else 'A'}",
            remedy="Save it again",
        )
    A, B = halves[f"{module}:A"], halves[f"{module}:B"]
    parameter = _fused_parameter(weights, config, module, A)
    rank = rank_of(path, config, parameter or module)
    experts = int(A.shape[0] / rank) if parameter and A.shape[0] % rank == 0 else 1
    if A.shape[0] != rank * experts or B.shape[1] != rank * experts:
        raise UserError.of(
            f"module {module!r} in {weights}",
            expected=f"rank {rank:g}, as {CONFIG_FILE} says",
            found=f"A {list(A.shape)} and B {list(B.shape)}",
            remedy="The two files do not belong together; save the adapter again",
        )
    scaling = scaling_of(path, config, parameter or module)
    if parameter and experts > 1:
        return {
            f"{parameter}[{e}]": Entry(LowRank(B, A, scaling, "expert", e, experts, True)) for e in range(experts)
        }  # fmt: skip
    name = parameter or f"{module}.weight"
    layout: Literal["linear", "embedding"] = "linear" if kind == "factor" else "embedding"
    return {name: Entry(LowRank(B, A, scaling, layout, by_parameter=parameter is not None))}


def _fused_parameter(weights: Path, config: Mapping[str, Any], module: str, A: TensorRecord) -> str | None:
    """The parameter that a module's factors belong to where `target_parameters` names it, else None.

    PEFT wraps a module once per parameter of it: the first one innermost, under as many `base_layer` as there are more.
    """
    plain = module.removesuffix(".base_layer")
    depth = 0
    while plain != module:
        depth, module, plain = depth + 1, plain, plain.removesuffix(".base_layer")
    named = [str(target) for target in config.get("target_parameters") or ()]
    paths = [target.rpartition(".") for target in named]
    own = {last for above, _, last in paths if not above or f".{module}".endswith(f".{above}")}
    strange = sorted(own - {*FUSED_ORDER, "weight"})
    if module.endswith("experts") and strange:
        raise _unused(weights, A, f"{' or '.join(FUSED_ORDER)} in target_parameters", strange[0])
    fused = [name for name in FUSED_ORDER if name in own]
    if module.endswith("experts") and fused:
        if depth < len(fused):
            return f"{module}.{fused[len(fused) - 1 - depth]}"
        raise _unused(weights, A, f"a parameter of {module} that target_parameters names", f"{len(fused)} of them")
    return f"{module}.weight" if "weight" in own and not depth else None
