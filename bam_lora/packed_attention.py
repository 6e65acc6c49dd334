"""Attention over packed rows, document by document, with torch alone: what transformers knows as `packed`.

The mask that `sdpa` takes for packed rows has T² entries for T tokens, and most of what is computed with it is thrown
away. Here the mask is never made: the documents' lengths take its place. On a CUDA GPU they go to torch's own flash
kernel for sequences of any length, elsewhere every document is a causal attention of its own. Whatever else a model
asks for (padded rows, a cache, other masks) goes to transformers' `sdpa`, as if that had been chosen.

B: batch, H: heads, T: tokens of a row, N: tokens of the batch, L: tokens of a document, D: width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from bam_lora.attention import PACKED, PACKED_HEAD_DIM

_WIDEST = 256  # of a head; wider than PACKED_HEAD_DIM needs the large chips' shared memory
_LARGE_CHIPS = {(8, 0), (9, 0)}
_FEW_TOKENS = 512  # up to here a CPU is as fast with a mask, unless documents are short (docs/log.md)
_UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")  # what other models give attention beside the mask


@dataclass(frozen=True)
class Documents:
    """What stands for the mask of a batch of packed rows.

    Attributes:
        lengths: Tokens of every document, in order, the rows one after another.
        offsets: Where they start, and the end of the last, [documents + 1] of int32, on the model's device.
        window: How many tokens, itself the last, a token attends to; None: all before it.
    """

    lengths: tuple[int, ...]
    offsets: torch.Tensor
    window: int | None
    _masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)

    def window_mask(self, queries: int, keys: int) -> torch.Tensor:
        """Which of `keys` tokens each of the last `queries` of them attends to, [queries, keys]."""
        if (queries, keys) not in self._masks:
            assert self.window is not None
            at = torch.arange(keys, device=self.offsets.device)
            distance = at[keys - queries :, None] - at[None]
            self._masks[queries, keys] = (distance >= 0) & (distance < self.window)
        return self._masks[queries, keys]


def register() -> None:
    """Makes `attn_implementation="packed"` known to transformers; again does nothing new."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, packed_mask)


def packed_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, **given: Any
) -> Documents | torch.Tensor | None:
    """The documents of a batch of packed rows; for any other batch the mask that `sdpa` takes.

    transformers calls it once a forward pass for every kind of layer. It gives no lengths, only `mask_function`, which
    says of any two tokens whether one attends to the other: documents end where a token does not see the one before.

    Args:
        batch_size: B.
        q_length: T of the queries.
        kv_length: T of the keys.
        q_offset: Tokens in the cache before them.
        kv_offset: Tokens that the cache has dropped.
        given: The other arguments of transformers' `sdpa_mask`.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    whole = given.get("attention_mask") is None and q_length == kv_length > 1 and not given.get("use_vmap")
    first = isinstance(q_offset, int) and isinstance(kv_offset, int) and q_offset == kv_offset == 0
    plain = given.get("allow_is_causal_skip", True) and given.get("local_size") is None  # `sdpa` needs no mask either
    if whole and first and not plain and (found := _documents(batch_size, q_length, given)) is not None:
        return found
    masks: dict[str, Any] = ALL_MASK_ATTENTION_FUNCTIONS  # type: ignore[assignment]
    mask: torch.Tensor | None = masks["sdpa"](
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, **given
    )
    return mask


def _documents(rows: int, length: int, given: dict[str, Any]) -> Documents | None:
    """The documents, or None where the mask is not causal within documents or the window, or costs no more."""
    device, window = torch.device(given["device"]), given.get("local_size")
    row = torch.arange(rows, device=device)[:, None]
    head = torch.zeros_like(row)
    at = torch.arange(length, device=device)[None]

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen: torch.Tensor = given["mask_function"](row, head, query, key)
        return seen.expand(rows, length)

    starts = ~sees(at, (at - 1).clamp(min=0))
    starts[:, 0] = True
    oldest = torch.where(starts, at, 0).cummax(dim=1).values  # the first of its document
    if window is not None:
        oldest = torch.maximum(oldest, at - window + 1)
    # A mask function may be anything. All that transformers makes of causality, windows and documents is recognised by
    # its borders; the other places are for what only looks like it there.
    right = torch.ones_like(starts)
    for key in (at, at + 1, oldest, oldest - 1, at - 2, at // 2, torch.zeros_like(at)):
        key = key.clamp(0, length - 1)
        right &= sees(at, key) == ((oldest <= key) & (key <= at))
    # One transfer for all that is asked of a GPU: each waits until everything that is queued there is done.
    marks = torch.cat([starts.flatten(), right.all()[None]]).cpu()
    if not bool(marks[-1]):
        return None
    offsets = pad(marks[:-1].nonzero().flatten(), (0, 1), value=rows * length)
    lengths = tuple(offsets.diff().tolist())
    seen = sum(one * min(one, window or one) for one in lengths)
    if device.type == "cpu" and rows * length <= _FEW_TOKENS and 2 * seen > rows * length**2:
        return None
    return Documents(lengths, offsets.to(device, torch.int32, non_blocking=True), window)


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Documents | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of every token to the tokens before it in its document, as an `AttentionInterface` of transformers.

    Args:
        module: The layer.
        query: [B, H, T, D].
        key: [B, Hₖ, T, D] with H a multiple of Hₖ; heads of the queries share them in turn.
        value: As `key`.
        attention_mask: What `packed_mask` gave; anything but documents goes to `sdpa`.
        dropout: Of the attention's weights.
        scaling: Factor of the scores; None: 1/√D.
        kwargs: For `sdpa`.

    Returns:
        [B, T, H, D], and None for the weights.

    Raises:
        ValueError: If the model asks for a kind of attention that this is not.
    """
    from transformers import AttentionInterface

    asked = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if "s_aux" in asked or (asked and isinstance(attention_mask, Documents)):
        raise ValueError(f"attention {PACKED!r}: {type(module).__name__} needs {asked[0]}, which it has not; take sdpa")
    if not isinstance(attention_mask, Documents):
        sdpa: Callable[..., tuple[torch.Tensor, None]] = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    # Autocast does not know the kernel, and norms of queries and keys may leave them in fp32.
    if torch.is_autocast_enabled(query.device.type):
        computed = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(computed), key.to(computed), value.to(computed)
    rows, heads, length, _ = query.shape
    q_nhd, k_nhd, v_nhd = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    if not dropout and kernel_takes(query.device, query.dtype, query.shape[-1], value.shape[-1]):
        result = _by_kernel(q_nhd, k_nhd, v_nhd, attention_mask, scaling)
    else:
        result = _one_by_one(q_nhd, k_nhd, v_nhd, attention_mask, dropout, scaling)
    return result.view(rows, length, heads, -1), None


