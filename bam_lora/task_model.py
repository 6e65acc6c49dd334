"""A loaded model as the harness wants it, with our progress, memory limit and randomness."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_LOGITS_BYTES = 1 << 30  # fp32 logits of one batch; the harness holds them for every place of the prompts


def harness_model(
    model: Any, tokenizer: Any, batch_size: int, dtype: str, on_progress: Callable[[int, int], None] | None = None
) -> Any:
    """A causal language model in memory as an `lm_eval` model; `truncated` counts the prompts it had to cut.

    Args:
        model: The model, which is not loaded again.
        tokenizer: Its tokenizer. A copy is used: the harness sets a padding token where there is none.
        batch_size: Prompts at once at the most.
        dtype: What activations are computed in.
        on_progress: Called with prompts done and their number.
    """
    from lm_eval.models.huggingface import HFLM

    class LoadedModel(HFLM):  # type: ignore[misc]
        """The harness's model without its bars, in batches whose logits fit."""

        def __init__(self) -> None:
            mixed = None if dtype == "float32" else dtype
            super().__init__(
                pretrained=model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size,
                mixed_precision_dtype=mixed,
            )  # fmt: skip
            self.truncated = 0
            self._done = self._total = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:
            lengths = [len(context) + len(continuation) for _, context, continuation in requests]
            self.truncated += sum(length > self.max_length + 1 for length in lengths)
            self._begin(len(requests), min(max(lengths, default=1), self.max_length))
            scored = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            self._advance(len(requests))  # prompts that differ in their last token share a row
            return scored

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            for context, options in (request.args for request in requests):
                room = self.max_length - int(options.get("max_gen_toks", self.max_gen_toks))
                self.truncated += len(self.tok_encode(context)) > room
            self._begin(len(requests), 1)
            return super().generate_until(requests, disable_tqdm=True)

        def _begin(self, requests: int, longest_tokens: int) -> None:
            self._done, self._total = 0, requests
            row_bytes = longest_tokens * self.config.get_text_config().vocab_size * 4
            self.batch_size_per_gpu = max(1, min(batch_size, _LOGITS_BYTES // row_bytes))

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self._advance(len(inps))
            return logits

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            written = super()._model_generate(context, *args, **kwargs)
            self._advance(len(context))
            return written

        def _advance(self, rows: int) -> None:
            self._done = min(self._done + rows, self._total)
            if on_progress:
                on_progress(self._done, self._total)

    return LoadedModel()


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Puts back the global generators, which the harness seeds: what is trained afterwards must not depend on tasks."""
    import torch

    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
