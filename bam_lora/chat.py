"""Chat data as tokens with the answers marked: for TRL's trainers, and in batches for a run's data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bam_lora.chat_encoder import ChatEncoder
from bam_lora.chat_rows import Completion, Conversation, read_row
from bam_lora.errors import UserError
from bam_lora.sources import TextSource
from bam_lora.store import digest

_BATCH_CHARACTERS = 2_000_000


def answers_only(
    dataset: Any, tokenizer: Any, *, max_length: int | None = None, chat_template: str | None = None
) -> Any:
    """Chat data as tokens with the answers marked, in the columns that TRL's `SFTTrainer` takes.

    The trainer makes its labels from `assistant_masks`, with or without packing; `assistant_only_loss` and
    `completion_only_loss` stay unset.

    Args:
        dataset: A `datasets.Dataset` with `messages`, `conversations`, `prompt` and `completion`, or `instruction` and
            `output` (and `tools`, `system`, `chat_template_kwargs`).
        tokenizer: A fast transformers tokenizer with a chat template.
        max_length: Tokens a sequence may have; longer conversations are cut before a user's message.
        chat_template: A template to use in place of the tokenizer's own.

    Returns:
        A `datasets.Dataset` with `input_ids` and `assistant_masks`. Rows without an answer are left out of it.

    Raises:
        UserError: If a row cannot be read or rendered, or none has an answer.
    """
    import copy

    import datasets

    if chat_template is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = chat_template
    encoder = ChatEncoder(tokenizer)

    def encode(rows: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[list[int]]]:
        found = [
            sequence
            for at, number in enumerate(numbers)
            for sequence in encoder.row(
                {name: values[at] for name, values in rows.items()}, f"row {number + 1}", max_length
            ).sequences
        ]
        return {"input_ids": [one.input_ids for one in found], "assistant_masks": [one.mask for one in found]}

    encoded = dataset.map(
        encode, batched=True, with_indices=True, remove_columns=dataset.column_names, load_from_cache_file=False,
        features=datasets.Features({
            "input_ids": datasets.List(datasets.Value("int32")),
            "assistant_masks": datasets.List(datasets.Value("int8")),
        }),
    )  # fmt: skip
    if not len(encoded):
        raise UserError.of("dataset", expected="answers to train on", found="none", remedy="Check the rows")
    return encoded


@dataclass
class TokenBatch:
    """Documents as tokens, their row numbers, and for chat which tokens are trained."""

    rows: list[int] = field(default_factory=list)
    documents: list[list[int]] = field(default_factory=list)
    masks: list[list[int]] = field(default_factory=list)


@dataclass
class ChatCounts:
    """What became of the rows of a source.

    Attributes:
        conversations: Rows with something to train on or not.
        without_answer: Of them, those that have nothing to train on and are left out.
        cut: Of them, those longer than a sequence, which were cut.
        lost_answers: Answers left out as all of them lies beyond the end of a sequence.
        answer_tokens: Trained tokens.
    """

    conversations: int = 0
    without_answer: int = 0
    cut: int = 0
    lost_answers: int = 0
    answer_tokens: int = 0


class ChatReader:
    """Conversations of an open source: first what they say, then the tokens of those that are wanted.

    Between the two they can be screened as texts are.
    """

    def __init__(self, source: TextSource, tokenizer: Any, limit: int) -> None:
        """Takes a tokenizer with a chat template, and the tokens a sequence may have."""
        self.counts = ChatCounts()
        self._source, self._limit = source, limit
        self._encoder = ChatEncoder(tokenizer)
        self._waiting: dict[int, Conversation | Completion] = {}

    def batches(self, rows: Iterator[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[list[int], list[str]]]:
        """Row numbers and texts, a bounded number at a time; those not taken before the next are forgotten.

        Raises:
            UserError: If a row has no known shape.
        """
        texts: list[str] = []
        characters = 0
        for number, row in rows:
            read = read_row(row, self._place(number), message_column(self._source))
            self._waiting[number] = read
            texts.append(read.text)
            characters += len(read.text)
            if characters >= _BATCH_CHARACTERS:
                yield list(self._waiting), texts
                texts, characters = [], 0
                self._waiting.clear()
        if texts:
            yield list(self._waiting), texts

    def take(self, numbers: Sequence[int]) -> TokenBatch:
        """The tokens of rows of the last batch.

        Raises:
            UserError: If the template cannot render one of them.
        """
        batch = TokenBatch()
        for number in numbers:
            found = self._encoder.sequences(self._waiting[number], self._place(number), self._limit)
            self.counts.conversations += 1
            self.counts.without_answer += not found.sequences
            self.counts.cut += found.cut
            self.counts.lost_answers += found.lost
            self.counts.answer_tokens += sum(sum(sequence.mask) for sequence in found.sequences)
            batch.rows += [number] * len(found.sequences)
            batch.documents += [sequence.input_ids for sequence in found.sequences]
            batch.masks += [sequence.mask for sequence in found.sequences]
        return batch

    def _place(self, number: int) -> str:
        return f"{self._source.path}, row {number + 1}"


def message_column(source: TextSource) -> str | None:
    """The column with the messages, where the source names one."""
    return source.text if source.text != TextSource.text else None


def template_digest(tokenizer: Any) -> str:
    """Hash of a tokenizer's chat template."""
    return digest(tokenizer.chat_template)
