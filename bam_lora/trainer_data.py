"""The data of a `BamTrainer`: TRL tokenises, we deal the examples to slices, TRL packs each slice.

TRL's preparation is reached by its public door: an `SFTTrainer` prepares the data sets it is made with. It is made
with a model of a few numbers, since preparing needs none.
"""

from __future__ import annotations

import copy
import itertools
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bam_lora import slicing
from bam_lora.chat import answers_only
from bam_lora.chat_rows import MESSAGE_COLUMNS
from bam_lora.errors import UserError
from bam_lora.packing import ROWS
from bam_lora.store import new_folder, seal, verify
from bam_lora.trainer_lengths import token_counts
from bam_lora.trainer_sets import TrainingSet

_STREAM_ROWS = 256
_MARKERS = re.compile(r"\{%-?\s*generation\b")  # what transformers takes an assistant mask from


@dataclass(frozen=True)
class TrlPreparation:
    """Prepares data sets as the caller's `SFTTrainer` would."""

    args: Any
    processing_class: Any
    formatting_func: Any

    def require_columns(self, one: TrainingSet) -> None:
        """Refuses examples that TRL finds no text in, which it would only say with a KeyError."""
        columns = list(next(iter(one.rows), {}))
        wanted = {self.args.dataset_text_field, *MESSAGE_COLUMNS, "prompt", "input_ids"}
        if self.formatting_func is None and columns and not wanted & set(columns):
            raise UserError.of(
                one.name,
                expected=f"a column {self.args.dataset_text_field!r}, or 'messages', or 'prompt' and 'completion'",
                found=f"columns {', '.join(columns)}",
                remedy="Name the one with the text in args.dataset_text_field, or pass formatting_func",
            )

    def tokenised(self, rows: Any) -> Any:
        """Examples as `input_ids` and `labels`, whole, in their order; other columns stay.

        Of conversations whose template TRL has no training template for, `answers_only` finds the answers.
        """
        if self.args.assistant_only_loss and _is_conversational(rows) and not self._knows_template():
            rows = answers_only(rows, self.processing_class)
        return self._prepared({"rows": rows}, packing=False, max_length=None, shuffle_dataset=False)["rows"]

    def _knows_template(self) -> bool:
        """Whether TRL finds the answers: by markers in the template, or with a template of its own in its place."""
        from trl import get_training_chat_template

        if _MARKERS.search(str(self.processing_class.chat_template)):
            return True
        try:
            get_training_chat_template(self.processing_class)
        except ValueError:
            return False
        return True

    def packed(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Tokenised examples as the trainer's own arguments want them: packed or cut, shuffled."""
        return self._prepared(named)

    def evaluation(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Evaluation sets as the trainer prepares them."""
        packing = self.args.packing if self.args.eval_packing is None else self.args.eval_packing
        return self._prepared({name: self.tokenised(rows) for name, rows in named.items()}, packing=packing)

    def _prepared(self, named: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
        from trl import SFTTrainer

        args = copy.copy(self.args)
        for name, value in {**changes, "report_to": [], "push_to_hub": False, "do_eval": False}.items():
            setattr(args, name, value)
        # A data collator of the caller's is not needed; padding-free without packing is none of preparing's business.
        args.eval_strategy, args.eval_packing, args.padding_free = "no", None, False
        tokenised = all("input_ids" in rows.column_names for rows in named.values())
        if not all(map(_is_conversational, named.values())):
            args.assistant_only_loss = False  # nothing to look for in text, and what is tokenised has labels
        first = next(iter(named.values()))
        trainer = SFTTrainer(
            _stand_in(self.processing_class),
            args=args,
            train_dataset=_some(first),
            eval_dataset=dict(named),
            processing_class=self.processing_class,
            formatting_func=None if tokenised else self.formatting_func,
        )
        return dict(trainer.eval_dataset)


def prepared_sets(preparation: TrlPreparation | None, sets: Any) -> Any:
    """One evaluation set or a mapping of them as the trainer takes them: prepared here, or by the trainer itself."""
    if preparation is None:
        return sets
    return preparation.evaluation(sets) if isinstance(sets, Mapping) else preparation.evaluation({"eval": sets})["eval"]


def _is_conversational(rows: Any) -> bool:
    from trl import is_conversational, is_conversational_from_value

    first = next(iter(rows))
    return bool(is_conversational(first) or is_conversational_from_value(first))


def _some(rows: Any) -> Any:
    return rows.select(range(min(1, len(rows))))


def _stand_in(processing_class: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def materialised(one: TrainingSet, tokenise: Any, limit: int | None = None) -> Any:
    """A data set as tokenised examples; a stream is read until its token budget is used up.

    Args:
        one: The data set.
        tokenise: Makes examples of rows.
        limit: What an example is cut to, in tokens: no more of it counts.

    Raises:
        UserError: If a stream has no budget, or a set gives no example.
    """
    import datasets

    if isinstance(one.rows, datasets.Dataset):
        rows = tokenise(one.rows) if len(one.rows) else None
    else:
        if one.tokens is None:
            raise UserError.of(
                one.name,
                expected="a token budget, as the data set is a stream",
                found="none",
                remedy="Set BamConfig(tokens=...), such as tokens='5M'",
            )
        rows = _drawn(one.rows, int(one.tokens), tokenise, limit)
    if rows is None or not len(rows):
        raise UserError.of(
            one.name, expected="examples with tokens to train on", found="none",
            remedy="Check the data set, and what of it is left out, or raise args.max_length: it may cut the answers",
        )  # fmt: skip
    return rows


def _drawn(stream: Any, budget: int, tokenise: Any, limit: int | None) -> Any:
    import datasets

    parts, tokens = [], 0
    rows: Iterator[Any] = iter(stream)
    while tokens < budget and (batch := list(itertools.islice(rows, _STREAM_ROWS))):
        part = tokenise(datasets.Dataset.from_list(batch))
        if part is not None:
            parts.append(part)
            tokens += int(token_counts(part, limit).sum())
    return datasets.concatenate_datasets(parts) if parts else None


def examples(rows: Any, pieces: slicing.Pieces, counts: npt.NDArray[np.int64]) -> Any:
    """The examples that pieces of documents stand for, in the data set's order; the pieces may end within one.

    Args:
        rows: Tokenised examples.
        pieces: Of one store: whole documents, or parts of them.
        counts: Tokens of each example that count [examples]; a piece of as many is the whole example.
    """
    import datasets

    pieces = pieces[np.argsort(pieces["start"], kind="stable")]
    starts = np.cumsum(counts) - counts
    index = np.searchsorted(starts, pieces["start"], side="right") - 1
    offset = pieces["start"] - starts[index]
    lengths = pieces["length"]
    chosen = rows.select(index)
    partial = np.flatnonzero((offset > 0) | (lengths < counts[index]))
    if not len(partial):
        return chosen
    kept = np.setdiff1d(np.arange(len(index)), partial)
    cut = [
        {name: chosen[int(i)][name][offset[i] : offset[i] + lengths[i]] for name in ("input_ids", "labels")}
        for i in partial
    ]
    return datasets.concatenate_datasets([chosen.select(kept), datasets.Dataset.from_list(cut, chosen.features)])


def write_slices(
    slices: Sequence[Any], facts: Sequence[Mapping[str, Any]], sources: Sequence[Mapping[str, Any]],
    contamination: Sequence[Mapping[str, Any]], folder: Path, key: str, started: float,
) -> dict[str, Any]:  # fmt: skip
    """Writes the slices' examples one after the other and seals them; gives the facts, as `data.prepare` does."""
    with new_folder(folder) as temporary:
        described, position = [], 0
        with _Writer(temporary / ROWS) as writer:
            for rows, fact in zip(slices, facts, strict=True):
                writer.write(rows)
                described.append({"rows": [position, position + len(rows)], **fact})
                position += len(rows)
        body = {
            "sources": list(sources),
            "slices": described,
            "contamination": list(contamination),
            "seconds": time.monotonic() - started,
        }
        seal(temporary, key, body)
    return body


class _Writer:
    """Data sets of one schema, one after the other, as an Arrow stream that `datasets` memory-maps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: Any = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def write(self, rows: Any) -> None:
        import pyarrow as pa

        if self._stream is None:
            self._schema = rows.features.arrow_schema
            self._stream = pa.ipc.new_stream(str(self._path), self._schema)
        for table in rows.with_format("arrow").iter(batch_size=1000):
            self._stream.write_table(table.select(self._schema.names).cast(self._schema))


def found(folder: Path, key: str) -> dict[str, Any] | None:
    """The facts of data that is there and whole."""
    done = verify(folder, key)
    if done is None:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return dict(done["facts"])
