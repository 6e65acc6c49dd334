"""Chat data as training sequences: which tokens a model reads, and which it learns to say.

The trained tokens are the assistant's answers as the chat template renders them, each with its end-of-turn token:
nothing of the header before, no white space after. Where a template renders an earlier answer otherwise once the
conversation has gone on (Qwen3 drops its thoughts), every answer becomes a sequence of its own, after what inference
would have shown.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
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
    A `plain` text is no template's: it gets BOS as the tokenizer puts it before any text, and EOS at its end.
    """

    text: str
    spans: tuple[Span, ...]
    plain: bool = False


@dataclass(frozen=True)
class ChatSequence:
    """Tokens, which of them are trained, and the answers.

    Attributes:
        input_ids: The tokens [tokens].
        mask: 1 where a token is trained [tokens].
        answers: (first token, token after the last, UTF-8 bytes) of every answer, without its end-of-turn token.
    """

    input_ids: list[int]
    mask: list[int]
    answers: tuple[tuple[int, int, int], ...]


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
        """The sequences of a row, in one of the shapes of `chat_rows.read_row`; see there and `sequences`."""
        return self.sequences(read_row(row, place, column), place, limit)

    def sequences(self, read: Conversation | Completion, place: str, limit: int | None = None) -> ChatRow:
        """The sequences of a row that was read, none longer than `limit` tokens.

        A conversation that is too long is cut before a user's message, and what follows begins with the system prompt
        again; a single answer that is too long, or comes after too long a question, loses what is beyond the limit.

        Args:
            read: From `chat_rows.read_row`.
            place: Names the row in messages.
            limit: Tokens a sequence may have, or None.

        Raises:
            UserError: If the template cannot render it.
        """
        if not read.trained:
            return ChatRow(())
        if isinstance(read, Conversation):
            return self._fitted(read, place, limit)
        return _shortened(self.encode(self.renderings(read, place)[0]), limit)

    def _fitted(self, conversation: Conversation, place: str, limit: int | None) -> ChatRow:
        sequences = [self.encode(rendering) for rendering in self.renderings(conversation, place)]
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

    def renderings(self, read: Conversation | Completion, place: str) -> list[Rendering]:
        """The texts to train on: one with all answers, or one for each answer where the template needs it.

        Raises:
            UserError: If an answer cannot be found in its rendering.
        """
        if isinstance(read, Completion):
            text = read.prompt + read.completion
            return [Rendering(text, ((len(read.prompt), len(text), len(text)),), plain=True)]
        answers = [self.template.answer(read, index, place) for index in read.answers]
        whole = answers[-1].text
        if all(whole.startswith(answer.text[: answer.end]) for answer in answers):
            spans = tuple((answer.start, answer.stop, answer.end) for answer in answers)
            return [Rendering(whole[: answers[-1].end], spans)]
        return [Rendering(one.text[: one.end], ((one.start, one.stop, one.end),)) for one in answers]

    def encode(self, rendering: Rendering) -> ChatSequence:
        """The tokens of a rendering; every answer's edges are edges of tokens."""
        ids, offsets = self._tokens(rendering)
        mask = [0] * len(ids)
        begins = [begin for begin, _ in offsets]
        answers = []
        for start, stop, end in rendering.spans:
            first, last, after = (bisect.bisect_left(begins, edge) for edge in (start, stop, end))
            mask[first:after] = [1] * (after - first)
            answers.append((first, last, len(rendering.text[start:stop].encode())))
        sequence = ChatSequence(ids, mask, tuple(answers))
        return self._enclosed(sequence) if rendering.plain else sequence

    def _tokens(self, rendering: Rendering) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens and their places in the text; where one would straddle an answer's edge the text is parted there."""
        text = rendering.text
        ids, offsets = self._tokenise(text)
        begins = [begin for begin, _ in offsets]
        reached = list(itertools.accumulate((stop for _, stop in offsets), max, initial=0))

        def straddled(edge: int, *, blank: bool = False) -> bool:
            """Whether no clean cut between tokens lies there; with `blank`, white space after it is let pass."""
            # What is in no token's place was trimmed from that of the token after it, on whichever side that lies.
            stop = reached[bisect.bisect_left(begins, edge)]
            return stop < edge or (stop > edge and not (blank and not text[edge:stop].strip()))

        edges = {edge for start, stop, _ in rendering.spans for edge in (start, stop)}
        ends = {end for _, _, end in rendering.spans} - edges
        # A token that ends a turn may take white space after it along: it is still that token.
        found = {edge for edge in edges if straddled(edge)} | {edge for edge in ends if straddled(edge, blank=True)}
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

    def _enclosed(self, plain: ChatSequence) -> ChatSequence:
        """A plain text between BOS, where the tokenizer puts it, and EOS, which is trained; neither twice."""
        ids, mask = plain.input_ids, plain.mask
        bos = [] if ids[: len(self._bos)] == self._bos else self._bos
        eos = [] if ids[-1:] == [self._tokenizer.eos_token_id] else [self._tokenizer.eos_token_id]
        answers = tuple((first + len(bos), last + len(bos), size) for first, last, size in plain.answers)
        return ChatSequence([*bos, *ids, *eos], [*(0 for _ in bos), *mask, *(1 for _ in eos)], answers)


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
    return ChatRow((ChatSequence(sequence.input_ids[:limit], sequence.mask[:limit], whole),), True)