def kernel_takes(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> bool:
    """Whether torch's flash kernel for documents of any length is there, and takes such heads."""
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        return False
    capability = torch.cuda.get_device_capability(device)
    widest = _WIDEST if capability in _LARGE_CHIPS else PACKED_HEAD_DIM
    fits = capability >= (8, 0) and head_dim == value_dim <= widest and head_dim % 8 == 0
    return fits and torch.backends.cuda.is_flash_attention_available() and _kernel() is not None


@cache
def _kernel() -> tuple[Callable[..., torch.Tensor], bool] | None:
    """The kernel, and whether it shares keys among heads; None where it is not there or knows no windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters.keys()
    return (varlen_attn, "enable_gqa" in known) if {"scale", "window_size"} <= known else None


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scale: float | None
) -> torch.Tensor:
    """[N, H, D] from such; all documents in one call."""
    found = _kernel()
    assert found is not None
    kernel, shares = found
    options: dict[str, Any] = {"enable_gqa": True} if shares else {}
    if not shares:
        key, value = (_repeated(one, query.shape[1], 1) for one in (key, value))
    longest = max(documents.lengths)
    # The kernel counts the tokens before a token, transformers the token too.
    before = -1 if documents.window is None or documents.window >= longest else documents.window - 1
    offsets = documents.offsets
    return kernel(
        query, key, value, offsets, offsets, longest, longest, scale=scale, window_size=(before, 0), **options
    )


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """[N, H, D] from such; neighbours of one length together.

    Split, not sliced: the backward pass of a slice fills a gradient of all N tokens, once for every document. On a CPU
    in fp32: there torch compiles 16-bit kernels anew for every length, 11 ms and 5 MB each (docs/log.md).
    """
    computed = query.dtype
    if query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    groups = [(len(list(group)), length) for length, group in groupby(documents.lengths)]
    sizes = [count * length for count, length in groups]
    results = []
    with torch.autocast(query.device.type, enabled=False):  # which would turn them back
        for group, *parts in zip(groups, *(one.split(sizes) for one in (query, key, value)), strict=True):
            q_bhld, k_bhld, v_bhld = (part.unflatten(0, group).transpose(1, 2) for part in parts)
            out_bhld = _causal(q_bhld, k_bhld, v_bhld, documents, dropout, scale)
            results.append(out_bhld.transpose(1, 2).flatten(0, 1))
    return torch.cat(results).to(computed)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """[B, H, L, D] from such, of documents of one length; of those longer than a window one window after another."""
    length, shares = query.shape[2], query.device.type in ("cpu", "cuda")
    if documents.window is None or length <= documents.window:
        if not shares:
            key, value = (_repeated(one, query.shape[1], 1) for one in (key, value))
        return scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=shares
        )
    key, value = (_repeated(one, query.shape[1], 1) for one in (key, value))
    results = []
    for begin, end, oldest in _windows(length, documents.window):
        mask = documents.window_mask(end - begin, end - oldest)
        q, k, v = query[:, :, begin:end], key[:, :, oldest:end], value[:, :, oldest:end]
        results.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale))
    return torch.cat(results, dim=2)


def _windows(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Pieces of a document as long as a window: begin, end, and the oldest token that one of them attends to."""
    for begin in range(0, length, window):
        yield begin, min(begin + window, length), max(0, begin - window + 1)


def _repeated(shared: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """Keys or values with one head for every head of the queries."""
    return shared.repeat_interleave(heads // shared.shape[dim], dim=dim)
