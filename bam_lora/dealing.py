"""Which tokens of which source go into which slice: amounts, groups and replay; pure, on lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from bam_lora import slicing
from bam_lora.errors import UserError
from bam_lora.slice_groups import GROUPED, combine

if TYPE_CHECKING:
    from bam_lora.data import Layout, TrainingSource

Grouping = Sequence[tuple[Sequence[str], slicing.Lengths]]
"""Per source the groups it holds, and the group of each of its documents as an index into them."""


def deal_sources(
    sources: Sequence[TrainingSource],
    lengths: Sequence[slicing.Lengths],
    layout: Layout,
    grouping: Grouping | None = None,
) -> tuple[list[tuple[slicing.Pieces, slicing.Pieces]], list[int], list[str] | None]:
    """Decides which tokens of which source go into which slice. Conversations are never cut here.

    Args:
        sources: Target and replay sources.
        lengths: Per source, the tokens of each document [documents].
        layout: Number of slices, sequence length, order, replay share and seed.
        grouping: Per source, the groups of its documents; needed where the layout slices by groups.

    Returns:
        Per slice its target and replay pieces; per source the number of tokens used; and the group of each slice, None
        where the layout does not slice by groups.

    Raises:
        UserError: If there is too little target text for the slices or one group's, not the same number of slices for
            every group, or too little replay for its share.
    """
    available = [
        min(int(length.sum()), source.tokens or int(length.sum()))
        for source, length in zip(sources, lengths, strict=True)
    ]
    target = [index for index, source in enumerate(sources) if source.role == "target"]
    replay = [index for index, source in enumerate(sources) if source.role == "replay"]
    used = [0] * len(sources)
    whole = [index for index, source in enumerate(sources) if source.where.mode == "chat"]
    for index, amount in zip(target, _quotas(sources, available, target, None), strict=True):
        used[index] = slicing.whole_documents(lengths[index], amount) if index in whole else amount
    slices, groups = _deal_targets(slicing.select(lengths, used), lengths, layout, grouping)
    ratio = layout.replay_share / (1 - layout.replay_share)
    wanted = [round(int(part["length"].sum()) * ratio) for part in slices]
    replayed = slicing.select(lengths, [0] * len(sources))
    if sum(wanted):
        amounts = _quotas(sources, available, replay, sum(wanted))
        _require_replay(sum(amounts), sum(wanted), layout.replay_share)
        for index, amount in zip(replay, amounts, strict=True):
            used[index] = slicing.whole_documents(lengths[index], amount) if index in whole else amount
        replayed = slicing.select(lengths, [used[i] if i in replay else 0 for i in range(len(sources))])
    parts = slicing.deal_exactly(slicing.order(replayed, layout.slicing, layout.seed + 1), wanted)
    if whole:
        parts = slicing.uncut(parts, lengths, whole)
        for index in set(whole) & set(replay):  # the last may reach no slice
            used[index] = sum(int(part["length"][part["store"] == index].sum()) for part in parts)
    replays = [slicing.cut(part, layout.sequence_length) for part in parts]
    return list(zip(slices, replays, strict=True)), used, groups


def _deal_targets(
    targets: slicing.Pieces, lengths: Sequence[slicing.Lengths], layout: Layout, grouping: Grouping | None
) -> tuple[list[slicing.Pieces], list[str] | None]:
    pieces = slicing.cut(slicing.order(targets, layout.slicing, layout.seed), layout.sequence_length)
    if layout.slicing not in GROUPED:
        return slicing.deal(pieces, layout.slices), None
    assert grouping is not None
    names, labels = combine([names for names, _ in grouping], [labels for _, labels in grouping])
    return slicing.deal_groups(pieces, labels[slicing.document_numbers(pieces, lengths)], names, layout.slices)


def _quotas(
    sources: Sequence[TrainingSource], available: Sequence[int], chosen: Sequence[int], total: int | None
) -> list[int]:
    return slicing.quotas([available[i] for i in chosen], [sources[i].weight for i in chosen], total)


def most_of(sources: Sequence[TrainingSource], index: int, total: int) -> int:
    """The most tokens that a source can have to give, for its kind to have `total`: by weight, or without one all."""
    weight = sources[index].weight
    if weight is None:
        return total
    every = sum(Fraction(str(one.weight or 0.0)) for one in sources if one.role == sources[index].role)
    return math.ceil(total * Fraction(str(weight)) / every) + 1


def _require_replay(found: int, wanted: int, share: float) -> None:
    if found < wanted:
        raise UserError.of(
            "data.replay",
            expected=f"{wanted:,} tokens (replay_share {share:g} of all training tokens)",
            found=f"{found:,}",
            remedy="Add replay data, lower data.replay_share, or limit the target with `tokens`",
        )
