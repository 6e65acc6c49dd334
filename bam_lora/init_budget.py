"""How many tokens a number of hours is, and into how many slices they go: rough, and said to be."""

from __future__ import annotations

from dataclasses import dataclass

from bam_lora.languages import Language

# The recipes' estimate for an RTX 4090: 1,600 tokens a second with 8 B parameters. No rule leads from memory to speed:
# half of it stands for a card of 6 to 24 GB, one and a half of it for those of data centres.
_NUMBERS_PER_SECOND = 1600 * 8e9
_CARD, _DATA_CENTRE, _CPU = 0.5, 1.5, 0.004
_DATA_CENTRE_BYTES = 39e9
_TRAINING_SHARE = 0.85  # of the time; merges, folds and scores take the rest
_TOKENS_PER_WORD = 2.0  # of a base that does not know the language well
_STEPS = 100
_FEW_STEPS, _TOO_FEW_STEPS = 500, 20
_FEWEST_TOKENS = 100_000  # a few steps a branch: with less there is nothing to merge


@dataclass(frozen=True)
class Budget:
    """What is trained on.

    Attributes:
        target_tokens: Of the language's text; None: all there is.
        total_tokens: With the replay; 0 if unknown.
        tokens_per_second: The speed that was assumed.
        available_tokens: About what the language has; 0 if unknown.
    """

    target_tokens: int | None
    total_tokens: int
    tokens_per_second: float
    available_tokens: int

    @property
    def seconds(self) -> float:
        """How long it takes at that speed, merges and scores included."""
        return self.total_tokens / self.tokens_per_second / _TRAINING_SHARE


def speed(parameters: int, gpu_bytes: int | None) -> float:
    """Tokens a second that a base trains at: a guess within a factor of three."""
    factor = _CPU if gpu_bytes is None else _DATA_CENTRE if gpu_bytes > _DATA_CENTRE_BYTES else _CARD
    return factor * _NUMBERS_PER_SECOND / max(parameters, 1)


def budget(
    language: Language, wanted_tokens: int, share: float, hours: float | None, parameters: int, gpu_bytes: int | None
) -> Budget:
    """The tokens to train on.

    Args:
        language: What is learned, with the words there are of it.
        wanted_tokens: Target tokens without a limit of time.
        share: Replay's share of all tokens.
        hours: The time there is; None: no limit.
        parameters: Of the base; 0 if unknown, which is taken for 8 B.
        gpu_bytes: Memory of the card; None: a CPU.
    """
    rate = speed(parameters or 8_000_000_000, gpu_bytes)
    target = wanted_tokens
    if hours is not None:
        target = max(_FEWEST_TOKENS, rounded_tokens(hours * 3600 * _TRAINING_SHARE * rate * (1 - share)))
    available = round(language.words * _TOKENS_PER_WORD)
    if available and available < target:
        return Budget(None, round(available / (1 - share)), rate, available)
    return Budget(target, round(target / (1 - share)), rate, available)


def fewer_slices(slices: int, total_tokens: int, tokens_per_step: int) -> int:
    """Slices, halved until each branch takes a hundred steps, down to two."""
    while slices % 2 == 0 and slices > 2 and total_tokens < slices * _STEPS * tokens_per_step:
        slices //= 2
    return slices


def short_warmup(steps_per_branch: float) -> bool:
    """Whether fifty steps of warm-up are too large a part of a branch."""
    return steps_per_branch < _FEW_STEPS


def too_few(steps_per_branch: float) -> bool:
    """Whether adapters would hardly move."""
    return steps_per_branch < _TOO_FEW_STEPS


def short_number(tokens: int) -> str:
    """Tokens as a recipe says them: 200M, 1.5B, 500k."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return str(tokens)


def rounded_tokens(tokens: float) -> int:
    """Two digits of it, and no less than a thousand."""
    return max(1000, int(float(f"{tokens:.2g}")))
