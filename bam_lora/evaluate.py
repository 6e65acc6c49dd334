"""Bits per byte: how well a model predicts a text, comparable across tokenisers.

bits per byte = Σ negative log2-likelihood of the text's tokens / its UTF-8 bytes. A document is cut into windows at
fixed places in its bytes; a window is scored with the bytes before it as context, so every byte is scored exactly
once. BOS is context only and EOS is not scored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bam_lora.chat_rows import Completion, Conversation
from bam_lora.errors import UserError
from bam_lora.gpu_memory import LESS_TO_SCORE, is_out_of_memory, room_for
from bam_lora.machine import release_memory

LOGITS_BYTES = 256 << 20  # fp32 logits held at a time
CHUNK_TOKENS = 256
_CUT_SLACK_BYTES = 64  # how far back a cut may move to stand before white space
_WINDOW_SIZES = (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 128, 64)


@dataclass(frozen=True)
class EvaluationSet:
    """Named documents that a model is scored on; `role` is "target" or "source".

    Of conversations (`chats`) the documents are what the answers say.
    """

    name: str
    role: str
    documents: tuple[str, ...]
    chats: tuple[Conversation | Completion, ...] = ()


@dataclass(frozen=True)
class Window:
    """Part of a document as tokens: `context` is given, `scored` is predicted; `size_bytes` counts the scored text."""

    document: int
    context: tuple[int, ...]
    scored: tuple[int, ...]
    size_bytes: int

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.context) + len(self.scored)


def cut_text(text: str, window_bytes: int, overlap_bytes: int) -> list[tuple[str, str]]:
    """Cuts a document into (context, scored) strings; the scored ones joined are the document.

    Cuts stand at multiples of `window_bytes - overlap_bytes`, moved back to the nearest white space if there is one
    close by, else to the start of a character: places that depend on the text alone.
    """
    data = text.encode()
    stride = window_bytes - overlap_bytes
    cuts = [0]
    for place in range(stride, len(data), stride):
        cut = _cut_before(data, place)
        if cut > cuts[-1]:
            cuts.append(cut)
    cuts.append(len(data))
    parts = []
    for start, stop in itertools.pairwise(cuts):
        begin = _character_start(data, max(0, start - overlap_bytes))
        parts.append((data[begin:start].decode(), data[start:stop].decode()))
    return [part for part in parts if part[1]]


def _cut_before(data: bytes, place: int) -> int:
    for position in range(place, max(0, place - _CUT_SLACK_BYTES), -1):
        if data[position : position + 1].isspace():
            return position
    return _character_start(data, place)


def _character_start(data: bytes, place: int) -> int:
    while place < len(data) and 0x80 <= data[place] < 0xC0:
        place -= 1
    return place


def make_windows(documents: Sequence[str], tokenizer: Any, window_bytes: int, overlap_bytes: int) -> list[Window]:
    """Tokenises every document window by window.

    Context and scored text are tokenised together, so that the cut does not change how a word is split; only where
    a token would straddle the cut are they tokenised apart.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise UserError.of(
            f"tokenizer {tokenizer.name_or_path}",
            expected="a token to begin a text with (BOS or EOS)",
            found="neither",
            remedy="Set `bos_token` or `eos_token` in its tokenizer_config.json",
        )
    windows = []
    for index, document in enumerate(documents):
        for context, scored in cut_text(document, window_bytes, overlap_bytes):
            before, after = _tokenise(tokenizer, context, scored)
            windows.append(Window(index, (first, *before), tuple(after), len(scored.encode())))
    return windows


def _tokenise(tokenizer: Any, context: str, scored: str) -> tuple[list[int], list[int]]:
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(context + scored, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        at = next((i for i, (_, stop) in enumerate(offsets) if stop > len(context)), len(ids))
        if at == len(ids) or offsets[at][0] >= len(context):
            return ids[:at], ids[at:]
    apart = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (context, scored)]
    return apart[0], apart[1]


def choose_window(
    sets: Sequence[EvaluationSet], tokenizer: Any, context_tokens: int | None, overlap_bytes: int | None = None
) -> int:
    """The largest window in bytes, up to 4096, that fits the model's context length for every document.

    `overlap_bytes` None is a quarter of the window.
    """
    limit = context_tokens or sum(_WINDOW_SIZES)
    for size in _WINDOW_SIZES:
        overlap = size // 4 if overlap_bytes is None else overlap_bytes
        if overlap >= size:
            break
        longest = max(
            (window.length for part in sets for window in make_windows(part.documents, tokenizer, size, overlap)),
            default=0,
        )
        if longest <= limit:
            return size
    raise UserError.of(
        "evaluation",
        expected=f"text that fits the base's context of {limit} tokens in windows of {_WINDOW_SIZES[-1]} bytes",
        found="more tokens than that",
        remedy="Set evaluation.window_bytes",
    )


