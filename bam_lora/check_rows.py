"""What `bam-lora check` shows of every source: its columns, and a row as the model will see it."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_lora import marked_text
from bam_lora.chat import message_column
from bam_lora.chat_encoder import ChatEncoder, ChatSequence
from bam_lora.columns import describe_columns
from bam_lora.errors import UserError
from bam_lora.planning import slicing_of
from bam_lora.recipe import EvaluationSource, Recipe, Source
from bam_lora.recipe_chat import trains_chat
from bam_lora.row_filter import RowFilter
from bam_lora.slice_groups import ColumnValues
from bam_lora.sources import OpenSource, TextSource, open_source, read_rows, read_texts, text_source
from bam_lora.terminal_text import escaped
from bam_lora.token_files import tokenised

_SAMPLE_ROWS = 50
_LOOKED_AT = 10_000  # rows at the most: of a column that is always empty the whole stream would be read
_TEXT_ENDS, _CHAT_ENDS = (420, 160), (200, 80)  # characters shown of a part's beginning and end
_ROW_CHARACTERS = 200
_INDENT = " " * 12


@dataclass
class _Sample:
    """The first rows of a source, counted."""

    source: Source | EvaluationSource
    rows: int = 0
    columns: list[Mapping[str, Any]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    empty: int = 0
    unanswered: list[int] = field(default_factory=list)  # numbers of rows, from 1
    beyond: list[int] = field(default_factory=list)  # those whose answers begin beyond the sequence length
    cut: int = 0
    facts: str = ""
    filter: RowFilter | None = None
    shown: tuple[str, list[marked_text.Piece]] | None = None  # what it is, and the row


def source_lines(recipe: Recipe, tokenizer: Any, *, colour: bool = False) -> list[str]:
    """Lines about every source of a recipe: columns, a row with the trained tokens marked, rows that give nothing.

    Args:
        recipe: A recipe; the first rows of its sources are read.
        tokenizer: The base's, with the chat template that the run uses.
        colour: Mark by colour and underline instead of brackets.

    Raises:
        UserError: If a source cannot be read, holds nothing to train on or to score, or a row of it is wrong.
    """
    column = recipe.data.slicing_column if slicing_of(recipe) == "by_column" else None
    lines = []
    for role, sources, grouped in (
        ("target", recipe.data.target, column),
        ("replay", recipe.data.replay, None),
        ("learning", recipe.evaluation.target, None),
        ("forgetting", recipe.evaluation.source, None),
        ("selection", [*recipe.selection.target, *recipe.selection.source], None),
    ):
        for source in sources:
            sample = _sample(source, tokenizer, recipe.data.sequence_length, grouped)
            lines += _described(role, sample, grouped, colour)
    return [*lines, *_legend(colour), *_packing(recipe)]


def _sample(source: Source | EvaluationSource, tokenizer: Any, limit: int, column: str | None) -> _Sample:
    where, sample = text_source(source), _Sample(source)
    with tempfile.TemporaryDirectory() as cache:
        opened = open_source(where, streaming=True, cache=Path(cache))
        if where.where is None:
            opened.take(_LOOKED_AT)
        else:
            opened.sample()
        values = ColumnValues(where, column) if column is not None else None

        def note(number: int, row: Mapping[str, Any]) -> None:
            sample.columns.append(row)
            if values is not None:
                values.note(number, row)

        if where.mode == "chat":
            rows = itertools.islice(read_rows(where, opened, note=note), _SAMPLE_ROWS)
            _look_at_chats(sample, where, rows, ChatEncoder(tokenizer), tokenizer, limit)
        else:
            _look_at_texts(sample, where, opened, read_texts(where, opened, note=note), tokenizer)
    sample.groups = values.names if values is not None else []
    sample.filter = opened.filter
    return sample


def _look_at_texts(
    sample: _Sample, where: TextSource, opened: OpenSource, rows: Iterator[tuple[int, str]], tokenizer: Any
) -> None:
    found = list(itertools.islice(rows, _SAMPLE_ROWS))
    sample.empty, sample.rows = opened.empty_rows, len(found) + opened.empty_rows
    if not found:
        raise UserError.of(
            where.path,
            expected="text",
            found=f"no rows with text among {opened.empty_rows:,}" if opened.empty_rows else "no rows",
            remedy="Check split and column",
        )
    texts = [text for _, text in found]
    documents = tokenised(texts, tokenizer)
    size, tokens = sum(len(text.encode()) for text in texts), sum(map(len, documents))
    sample.facts = f"{size / tokens:.2f} bytes per token"
    if isinstance(sample.source, Source):
        ids = documents[0]
        mask = [0] + [1] * (len(ids) - 1)
        sample.shown = _row_of(found[0][0], ids, mask, tokenizer, "trained")


def _look_at_chats(
    sample: _Sample, where: TextSource, rows: Iterable[tuple[int, Mapping[str, Any]]], encoder: ChatEncoder,
    tokenizer: Any, limit: int,
) -> None:  # fmt: skip
    trained = isinstance(sample.source, Source)
    marked = total = 0
    for number, row in rows:
        sample.rows += 1
        try:
            found = encoder.row(
                row, f"{where.path}, row {number + 1}", limit if trained else None, message_column(where)
            )
        except UserError as error:
            raise UserError(f"{error} The row: {_excerpt(row)}") from error
        sample.cut += found.cut
        if not found.sequences:
            (sample.beyond if found.lost else sample.unanswered).append(number + 1)
        for sequence in found.sequences:
            mask = sequence.mask if trained else _scored(sequence)
            marked, total = marked + sum(mask), total + len(mask)
            if sample.shown is None:
                sample.shown = _row_of(number, sequence.input_ids, mask, tokenizer, "trained" if trained else "scored")
    if not total:
        raise UserError.of(
            where.path,
            expected="conversations with answers",
            found=f"none in {sample.rows} rows; the first: {_excerpt(sample.columns[0])}" if sample.rows else "no rows",
            remedy="Check split and column, and that the messages of the assistant are called that",
        )
    sample.facts = f"{marked / total:.0%} of the tokens are answers"


def _scored(sequence: ChatSequence) -> list[int]:
    """1 where a token is an answer's, its end-of-turn token left out."""
    mask = [0] * len(sequence.input_ids)
    for first, last, _ in sequence.answers:
        mask[first:last] = [1] * (last - first)
    return mask


