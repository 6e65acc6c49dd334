"""From texts to packed rows on disk: tokenise once, deal to slices, pack.

The result is one folder: `rows.arrow` (columns `input_ids`, `seq_lengths`; one row of at most the sequence length,
documents side by side) and the manifest, whose facts say which rows are which slice. Memory stays flat: texts stream,
tokens go to disk as they come, only the documents' lengths are kept.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bam_lora import slicing
from bam_lora.chat import ChatReader, template_digest
from bam_lora.dealing import deal_sources, most_of
from bam_lora.errors import UserError
from bam_lora.packing import ROWS, write_rows
from bam_lora.sieve import Screening, Sieve, describe_dropped
from bam_lora.slice_groups import ColumnValues
from bam_lora.sources import OpenSource, Shuffle, TextSource, open_source, read_rows, read_texts
from bam_lora.store import digest, new_folder, seal, verify
from bam_lora.text_filters import FilterRules
from bam_lora.token_files import tokenizer_digest, write_tokens

_BATCH_CHARACTERS = 2_000_000
Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainingSource:
    """A source of training text: where it is, how much of it may be used, and its weight among its kind."""

    where: TextSource
    role: str  # "target" or "replay"
    tokens: int | None = None
    weight: float | None = None
    skip_rows: int = 0  # rows that an earlier part of the run has used
    group: str | None = None  # what its slices are called where data is sliced by data set
    group_column: str | None = None  # the column that says which group a row is of
    shuffle: Shuffle | None = None
    commit: str | None = None  # of a Hub data set that an earlier part of the run has read
    filters: FilterRules = field(default_factory=FilterRules)


@dataclass(frozen=True)
class Layout:
    """How tokens become slices and rows. `replay_share` is the share of all training tokens."""

    slices: int
    sequence_length: int
    slicing: str
    replay_share: float
    seed: int


@dataclass(frozen=True)
class TokenStore:
    """One tokenised source: a flat file of int32 tokens, the documents' lengths and their row numbers."""

    folder: Path
    tokens: npt.NDArray[np.int32]
    lengths: slicing.Lengths
    rows: npt.NDArray[np.int64]
    facts: dict[str, Any]
    labels: slicing.Lengths | None  # the group of each document, as an index into the facts' "groups"
    mask: npt.NDArray[np.uint8] | None = None  # for chat: 1 where a token is trained


