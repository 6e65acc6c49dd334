"""Evaluation sets of conversations: the answers are scored, all that comes before them is context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bam_lora.chat import message_column
from bam_lora.chat_encoder import ChatEncoder
from bam_lora.chat_rows import Completion, Conversation, read_row
from bam_lora.chat_template import ChatTemplate
from bam_lora.errors import UserError
from bam_lora.evaluate import EvaluationSet, Window
from bam_lora.sampling import write_after
from bam_lora.sources import TextSource


def read_chat_set(
    name: str, role: str, source: TextSource, rows: Iterable[tuple[int, Mapping[str, Any]]], limit: int | None
) -> EvaluationSet:
    """Reads the conversations of a set.

    Args:
        name: Of the set.
        role: "target" or "source".
        source: Where it is.
        rows: Its numbered rows.
        limit: Conversations to read, or None for all; those without an answer do not count.

    Returns:
        The set; its documents are what the answers of each conversation say.

    Raises:
        UserError: If a row has no known shape, or there is no answer to score.
    """
    chats = []
    for number, row in rows:
        read = read_row(row, f"{source.path}, row {number + 1}", message_column(source))
        if read.trained:
            chats.append(read)
        if limit is not None and len(chats) >= limit:
            break
    if not chats:
        raise UserError.of(
            source.path, expected="answers to score", found="no row with an answer", remedy="Check the file and column"
        )
    return EvaluationSet(name, role, tuple(chat.answered for chat in chats), tuple(chats))


def chat_windows(part: EvaluationSet, tokenizer: Any, context_tokens: int | None) -> list[Window]:
    """A window for every answer: what comes before it is context, its end-of-turn token is not scored.

    Where all that does not fit the model's context, the oldest of the context is left out, and an answer longer than
    half the model's context is scored in parts of that length. The bytes of an answer are counted in its first window.

    Args:
        part: A set of conversations.
        tokenizer: A tokenizer with a chat template.
        context_tokens: The model's context length, or None if unknown.

    Raises:
        UserError: If the template cannot render a conversation.
    """
    encoder = ChatEncoder(tokenizer)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    windows = []
    for number, chat in enumerate(part.chats):
        place = f"evaluation set {part.name!r}, conversation {number + 1}"
        for sequence in map(encoder.encode, encoder.renderings(chat, place)):
            for first, last, size_bytes in sequence.answers:
                step = max(1, last - first if context_tokens is None else context_tokens // 2)
                for start in range(first, last, step):
                    stop = min(start + step, last)
                    room = start if context_tokens is None else min(start, context_tokens - (stop - start))
                    context = tuple(sequence.input_ids[start - room : start]) or (begin,)
                    scored = tuple(sequence.input_ids[start:stop])
                    windows.append(Window(number, context, scored, size_bytes if start == first else 0))
    return windows


def answer_question(model: Any, tokenizer: Any, question: str, tokens: int, dtype: str) -> str:
    """What the model answers to a question, greedily: up to `tokens` tokens, or as far as the end of its turn."""
    messages = [{"role": "user", "content": question}]
    template = ChatTemplate(tokenizer)
    prompt = template.render(messages, None, {}, "a sample", prompt=True)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(template.end_of_turn)}
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return write_after(model, tokenizer, ids, tokens, dtype, eos_token_id=sorted(ends))


def chats_to_json(chats: Sequence[Conversation | Completion]) -> list[dict[str, Any]]:
    """Conversations in plain JSON types."""
    return [asdict(chat) for chat in chats]


def chats_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[Conversation | Completion, ...]:
    """The conversations that `chats_to_json` wrote."""
    return tuple(
        Completion(**value)
        if "completion" in value
        else Conversation(tuple(value["messages"]), tuple(value["answers"]), value["tools"], value["arguments"])
        for value in values
    )
