"""Chat data as training sequences: which tokens a model reads, and which it learns to say.

The trained tokens are the assistant's answers as the chat template renders them, each with its end-of-turn token:
nothing of the header before, no white space after. Where a template renders an earlier answer otherwise once the
conversation has gone on (Qwen3 drops its thoughts), every answer becomes a sequence of its own, after what inference
would have shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bam_lora.chat_rows import Completion, Conversation, read_row
from bam_lora.chat_template import ChatTemplate
from bam_lora.errors import UserError

Span = tuple[int, int, int]


@dataclass(frozen=True)
class Rendering:
    """A text, and which of it is trained.

    `spans` are (start, stop, end) in characters: an answer from start to stop, its end-of-turn token up to end.
    """

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class ChatSequence:
    """Tokens, which of them are trained, and the answers.

    Attributes:
        input_ids: The tokens [tokens].
        mask: 1 where a token is trained [tokens].
        answers: (first token, token after the last, UTF-8 bytes) of every answer, without its end-of-turn token.
        size_bytes: UTF-8 bytes of the whole text.
    """

    input_ids: list[int]
    mask: list[int]
    answers: tuple[tuple[int, int, int], ...]
    size_bytes: int


@dataclass(frozen=True)
class ChatRow:
    """What one row of chat data gives.

    Attributes:
        sequences: Each with at least one trained token.
        cut: Whether the row was longer than a sequence and had to be cut.
        lost: Answers of which nothing is left after cutting.
    """

    sequences: tuple[ChatSequence, ...]
    cut: bool = False
    lost: int = 0


class ChatEncoder:
    """Turns rows of chat data into sequences, by a tokenizer and its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        """Looks at the tokenizer; its template is looked at when the first row needs it.

        Raises:
            UserError: If the tokenizer gives no offsets (is not a fast one), or has no EOS.
        """
        name = tokenizer.name_or_path or "given"
        if not getattr(tokenizer, "is_fast", False):
            raise UserError.of(
                f"tokenizer {name}", expected="a fast one, which says where in the text its tokens are",
                found=type(tokenizer).__name__, remedy="Convert it to tokenizer.json",
            )  # fmt: skip
        if tokenizer.eos_token_id is None:
            raise UserError.of(
                f"tokenizer {name}", expected="an end-of-sequence token", found="none", remedy="Set its `eos_token`"
            )
        self._tokenizer = tokenizer
        self._template: ChatTemplate | None = None
        first = tokenizer("a")["input_ids"][0]
        self._bos = [first] if first == tokenizer.bos_token_id else []

    @property
    def template(self) -> ChatTemplate:
        """The chat template."""
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer)
        return self._template

    def row(self, row: Mapping[str, Any], place: str, limit: int | None = None, column: str | None = None) -> ChatRow:
        """The sequences of a row, none longer than `limit` tokens.

        A conversation that is too long is cut before a user's message, and what follows begins with the system prompt
        again; a single answer that is too long, or comes after too long a question, loses what is beyond the limit.

        Args:
            row: Column names and values, in one of the shapes of `chat_rows.read_row`.
            place: Names the row in messages.
            limit: Tokens a sequence may have, or None.
            column: The column with the messages, where it has none of the usual names.

        Raises:
            UserError: If the row has no known shape, or the template cannot render it.
        """
        read = read_row(row, place, column)
        if isinstance(read, Completion):
            if not read.completion.strip():
                return ChatRow(())
            return _shortened(self._completion(read), limit)
        return self._fitted(read, place, limit) if read.answers else ChatRow(())

    def _fitted(self, conversation: Conversation, place: str, limit: int | None) -> ChatRow:
        sequences = [self._encode(rendering) for rendering in self.renderings(conversation, place)]
        if limit is None or all(len(sequence.input_ids) <= limit for sequence in sequences):
            return ChatRow(tuple(sequences))
        answers = conversation.answers
        if len(sequences) == len(answers) > 1:  # each by itself: only those that do not fit need anything
            parts = [replace(conversation, answers=(answer,)) for answer in answers]
        elif len(answers) > 1:
            count = sum(last < limit for _, last, _ in sequences[0].answers) or 1  # one more token ends the turn
            later = replace(conversation, answers=answers[count:])
            parts = [replace(conversation, answers=answers[:count]), _from_question(later)]
        else:
            shorter = _from_question(conversation)
            if shorter.messages == conversation.messages:
                return _shortened(sequences[0], limit)
            parts = [shorter]
        rows = [self._fitted(part, place, limit) for part in parts]
        return ChatRow(tuple(s for row in rows for s in row.sequences), True, sum(row.lost for row in rows))

    def renderings(self, conversation: Conversation, place: str) -> list[Rendering]:
        """The texts to train on: one with all answers, or one for each answer where the template needs it.

        Raises:
            UserError: If an answer cannot be found in its rendering.
        """
        answers = [self.template.answer(conversation, index, place) for index in conversation.answers]
        whole = answers[-1].text
        if all(whole.startswith(answer.text[: answer.end]) for answer in answers):
            spans = tuple((answer.start, answer.stop, answer.end) for answer in answers)
            return [Rendering(whole[: answers[-1].end], spans)]
        return [Rendering(one.text[: one.end], ((one.start, one.stop, one.end),)) for one in answers]

    def _encode(self, rendering: Rendering) -> ChatSequence:
        ids, offsets = self._tokens(rendering)
        mask = [0] * len(ids)
        answers = []
        for start, stop, end in rendering.spans:
            first = next((at for at, (begin, _) in enumerate(offsets) if begin >= start), len(ids))
            last = next((at for at in range(first, len(ids)) if offsets[at][0] >= stop), len(ids))
            after = next((at for at in range(last, len(ids)) if offsets[at][0] >= end), len(ids))
            mask[first:after] = [1] * (after - first)
            answers.append((first, last, len(rendering.text[start:stop].encode())))
        return ChatSequence(ids, mask, tuple(answers), len(rendering.text.encode()))

    def _tokens(self, rendering: Rendering) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens and their places in the text; where one would straddle an answer's edge the text is parted there."""
        text = rendering.text
        ids, offsets = self._tokenise(text)
        edges = {edge for start, stop, _ in rendering.spans for edge in (start, stop)}
        ends = {end for _, _, end in rendering.spans} - edges
        # A token that ends a turn may take white space after it along: it is still that token.
        found = {edge for edge in edges if _straddled(offsets, edge)}
        found |= {edge for edge in ends if _straddled(offsets, edge, text)}
        apart = sorted(edge for edge in found if 0 < edge < len(text))
        if not apart:
            return ids, offsets
        ids, offsets = [], []
        for begin, end in zip([0, *apart], [*apart, len(text)], strict=True):
            part, places = self._tokenise(text[begin:end], inside=begin > 0)
            ids += part
            # The place of a lone space is trimmed to nothing at its end: it still lies in this part.
            offsets += [(min(begin + first, end - 1), begin + last) for first, last in places]
        return ids, offsets

    def _tokenise(self, text: str, *, inside: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens with their places; `inside` a text, where some tokenizers would put a space before it otherwise."""
        lead = "\n" if inside else ""
        encoded = self._tokenizer(lead + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        if not inside:
            return ids, offsets
        led = self._tokenizer(lead, add_special_tokens=False, verbose=False)["input_ids"]
        if ids[: len(led)] != led or (len(ids) > len(led) and offsets[len(led)][0] < 1):
            return self._tokenise(text)
        return ids[len(led) :], [(first - 1, last - 1) for first, last in offsets[len(led) :]]

    def _completion(self, read: Completion) -> ChatSequence:
        """Plain text: BOS as the tokenizer puts it before any text, the prompt as it is, the completion with EOS."""
        text = read.prompt + read.completion
        begin, size, eos = len(read.prompt), len(text), self._tokenizer.eos_token_id
        sequence = self._encode(Rendering(text, ((begin, size, size),)))
        shift = 0 if sequence.input_ids[: len(self._bos)] == self._bos else len(self._bos)
        ids = [*self._bos[:shift], *sequence.input_ids]
        mask = [0] * shift + sequence.mask
        ends = ids[-1] == eos
        first, last, size_bytes = sequence.answers[0]
        return ChatSequence(
            ids if ends else [*ids, eos], mask if ends else [*mask, 1],
            ((first + shift, last + shift, size_bytes),), sequence.size_bytes,
        )  # fmt: skip


def _straddled(offsets: Sequence[tuple[int, int]], edge: int, text: str = "") -> bool:
    """Whether no clean cut between tokens lies at a place of a text; with the text, white space after it is let pass.

    What is in no token's place was trimmed from that of the token after it, on whichever side of the edge that lies.
    """
    reached = 0
    for begin, stop in offsets:
        if begin >= edge:
            break
        if stop > edge and (not text or text[edge:stop].strip()):
            return True
        reached = max(reached, stop)
    return reached < edge


def _from_question(conversation: Conversation) -> Conversation:
    """The system prompt, and the conversation from the user's message before its first answer on."""
    messages = conversation.messages
    question = max(i for i in range(conversation.answers[0]) if messages[i]["role"] == "user")
    system = 1 if messages[0]["role"] in ("system", "developer") else 0
    if question <= system:
        return conversation
    shift = question - system
    return replace(
        conversation,
        messages=messages[:system] + messages[question:],
        answers=tuple(index - shift for index in conversation.answers),
    )


def _shortened(sequence: ChatSequence, limit: int | None) -> ChatRow:
    if limit is None or len(sequence.input_ids) <= limit:
        return ChatRow((sequence,))
    if not any(sequence.mask[:limit]):
        return ChatRow((), True, 1)
    whole = tuple(answer for answer in sequence.answers if answer[1] <= limit)
    return ChatRow((ChatSequence(sequence.input_ids[:limit], sequence.mask[:limit], whole, sequence.size_bytes),), True)


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