def prepare(
    sources: Sequence[TrainingSource], layout: Layout, tokenizer: Any, folder: Path, *, key: str, say: Say,
    expected: Mapping[str, Any] | None = None, screening: Callable[[], Screening] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Makes the packed, sliced data at `folder`, or finds it there.

    Args:
        sources: Target and replay sources.
        layout: Number of slices, sequence length, order, replay share and seed.
        tokenizer: A transformers tokenizer with an EOS token.
        folder: Where the artefact goes.
        key: Hash of everything above; a verified folder with this key is taken as it is.
        say: Receives lines about progress.
        expected: Facts of the same data made before (it is lost): what is made now must be the same.
        screening: What is done about copies and held-out text, asked for when it is needed; None keeps all of it.

    Returns:
        The facts: seconds, sources, slices (rows, target_tokens, replay_tokens, trained_tokens), contamination.

    Raises:
        UserError: If a source cannot be read, is empty or other than expected, or there is too little text.
    """
    done = verify(folder, key)
    if done is not None:
        return dict(done["facts"])
    started = time.monotonic()
    work = folder.with_name(f"{folder.name}-tokens")
    sieve = Sieve(screening() if screening else Screening())
    stores = _tokenise_all(sources, layout, tokenizer, work, say, sieve)
    grouping = [_groups_of(source, store) for source, store in zip(sources, stores, strict=True)]
    dealt, used, groups = deal_sources(sources, [store.lengths for store in stores], layout, grouping)
    with new_folder(folder) as temporary:
        tokens = [store.tokens for store in stores]
        masks = [store.mask for store in stores]
        slices = write_rows(temporary / ROWS, tokens, dealt, layout.sequence_length, layout.seed, groups, masks)
        facts: dict[str, Any] = {
            "sources": [
                _source_facts(source, store, amount)
                for source, store, amount in zip(sources, stores, used, strict=True)
            ],
            "slices": slices,
            "contamination": sieve.contamination(),
            "seconds": time.monotonic() - started,
        }
        if expected is not None and any(facts[name] != expected[name] for name in ("sources", "slices")):
            shutil.rmtree(work)
            raise UserError.of(
                str(folder),
                expected="the data this run was planned with",
                found="other text in its sources",
                remedy="Restore the sources, or start a new run",
            )
        sieve.keep_fingerprints(temporary, [store.folder for store in stores], facts["sources"])
        seal(temporary, key, facts)
    shutil.rmtree(work)
    return facts


def _tokenise_all(
    sources: Sequence[TrainingSource], layout: Layout, tokenizer: Any, work: Path, say: Say, sieve: Sieve
) -> list[TokenStore]:
    """Tokenises the targets, then as much of each replay source as its share can need at the most."""
    stores: dict[int, TokenStore] = {}
    for index in sorted(range(len(sources)), key=lambda i: sources[i].role != "target"):
        source = sources[index]
        if source.role == "replay":
            targets = [i for i in range(len(sources)) if sources[i].role == "target"]
            available = [min(int(stores[i].lengths.sum()), sources[i].tokens or sys.maxsize) for i in targets]
            target_tokens = sum(slicing.quotas(available, [sources[i].weight for i in targets]))
            # Conversations are taken whole, which is at most one sequence more of each source.
            target_tokens += layout.sequence_length * sum(sources[i].where.mode == "chat" for i in targets)
            needed = round(target_tokens * layout.replay_share / (1 - layout.replay_share)) + layout.slices
            most = most_of(sources, index, needed)
            source = replace(source, tokens=min(source.tokens or most, most))
        stores[index] = _tokenised(source, layout.sequence_length, tokenizer, work, say, sieve)
    return [stores[index] for index in range(len(sources))]


def _tokenised(source: TrainingSource, limit: int, tokenizer: Any, work: Path, say: Say, sieve: Sieve) -> TokenStore:
    """Tokenises one source into `work`, or finds it there from an interrupted attempt."""
    chat = source.where.mode == "chat"
    how = {"template": template_digest(tokenizer), "limit": limit} if chat else {}
    wanted = {**asdict(source), "where": source.where.described()}
    key = digest({"source": wanted, "tokenizer": tokenizer_digest(tokenizer), "sieve": sieve.key, **how})
    folder = work / key[:16]
    found = verify(folder, key) is not None
    if not found:
        say(f"tokenising {source.where.path} ({source.role})")
        with new_folder(folder) as temporary:
            facts = _tokenise_into(source, limit, tokenizer, temporary, sieve, say)
            shutil.rmtree(temporary / "cache", ignore_errors=True)
            seal(temporary, key, facts)
        dropped = describe_dropped(facts["rows"], facts["dropped"])
        say(f"  {facts['tokens']:,} tokens in {facts['documents']:,} documents{dropped and f'; {dropped}'}")
    sieve.take_over(folder, key, screened=not found)
    manifest = verify(folder, key, quick=True)
    assert manifest is not None
    tokens = folder / "tokens.bin"
    assert tokens.stat().st_size == 4 * manifest["facts"]["tokens"], tokens
    return TokenStore(
        folder=folder,
        tokens=np.memmap(tokens, dtype=np.int32, mode="r") if tokens.stat().st_size else np.zeros(0, np.int32),
        lengths=np.fromfile(folder / "lengths.bin", dtype=np.int64),
        rows=np.fromfile(folder / "rows.bin", dtype=np.int64),
        labels=np.fromfile(folder / "labels.bin", dtype=np.int64) if source.group_column else None,
        facts=manifest["facts"],
        mask=np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r") if chat and tokens.stat().st_size else None,
    )


def _tokenise_into(
    source: TrainingSource, limit: int, tokenizer: Any, folder: Path, sieve: Sieve, say: Say
) -> dict[str, Any]:
    if tokenizer.eos_token_id is None:
        raise UserError.of(
            f"tokenizer {tokenizer.name_or_path}",
            expected="an end-of-sequence token",
            found="none",
            remedy="Set `eos_token` in its tokenizer_config.json",
        )
    # Shuffled it is always streamed: the order must be the same with a limit and, in an extension, without.
    streaming, cache = source.tokens is not None or source.shuffle is not None, folder / "cache"
    opened = open_source(source.where, streaming=streaming, cache=cache, shuffle=source.shuffle, commit=source.commit)
    opened.say = say
    screen = sieve.source(source.where.path, source.filters)
    column = ColumnValues(source.where, source.group_column) if source.group_column else None
    chat = ChatReader(source.where, tokenizer, limit) if source.where.mode == "chat" else None
    kept = write_tokens(screen.batches(_batches(source, opened, column, chat)), chat, tokenizer, folder, source.tokens)
    for line in opened.filter.unseen_lines() if opened.filter is not None else ():
        say(f"  {source.where.path}: {line}")
    if not kept.lengths and not source.skip_rows:  # an extension may find an old source used up
        raise _no_text(source, chat, screen.describe_dropped())
    arrays: dict[str, Any] = {"lengths": kept.lengths, "rows": kept.rows}
    groups: dict[str, Any] = {}
    if column is not None:
        groups["groups"], arrays["labels"] = column.names, column.labels(kept.rows)
    for name, values in arrays.items():
        (folder / f"{name}.bin").write_bytes(np.asarray(values, dtype=np.int64).tobytes())
    counts = screen.close(folder, opened.empty_rows, opened.left_out)
    sizes = {"documents": len(kept.lengths), "tokens": kept.tokens, "bytes": kept.size_bytes}
    facts = {**opened.facts, **counts, **sizes, **groups}
    return {**facts, "chat_template": template_digest(tokenizer), **asdict(chat.counts)} if chat else facts


def _no_text(source: TrainingSource, chat: ChatReader | None, dropped: str) -> UserError:
    return UserError.of(
        source.where.path,
        expected="conversations with answers" if chat else "text",
        found=f"none in {chat.counts.conversations} rows" if chat else dropped or "no rows with text",
        remedy="Check the file, the split, the column and what data.filters and data.deduplicate drop"
        + (", and data.sequence_length" if chat else ""),
    )


def _groups_of(source: TrainingSource, store: TokenStore) -> tuple[list[str], slicing.Lengths]:
    """The groups that a source holds, and the group of each of its documents."""
    if store.labels is not None:
        return store.facts["groups"], store.labels
    return [source.group] if source.group is not None else [], np.zeros(len(store.lengths), np.int64)


def _batches(
    source: TrainingSource, opened: OpenSource, column: ColumnValues | None, chat: ChatReader | None
) -> Iterator[tuple[list[int], list[str]]]:
    note = column.note if column is not None else None
    if chat is not None:
        yield from chat.batches(read_rows(source.where, opened, skip_rows=source.skip_rows, note=note))
        return
    numbers: list[int] = []
    texts: list[str] = []
    characters = 0
    for number, text in read_texts(source.where, opened, skip_rows=source.skip_rows, note=note):
        numbers.append(number)
        texts.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield numbers, texts
            numbers, texts, characters = [], [], 0
    if texts:
        yield numbers, texts


def _source_facts(source: TrainingSource, store: TokenStore, used_tokens: int) -> dict[str, Any]:
    """What a source gave. `next_row` is where an extension of the run goes on reading it."""
    documents = int(np.searchsorted(np.cumsum(store.lengths), used_tokens)) + 1 if used_tokens else 0
    next_row = int(store.rows[documents - 1]) + 1 if documents else source.skip_rows
    if documents == len(store.lengths):  # the rows after the last document hold none
        next_row = max(next_row, source.skip_rows + store.facts["rows"])
    return {
        **source.where.described(),
        "role": source.role,
        **({"shuffle_buffer": source.shuffle.buffer} if source.shuffle else {}),
        **store.facts,
        "used_documents": documents,
        "used_tokens": used_tokens,
        "next_row": next_row,
    }