def require_fit(windows: Sequence[Window], set_name: str, window_bytes: int, context_tokens: int | None) -> None:
    """Raises a UserError if a window is longer than the model's context."""
    longest = max((window.length for window in windows), default=0)
    if context_tokens is not None and longest > context_tokens:
        raise UserError.of(
            f"evaluation set {set_name!r} in windows of {window_bytes} bytes",
            expected=f"at most {context_tokens} tokens, the base's context length",
            found=f"{longest}",
            remedy="Lower evaluation.window_bytes",
        )


def score(
    model: Any, windows: Sequence[Window], *, pad: int, batch_size: int, dtype: str,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:  # fmt: skip
    """Negative log-likelihood and size of every document.

    Args:
        model: A causal language model.
        windows: From `make_windows`.
        pad: Any token id, to fill up short windows; it is masked.
        batch_size: Windows at once at the most; fewer where the logits would take too much memory.
        dtype: What activations are computed in: bfloat16, float16 or float32.
        on_batch: Called with the number of windows just scored.

    Returns:
        nats [documents] and bytes [documents], float64.
    """
    count = 1 + max(window.document for window in windows)
    nats, sizes = np.zeros(count), np.zeros(count)
    # Windows of like length share a batch; the longest come first, so a lack of memory shows at once.
    order = sorted(range(len(windows)), key=lambda index: (-windows[index].length, index))
    vocabulary = model.config.get_text_config().vocab_size
    start = 0
    while start < len(order):
        longest = windows[order[start]].length
        rows = max(1, min(batch_size, LOGITS_BYTES // (longest * vocabulary * 4)))
        batch = [windows[index] for index in order[start : start + rows]]
        values = _fitting_nats(model, batch, pad, dtype)
        batch_size = min(batch_size, len(values)) if len(values) < len(batch) else batch_size
        for window, value in zip(batch, values, strict=False):
            nats[window.document] += value
            sizes[window.document] += window.size_bytes
        start += len(values)
        if on_batch:
            on_batch(len(values))
    return nats, sizes


def pad_windows(batch: Sequence[Window], pad: int, length: int | None = None) -> tuple[Any, Any]:
    """Windows as one batch: token ids and attention mask [windows, length], filled up with `pad`.

    The length is that of the longest, if none is given.
    """
    import torch

    length = length or max(window.length for window in batch)
    ids = torch.full((len(batch), length), pad)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    for row, window in enumerate(batch):
        ids[row, : window.length] = torch.tensor([*window.context, *window.scored])
        mask[row, : window.length] = 1
    return ids, mask


def _fitting_nats(model: Any, batch: Sequence[Window], pad: int, dtype: str) -> list[float]:
    """The values of the first windows of a batch: of all, or where memory does not suffice of a half, a quarter, ...

    Raises:
        OutOfMemory: If one window does not fit.
    """
    while len(batch) > 1:
        try:
            return _batch_nats(model, batch, pad, dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        release_memory()  # out of the `except`: the error holds what did not fit
        batch = batch[: len(batch) // 2]
    with room_for(f"scoring a text of {batch[0].length:,} tokens", LESS_TO_SCORE):
        return _batch_nats(model, batch, pad, dtype)


def _batch_nats(model: Any, batch: Sequence[Window], pad: int, dtype: str) -> list[float]:
    import torch

    ids, mask = pad_windows(batch, pad)
    where = model.device
    autocast = torch.autocast(where.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")
    with torch.inference_mode(), autocast:
        logits = model(input_ids=ids.to(where), attention_mask=mask.to(where), use_cache=False).logits
    parts = []
    for row, window in enumerate(batch):
        first = len(window.context)
        labels = ids[row, first : window.length].to(where)
        for start in range(0, len(labels), CHUNK_TOKENS):  # fp32 logits of a large vocabulary, a piece at a time
            part = labels[start : start + CHUNK_TOKENS]
            predictions = logits[row, first - 1 + start : first - 1 + start + len(part)].float()
            parts.append(torch.nn.functional.cross_entropy(predictions, part, reduction="none"))
    if not parts:  # of nothing but white space a tokenizer may leave no token
        return [0.0] * len(batch)
    # One transfer a batch, each of which waits for the GPU; summed on the CPU, for Metal has no float64.
    nats = iter(torch.cat(parts).cpu().split([len(part) for part in parts]))
    values = []
    for window in batch:
        chunks = range(0, len(window.scored), CHUNK_TOKENS)
        values.append(sum(float(next(nats).double().sum()) for _ in chunks))
    return values


def bits_per_byte(nats: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> tuple[float, float | None]:
    """Bits per byte over all documents, and its standard error over documents.

    The score is a ratio of sums, so the standard error is that of a ratio estimator (Cochran, Sampling Techniques,
    3rd ed., 6.4): sqrt(n/(n-1) · Σ(bitsᵢ - score·bytesᵢ)²) / Σ bytes. None for a single document.

    Args:
        nats: Negative log-likelihood of each document [documents].
        sizes: UTF-8 bytes of each document [documents].
    """
    bits = nats / math.log(2)
    value = float(bits.sum() / sizes.sum())
    if len(bits) < 2:
        return value, None
    residuals = bits - value * sizes
    spread = math.sqrt(len(bits) / (len(bits) - 1) * float((residuals**2).sum()))
    return value, spread / float(sizes.sum())
