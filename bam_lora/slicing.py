"""Which tokens go into which slice: pure functions on document lengths, no text, no torch.

A *document* is a run of tokens in a token store (one store per data source). Documents are cut into *pieces* of at
most the sequence length, pieces are dealt to slices, and each slice's pieces are packed into rows. Every token of
the target is in exactly one piece, one slice, one row.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from bam_lora.errors import UserError

# store: index of the token store · start: first token in that store · length: number of tokens
PIECE = np.dtype([("store", "<i4"), ("start", "<i8"), ("length", "<i8")])
Pieces = npt.NDArray[np.void]
Lengths = npt.NDArray[np.int64]


def documents(stores: Sequence[Lengths]) -> Pieces:
    """Every document of every store, in order.

    Args:
        stores: Per store, the length in tokens of each document [documents].
    """
    tables = []
    for index, lengths in enumerate(stores):
        table = np.zeros(len(lengths), PIECE)
        table["store"] = index
        table["length"] = lengths
        table["start"] = np.cumsum(lengths) - lengths
        tables.append(table)
    return np.concatenate(tables) if tables else np.zeros(0, PIECE)


def split_tokens(table: Pieces, tokens: int) -> tuple[Pieces, Pieces]:
    """A table cut in two after `tokens` tokens, through a document if it must be."""
    ends = np.cumsum(table["length"])
    count = int(np.searchsorted(ends, tokens, side="left")) + 1 if tokens > 0 else 0
    head, tail = table[:count].copy(), table[count:]
    excess = int(head["length"].sum()) - tokens
    if excess > 0:
        head["length"][-1] -= excess
        rest = head[-1:].copy()
        rest["start"] += head["length"][-1]
        rest["length"] = excess
        tail = np.concatenate([rest, tail])
    return head, tail


def quotas(available: Sequence[int], weights: Sequence[float | None], total: int | None = None) -> list[int]:
    """How many tokens to take from each source.

    Args:
        available: Tokens each source can give.
        weights: Relative weight of each source; all None means "all there is" (or, with `total`, in proportion to
            what is there).
        total: Tokens wanted in all, or None for as many as the weights allow: the source that runs out first
            decides.

    Returns:
        Tokens per source; their sum is `total` where that is given and can be met.
    """
    if all(weight is None for weight in weights):
        if total is None or total >= sum(available):
            return list(available)
        shares = [Fraction(tokens) for tokens in available]
    else:
        shares = [Fraction(str(weight or 0.0)) for weight in weights]
    scale = Fraction(total) / sum(shares) if total is not None else None
    largest = min(Fraction(tokens) / share for tokens, share in zip(available, shares, strict=True) if share)
    factor = largest if scale is None else min(scale, largest)
    taken = [int(factor * share) for share in shares]
    missing = (total or 0) - sum(taken) if scale is not None and scale <= largest else 0
    for index, limit in enumerate(available):  # rounding left at most one token a source
        if missing and taken[index] < limit:
            taken[index] += 1
            missing -= 1
    return [min(tokens, limit) for tokens, limit in zip(taken, available, strict=True)]


def select(stores: Sequence[Lengths], amounts: Sequence[int]) -> Pieces:
    """The first `amounts[i]` tokens of each store, as documents."""
    table = documents(stores)
    parts = [split_tokens(table[table["store"] == index], amount)[0] for index, amount in enumerate(amounts)]
    return np.concatenate(parts) if parts else np.zeros(0, PIECE)


def order(table: Pieces, slicing: str, seed: int) -> Pieces:
    """Documents in the order in which they are dealt: as they came if slicing is `contiguous`, else shuffled."""
    if slicing == "contiguous":
        return table
    permutation = np.random.Generator(np.random.PCG64(seed)).permutation(len(table))
    return table[permutation]


def cut(table: Pieces, sequence_length: int) -> Pieces:
    """Documents cut into pieces of at most `sequence_length` tokens; nothing is dropped."""
    counts = -(-table["length"] // sequence_length)
    pieces = np.repeat(table, counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    offset = (np.arange(len(pieces)) - first) * sequence_length
    pieces["start"] += offset
    pieces["length"] = np.minimum(pieces["length"] - offset, sequence_length)
    return pieces[pieces["length"] > 0]


def document_numbers(table: Pieces, stores: Sequence[Lengths]) -> Lengths:
    """The document that each piece is part of, counted over all stores in order [pieces]."""
    numbers = np.zeros(len(table), np.int64)
    before = 0
    for index, lengths in enumerate(stores):
        of_store = table["store"] == index
        starts = np.cumsum(lengths) - lengths
        numbers[of_store] = before + np.searchsorted(starts, table["start"][of_store], side="right") - 1
        before += len(lengths)
    return numbers


def require_even_groups(names: Sequence[str], slices: int) -> None:
    """Raises a UserError unless every group can get the same number of slices."""
    if slices % len(names):
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise UserError.of(
            "bam.slices",
            expected=f"a multiple of {len(names)}, the number of groups to slice by ({listed})",
            found=str(slices),
            remedy="Give every group the same number of slices; with --extend only the new ones count",
        )


def deal_groups(pieces: Pieces, labels: Lengths, names: Sequence[str], slices: int) -> tuple[list[Pieces], list[str]]:
    """Deals each group's pieces, in order, to slices of its own; the groups take turns.

    Args:
        pieces: Pieces of all groups.
        labels: The group of each piece, as an index into `names` [pieces].
        names: The groups, in the order of their turns; one without a piece has no turn.
        slices: Slices in all: a multiple of the number of groups.

    Returns:
        The slices (the first group's first, the second group's first, ..., the first group's second, ...), and the
        group of each. Slices of one group are equal in tokens, to within one piece.

    Raises:
        UserError: If there is not the same number of slices for every group, or too little text for a group's.
    """
    present = np.unique(labels).tolist()
    require_even_groups([names[index] for index in present], slices)
    rounds = slices // len(present)
    dealt = [deal(pieces[labels == index], rounds, f"data.target, group {names[index]}") for index in present]
    return (
        [group[turn] for turn in range(rounds) for group in dealt],
        [names[index] for _ in range(rounds) for index in present],
    )


def deal(pieces: Pieces, slices: int, name: str = "data.target") -> list[Pieces]:
    """Deals pieces, in order, to slices of equal size in tokens (to within one piece).

    Args:
        pieces: What is dealt.
        slices: Number of slices.
        name: What the pieces are, for the error.

    Raises:
        UserError: If there are not enough pieces for every slice to get one.
    """
    edges = np.concatenate([[0], np.cumsum(pieces["length"])])  # tokens before each piece, and after the last
    total = int(edges[-1])
    bounds = [int(np.abs(edges - total * index / slices).argmin()) for index in range(slices)] + [len(pieces)]
    if any(stop <= start for start, stop in itertools.pairwise(bounds)):
        raise UserError.of(
            name,
            expected=f"enough text for {slices} slices",
            found=f"{total} tokens in {len(pieces)} pieces",
            remedy="Give more data, a smaller data.sequence_length or fewer bam.slices",
        )
    return [pieces[start:stop] for start, stop in itertools.pairwise(bounds)]


def deal_exactly(table: Pieces, amounts: Sequence[int]) -> list[Pieces]:
    """Deals a table, in order, into parts of exactly `amounts` tokens, cutting a document where a part ends."""
    parts: list[Pieces] = []
    rest = table
    for amount in amounts:
        part, rest = split_tokens(rest, amount)
        parts.append(part)
    return parts


def whole_documents(lengths: Lengths, tokens: int) -> int:
    """The tokens of as many whole documents as hold at least `tokens`, from the first on."""
    ends = np.cumsum(lengths)
    return int(ends[min(int(np.searchsorted(ends, tokens, side="left")), len(ends) - 1)]) if tokens else 0


def uncut(parts: Sequence[Pieces], lengths: Sequence[Lengths], stores: Collection[int]) -> list[Pieces]:
    """The same parts, with documents of some stores made whole again: each is where its beginning was.

    Args:
        parts: Tables in which a document may be cut, its pieces in several parts.
        lengths: Per store, the length of each document [documents].
        stores: Those whose documents are not to be cut.
    """
    whole = []
    for part in parts:
        kept = np.ones(len(part), dtype=bool)
        part = part.copy()
        for store in stores:
            mine = np.flatnonzero(part["store"] == store)
            begins = np.cumsum(lengths[store]) - lengths[store]
            document = np.searchsorted(begins, part["start"][mine], side="right") - 1
            part["length"][mine] = lengths[store][document]
            kept[mine] = begins[document] == part["start"][mine]
        whole.append(part[kept])
    return whole


def pack(lengths: Sequence[int] | Lengths, sequence_length: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing of pieces into rows of at most `sequence_length` tokens.

    The longest piece goes first, each into the fullest row that still has room for it (Johnson 1973; for language
    models Ding et al. 2024, arXiv 2404.10830). Deterministic: ties go to the earlier piece and the older row.

    Args:
        lengths: Tokens of each piece [pieces], none longer than `sequence_length`.
        sequence_length: Tokens a row can hold.

    Returns:
        Rows, each a list of piece indices.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # room left -> rows with exactly that room, oldest first
    rooms: list[int] = []  # the keys of open_rows, sorted
    for piece in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[piece])
        assert 0 < length <= sequence_length
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = open_rows[room].pop(0)
            if not open_rows[room]:
                del open_rows[room], rooms[at]
            rows[row].append(piece)
        else:
            row, room = len(rows), sequence_length
            rows.append([piece])
        left = room - length
        if left:
            if left not in open_rows:
                bisect.insort(rooms, left)
            bisect.insort(open_rows.setdefault(left, []), row)
    return rows