def _row_of(
    number: int, ids: list[int], mask: list[int], tokenizer: Any, what: str
) -> tuple[str, list[marked_text.Piece]]:
    pieces = marked_pieces(ids, mask, tokenizer)
    return f"row {number + 1}, {len(ids):,} tokens, {sum(mask):,} of them {what}", pieces


def marked_pieces(ids: list[int], mask: list[int], tokenizer: Any) -> list[marked_text.Piece]:
    """What tokens say, in parts that are marked or not; special tokens as they are written.

    Args:
        ids: The tokens [tokens].
        mask: 1 where a token is marked [tokens].
        tokenizer: A transformers tokenizer.
    """

    def decoded(start: int, stop: int) -> str:
        return str(tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    pieces: list[marked_text.Piece] = []
    start = 0
    for mark, group in itertools.groupby(mask):
        stop = start + len(list(group))
        before, upto = decoded(0, start), decoded(0, stop)
        # Alone, some tokenizers would take the space before its first word away.
        pieces.append((upto[len(before) :] if upto.startswith(before) else decoded(start, stop), bool(mark)))
        start = stop
    return pieces


def _excerpt(row: Mapping[str, Any]) -> str:
    text = escaped(json.dumps(row, ensure_ascii=False, default=str))
    return text if len(text) <= _ROW_CHARACTERS else text[:_ROW_CHARACTERS] + "…"


def _described(role: str, sample: _Sample, column: str | None, colour: bool) -> list[str]:
    path, limit = _name(sample.source), getattr(sample.source, "tokens", None)
    parts = [f"at most {limit:,} tokens"] if limit else []
    parts.append(sample.facts)
    if sample.filter is not None:
        chosen, read = sample.filter.chosen, sample.filter.read
        parts.append(f"{chosen:,} of the {read:,} rows looked at pass: {sample.filter.where.describe()}")
    if column is not None:
        parts.append(f"{column} {escaped(', '.join(sample.groups))} at its start")
    lines = [f"{role:11} {path}: {'; '.join(parts)}", f"{_INDENT}columns: {describe_columns(sample.columns)}"]
    if sample.shown is not None:
        title, pieces = sample.shown
        ends = _CHAT_ENDS if sample.source.mode == "chat" else _TEXT_ENDS
        lines += [f"{_INDENT}{title}:"]
        shortened = marked_text.shorten(pieces, *ends)
        width = marked_text.columns() - len(_INDENT) - 2
        lines += [f"{_INDENT}  {line}" for line in marked_text.draw(shortened, colour=colour, width=width)]
    unseen = sample.filter.unseen_lines() if sample.filter is not None else []
    lines += [f"note        {path}: {line}" for line in unseen]
    return lines + [f"note        {path}, the first {sample.rows} rows: {found}" for found in _oddities(sample)]


def _name(source: Source | EvaluationSource) -> str:
    """Its path, with the configuration of a data set: a recipe may read several of one."""
    return source.path + (f" ({source.name})" if source.name else "")


def _oddities(sample: _Sample) -> list[str]:
    """Rows that give less than one might think."""
    trained = isinstance(sample.source, Source)
    found = []
    if sample.empty:
        found.append(f"{sample.empty} without text in column {sample.source.text!r}, passed over")
    for rows, why in (
        (sample.unanswered, "no answer"),
        (sample.beyond, "all within data.sequence_length is question"),
    ):
        if rows:
            places = ", ".join(map(str, rows[:3])) + (", …" if len(rows) > 3 else "")
            what = "to train on" if trained else "to score"
            found.append(f"{len(rows)} with nothing {what} ({why}; row {places}), left out")
    if trained and sample.cut:
        found.append(f"{sample.cut} longer than data.sequence_length, cut before a user's message or at the end")
    return found


def _legend(colour: bool) -> list[str]:
    mark = "green and underlined" if colour else f"{marked_text.OPEN}…{marked_text.CLOSE}"
    return [
        f"rows        {mark}: tokens that are trained (in evaluation and selection sets: scored); the rest is only "
        "read",
        f"{_INDENT}{marked_text.NEW_LINE} is a line break; control characters are written as \\x1b; the first token of "
        "a text is not trained, as nothing predicts it",
    ]


def _packing(recipe: Recipe) -> list[str]:
    length, chat = recipe.data.sequence_length, trains_chat(recipe)
    cut = "longer texts go on in the next piece"
    if chat:
        cut = "longer conversations are cut before a user's message" + (
            "" if all(source.mode == "chat" for source in (*recipe.data.target, *recipe.data.replay)) else f", {cut}"
        )
    return [
        f"packing     into sequences of at most {length:,} tokens, as many side by side as fit, none of which sees "
        f"another; {cut}"
    ]
