"""What one decoder layer keeps for its backward pass, in bytes for a token: from its widths, and who saves what.

The base is frozen, so its own layers save no inputs; adapters do. Norms compute in fp32 and save their input so.
"""

from __future__ import annotations

from dataclasses import dataclass

from bam_lora.attention import BY_DOCUMENT, PACKED
from bam_lora.memory_shape import BaseShape


@dataclass(frozen=True)
class Work:
    """One forward and backward pass.

    Attributes:
        tokens: Of a batch; packed rows are one row of them.
        checkpointing: Whether layers are computed again in the backward pass.
        attention: "sdpa", "packed", "eager", "flash_attention_2" or another of transformers' names.
        dtype_bytes: Of a number that is computed with.
        rank: Of the adapters.
        dropout: Whether they have dropout.
        device: "cpu" or "cuda".
        fused: Whether Liger's kernels compute norms and gated activations: they keep what goes in, as it is.
    """

    tokens: int
    checkpointing: bool
    attention: str
    dtype_bytes: int
    rank: int
    dropout: bool
    device: str
    fused: bool = False


def stored_bytes(work: Work, shape: BaseShape) -> int:
    """Activations that are there at the start of the backward pass.

    With checkpointing the input of every layer, c·H a token; else all that every layer keeps. In both the mask of
    packed rows, T² (and, without checkpointing, once a layer in the type that is computed with).
    """
    if work.checkpointing:
        stream = shape.layers * work.tokens * shape.hidden * work.dtype_bytes
    else:
        stream = shape.layers * layer_bytes(work, shape)
    return stream + _shared_mask(work) + work.tokens * (4 + work.dtype_bytes) * shape.hidden  # the last norm


def recomputed_bytes(work: Work, shape: BaseShape) -> int:
    """What is kept of the one layer that the backward pass is in, beside what is stored; 0 without checkpointing."""
    return layer_bytes(work, shape) if work.checkpointing else 0


def layer_bytes(work: Work, shape: BaseShape) -> int:
    """What one decoder layer keeps for its backward pass."""
    token = norm_bytes(work, shape) + attention_bytes(work, shape) + mlp_bytes(work, shape) + lora_bytes(work, shape)
    return work.tokens * token + attention_square_bytes(work, shape)


def norm_bytes(work: Work, shape: BaseShape) -> int:
    """Every norm: its input in fp32, 4·H (fused: as it is, c·H).

    Of the two before linear layers the output, c·H, as the adapters' input; with dropout adapters keep what that gives
    instead (`lora_bytes`). Norms of queries and keys keep those in fp32, too.
    """
    kept = work.dtype_bytes if work.fused else 4
    stream = kept * shape.norms * shape.hidden + (0 if work.dropout else 2 * work.dtype_bytes * shape.hidden)
    heads = kept * shape.head_dim * (shape.heads + shape.kv_heads) if shape.head_norms else 0
    return stream + heads


def attention_bytes(work: Work, shape: BaseShape) -> int:
    """Queries, keys, values and the result, which the adapter of the layer after it keeps, too; a sum in fp32 a head.

    With a mask, transformers repeats keys and values for every head of the queries; document by document that is not
    needed. On a CPU these are in fp32 then, and the result is there in the computing type, too.
    """
    kept = 2 * shape.heads + 2 * (shape.kv_heads if work.attention in BY_DOCUMENT else shape.heads)
    kept_bytes = work.dtype_bytes * kept
    if work.attention == PACKED and work.device == "cpu":
        kept_bytes = 4 * kept + work.dtype_bytes * shape.heads
    return shape.head_dim * kept_bytes + 4 * shape.heads


def attention_square_bytes(work: Work, shape: BaseShape) -> int:
    """What grows with the square of a batch: sdpa's mask in the type that is computed with, eager's probabilities."""
    square = work.tokens**2
    if work.attention in BY_DOCUMENT:
        return 0
    if work.attention == "eager":
        return square * shape.heads * (4 + work.dtype_bytes)
    return square * work.dtype_bytes


def mlp_bytes(work: Work, shape: BaseShape) -> int:
    """Gate, its activation, up, and their product as the last layer's input: 4·c·I.

    With dropout without the last, fused without the second.

    Experts hold a copy of the stream for each of those that a token goes through.
    """
    copies = shape.experts_per_token * shape.hidden
    return work.dtype_bytes * ((4 - work.dropout - work.fused) * shape.intermediate + copies)


def lora_bytes(work: Work, shape: BaseShape) -> int:
    """Of every adapted layer what its first factor gives, c·r; with dropout its input again, and a mask."""
    layers = len(shape.linears) / shape.layers + len(shape.fused) / shape.layers * max(1, shape.experts_per_token)
    dropped = 0.0
    if work.dropout:
        dropped = (work.dtype_bytes + 1) * sum(one.columns for one in shape.linears) / shape.layers
    return round(layers * work.rank * work.dtype_bytes + dropped)


def _shared_mask(work: Work) -> int:
    """The mask that all layers share, one byte an entry; there is none document by document."""
    return 0 if work.attention in BY_DOCUMENT else work.tokens**2
