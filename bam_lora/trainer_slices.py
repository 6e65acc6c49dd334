"""Which examples of a `BamTrainer` go into which slice, with replay mixed in, and what of it is written down."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bam_lora import slicing
from bam_lora.contamination import HeldOutSet
from bam_lora.data import Layout, TrainingSource
from bam_lora.dealing import deal_sources
from bam_lora.errors import UserError
from bam_lora.recipe import Recipe, Source
from bam_lora.screening import screening_of
from bam_lora.sieve import Sieve
from bam_lora.slice_groups import GROUPED
from bam_lora.sources import TextSource
from bam_lora.trainer_data import (
    TrlPreparation,
    examples,
    found,
    materialised,
    write_slices,
)
from bam_lora.trainer_lengths import cut_limit, token_counts, trained_only
from bam_lora.trainer_screen import ExampleScreen
from bam_lora.trainer_sets import TrainingSet, mode_of


@dataclass(frozen=True)
class TrainerData:
    """Makes the data of a run from the data sets of a script.

    Attributes:
        sets: Target and replay sets.
        recipe: The run.
        preparation: TRL's, or None where the trainer prepares its examples itself: then examples are counted, not
            tokens.
    """

    sets: Sequence[TrainingSet]
    recipe: Recipe
    preparation: TrlPreparation | None

    def __call__(self, folder: Path, key: str, held_out: Sequence[HeldOutSet] = ()) -> dict[str, Any]:
        """Makes the slices at a folder, or finds them there; gives the facts, as `data.prepare` does."""
        done = found(folder, key)
        if done is not None:
            return done
        started = time.monotonic()
        rows, counts, sources, groups = [], [], [], []
        sieve = Sieve(screening_of(self.recipe, held_out, []))
        for one, listed in self._listed():
            screen = self._screen(one, sieve)
            taken, untrained = self._examples(replace(one, tokens=listed.tokens), screen)
            rows.append(taken if self.preparation is None else taken.select_columns(["input_ids", "labels"]))
            counts.append(self._counts(taken))
            groups.append(self._groups(one, taken))
            facts_of = {**self._source_facts(listed, one.role, taken, counts[-1]), "untrained_documents": untrained}
            sources.append({**facts_of, **screen.facts()})
        dealt, used, names = self._deal(counts, groups)
        slices = [self._slice(rows, counts, target, replay) for target, replay in dealt]
        facts: list[dict[str, Any]] = [
            {"target_tokens": int(target["length"].sum()), "replay_tokens": int(replay["length"].sum())}
            for target, replay in dealt
        ]
        for fact, name in zip(facts, names or (), strict=names is not None):
            fact["group"] = name
        if self.preparation is not None:
            packed = self.preparation.packed({f"slice {number}": part for number, part in enumerate(slices, 1)})
            slices = list(packed.values())
            for fact, part in zip(facts, slices, strict=True):
                kept = int(token_counts(part).sum())
                fact["dropped_tokens"] = fact["target_tokens"] + fact["replay_tokens"] - kept
        for source, amount in zip(sources, used, strict=True):
            source["used_tokens"] = amount
        return write_slices(slices, facts, sources, sieve.contamination(), folder, key, started)

    def _screen(self, one: TrainingSet, sieve: Sieve) -> ExampleScreen:
        if self.preparation is None:
            return ExampleScreen(one.name, sieve, None, "", None)
        field, formatting = self.preparation.args.dataset_text_field, self.preparation.formatting_func
        return ExampleScreen(one.name, sieve, mode_of(one.rows, field, formatting), field, formatting)

    def _examples(self, one: TrainingSet, screen: ExampleScreen) -> tuple[Any, int]:
        """Tokenised examples, and how many more were read that cutting leaves no trained token."""
        preparation = self.preparation
        if preparation is None:
            return materialised(one, lambda rows: rows), 0
        preparation.require_columns(one)

        untrained = []

        def tokenise(rows: Any) -> Any:
            left = screen.kept(rows)
            if not len(left):
                return None
            whole = preparation.tokenised(left)
            kept = trained_only(whole, preparation.args)
            untrained.append(len(whole) - len(kept))
            return kept

        return materialised(one, tokenise, cut_limit(preparation.args)), sum(untrained)

    def _counts(self, rows: Any) -> npt.NDArray[np.int64]:
        if self.preparation is None:
            return np.ones(len(rows), np.int64)
        return token_counts(rows, cut_limit(self.preparation.args))

    def _groups(self, one: TrainingSet, rows: Any) -> tuple[list[str], npt.NDArray[np.int64]]:
        """The groups that a data set holds, and the group of each of its examples [examples]."""
        wanted = self.recipe.data.slicing
        if one.role == "replay" or wanted not in GROUPED:
            return [], np.zeros(len(rows), np.int64)
        if wanted == "by_dataset":
            return [one.name.rpartition(".")[2]], np.zeros(len(rows), np.int64)
        column = str(self.recipe.data.slicing_column)
        if column not in rows.column_names:
            raise UserError.of(
                one.name, expected=f"a column {column!r} to slice by", found=f"columns {', '.join(rows.column_names)}",
                remedy="Name another in BamConfig(slicing_column=...)",
            )  # fmt: skip
        names, labels = np.unique([str(value) for value in rows[column]], return_inverse=True)
        return names.tolist(), labels

    def _listed(self) -> list[tuple[TrainingSet, Source]]:
        """The data sets with what the recipe says of them: the hash of their rows, and how many tokens "5M" is."""
        return list(zip(self.sets, [*self.recipe.data.target, *self.recipe.data.replay], strict=True))

    def _source_facts(self, source: Source, role: str, rows: Any, counts: npt.NDArray[np.int64]) -> dict[str, Any]:
        whole = counts if self.preparation is None else token_counts(rows)
        return {
            "path": source.path,
            "revision": source.revision,
            "role": role,
            "unit": "examples" if self.preparation is None else "tokens",
            "documents": len(rows),
            "tokens": int(counts.sum()),
            "truncated_tokens": int(whole.sum() - counts.sum()),
        }

    def _deal(
        self, counts: Sequence[npt.NDArray[np.int64]], groups: Sequence[tuple[list[str], npt.NDArray[np.int64]]]
    ) -> tuple[list[tuple[slicing.Pieces, slicing.Pieces]], list[int], list[str] | None]:
        data = self.recipe.data
        sources = [TrainingSource(TextSource(one.name), one.role, listed.tokens) for one, listed in self._listed()]
        layout = Layout(self.recipe.slices, sys.maxsize, data.slicing, data.replay_share, self.recipe.seed)
        return deal_sources(sources, list(counts), layout, groups)

    def _slice(
        self,
        rows: Sequence[Any],
        counts: Sequence[npt.NDArray[np.int64]],
        target: slicing.Pieces,
        replay: slicing.Pieces,
    ) -> Any:
        """The examples of one slice: of each data set in its own order, the targets before the replay."""
        import datasets

        parts = []
        for store, (taken, amounts) in enumerate(zip(rows, counts, strict=True)):
            for pieces in (target[target["store"] == store], replay[replay["store"] == store]):
                if len(pieces):
                    parts.append(examples(taken, pieces, amounts))
        return datasets.concatenate_datasets(parts)
