"""Bits per byte: every byte once, the same places for every tokeniser, and the value of a plain loop."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bam_lora.errors import UserError
from bam_lora.evaluate import EvaluationSet, bits_per_byte, choose_window, cut_text, make_windows, require_fit, score

TEXTS = st.text(alphabet=st.sampled_from("ab ü\nж漢🙂."), max_size=400)


@given(TEXTS, st.integers(16, 96), st.integers(0, 15))
def test_every_byte_is_scored_exactly_once(text: str, window: int, overlap: int) -> None:
    parts = cut_text(text, window, overlap)
    assert "".join(scored for _, scored in parts) == text
    position = 0
    for context, scored in parts:
        assert text[:position].endswith(context)
        assert len(context.encode()) <= overlap + 3  # a cut never splits a character
        position += len(scored)


def test_cuts_stand_before_white_space() -> None:
    parts = cut_text("word " * 100, 64, 16)
    assert all(scored.startswith(" ") for _, scored in parts[1:])


def test_tokens_of_a_window_are_those_of_the_whole_text(tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    text = "The miller saw the river rise. " * 8
    windows = make_windows([text], tokenizer, 64, 16)
    joined = [token for window in windows for token in window.scored]
    assert joined == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sum(window.size_bytes for window in windows) == len(text.encode())
    assert all(window.context[0] == tokenizer.bos_token_id for window in windows)


def test_score_is_that_of_a_plain_loop(tiny_base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    documents = ["The miller saw the river rise.", "Der Müller sah den Fluss steigen. " * 9]
    windows = make_windows(documents, tokenizer, 128, 32)
    nats, sizes = score(model, windows, pad=tokenizer.pad_token_id, batch_size=4, dtype="float32")
    for index, document in enumerate(documents):
        expected = 0.0
        for window in (w for w in windows if w.document == index):
            ids = torch.tensor([[*window.context, *window.scored]])
            with torch.no_grad():
                logs = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
            for place in range(len(window.context), ids.shape[1]):
                expected -= float(logs[place - 1, ids[0, place]])
        assert nats[index] == pytest.approx(expected, rel=1e-5)
        assert sizes[index] == len(document.encode())


def test_standard_error_is_that_of_the_bootstrap() -> None:
    random = np.random.default_rng(0)
    sizes = random.integers(100, 5000, 200).astype(float)
    nats = sizes * random.normal(1.0, 0.2, 200)
    value, stderr = bits_per_byte(nats, sizes)
    assert value == pytest.approx(nats.sum() / math.log(2) / sizes.sum())
    picks = random.integers(0, 200, (4000, 200))
    spread = (nats[picks].sum(1) / math.log(2) / sizes[picks].sum(1)).std()
    assert stderr == pytest.approx(spread, rel=0.1)
    assert bits_per_byte(nats[:1], sizes[:1])[1] is None


def test_window_is_the_largest_that_fits(tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    sets = [EvaluationSet("a", "target", ("Ж" * 5000,))]
    size = choose_window(sets, tokenizer, 256)
    longest = max(window.length for window in make_windows(sets[0].documents, tokenizer, size, size // 4))
    assert longest <= 256
    windows = make_windows(sets[0].documents, tokenizer, 2048, 0)
    with pytest.raises(UserError, match=r"windows of 2048 bytes: expected at most 256 tokens.*window_bytes"):
        require_fit(windows, "a", 2048, 256)
