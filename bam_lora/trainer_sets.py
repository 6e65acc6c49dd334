"""The data sets that a `BamTrainer` is given: what they are called, and what their content hashes to."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bam_lora.chat_rows import MESSAGE_COLUMNS
from bam_lora.chat_scoring import read_chat_set
from bam_lora.errors import UserError
from bam_lora.evaluate import EvaluationSet
from bam_lora.sources import TextSource
from bam_lora.store import digest

_STREAM_ROWS = 256


@dataclass(frozen=True)
class TrainingSet:
    """Examples to train on: a `datasets.Dataset` or `IterableDataset`.

    Attributes:
        name: What it is called in the plan.
        role: "target" or "replay".
        rows: The data set.
        tokens: Most tokens to take of it, or None for all.
    """

    name: str
    role: str
    rows: Any
    tokens: int | str | None

    def source(self) -> dict[str, Any]:
        """It as a source of a recipe."""
        return {"path": f"BamTrainer/{self.name}", "revision": fingerprint(self.rows), "tokens": self.tokens}


@dataclass(frozen=True)
class NamedSet:
    """Examples to score on, or to choose by.

    Attributes:
        argument: "eval_dataset" or "selection_dataset": both may have a set of one name.
        name: What the set is called.
        role: "target" or "source".
        rows: The data set.
        documents: Use only the first so many, or None for all.
        mode: "text", "chat" (the answers or completions are scored), or None for examples without text.
    """

    argument: str
    name: str
    role: str
    rows: Any
    documents: int | None
    mode: str | None

    @property
    def path(self) -> str:
        """What the recipe has in a path's place."""
        return f"BamTrainer/{self.argument}.{self.name}"

    def source(self) -> dict[str, Any]:
        """It as an evaluation source of a recipe."""
        return {
            "path": self.path,
            "revision": fingerprint(self.rows),
            "set": self.name,
            "documents": self.documents,
            "mode": self.mode,
        }


def fingerprint(rows: Any) -> str:
    """Hash of a data set's rows; of a stream, of its first ones."""
    if not hasattr(rows, "__len__"):
        return digest([repr(sorted(row.items())) for row in itertools.islice(rows, _STREAM_ROWS)])[:40]
    import pyarrow as pa

    content = hashlib.sha256(repr((len(rows), rows.features)).encode())
    for table in rows.with_format("arrow").iter(batch_size=1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        content.update(sink.getvalue())
    return content.hexdigest()[:40]


def training_sets(given: Any, role: str, tokens: int | str | None) -> list[TrainingSet]:
    """The training sets of one argument: a data set, or a mapping or list of them.

    Raises:
        UserError: If it is something else.
    """
    import datasets

    argument = "train_dataset" if role == "target" else "replay_dataset"
    if given is None:
        return []
    if isinstance(given, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise UserError.of(
            argument, expected="one data set: all of a mapping's are trained on", found=f"splits {', '.join(given)}",
            remedy=f"Pass one, such as dataset[{str(next(iter(given), 'train'))!r}]; or dict(dataset), if you mean all",
        )  # fmt: skip
    if isinstance(given, Mapping):
        named = [(f"{argument}.{name}", rows) for name, rows in given.items()]
    elif isinstance(given, list | tuple):
        named = [(f"{argument}.{number}", rows) for number, rows in enumerate(given, 1)]
    else:
        named = [(argument, given)]
    for name, rows in named:
        _require_dataset(name, rows)
    return [TrainingSet(name, role, rows, tokens) for name, rows in named]


def named_sets(given: Any, argument: str, documents: int | None, text_field: str, formatting: Any) -> list[NamedSet]:
    """Evaluation or selection sets: a mapping whose names begin with "target" or "source", or one set: the target.

    Raises:
        UserError: If it is something else.
    """
    if given is None:
        return []
    if not isinstance(given, Mapping):
        given = {"target": given}
    found = []
    for name, rows in given.items():
        _require_dataset(f"{argument}[{name!r}]", rows)
        role = "source" if str(name).startswith("source") else "target"
        held = read_stream(rows, documents)
        found.append(NamedSet(argument, str(name), role, held, documents, mode_of(held, text_field, formatting)))
    return found


def read_stream(rows: Any, limit: int | None = None) -> Any:
    """A stream's rows, the first so many of them, as a data set: they are read more than once. Others as they are."""
    import datasets

    if not isinstance(rows, datasets.IterableDataset):
        return rows
    return datasets.Dataset.from_list(list(itertools.islice(rows, limit)), features=rows.features)


def mode_of(rows: Any, text_field: str, formatting: Any) -> str | None:
    """What examples hold: "text", "chat", or None if neither."""
    row: Mapping[str, Any] = next(iter(rows), {})
    if formatting is not None or isinstance(row.get(text_field), str):
        return "text"
    chat = any(name in row for name in MESSAGE_COLUMNS) or {"prompt", "completion"} <= row.keys()
    return "chat" if chat else None


def _require_dataset(name: str, rows: Any) -> None:
    import datasets

    if not isinstance(rows, datasets.Dataset | datasets.IterableDataset):
        raise UserError.of(
            name,
            expected="a datasets.Dataset or IterableDataset",
            found=type(rows).__name__,
            remedy="Load it with datasets.load_dataset(..., split='train') or datasets.Dataset.from_list",
        )


def read_named(one: NamedSet, text_field: str, formatting: Any) -> EvaluationSet:
    """The documents of a set: its text column, what the formatting function makes of each row, or conversations.

    Raises:
        UserError: If it has no text.
    """
    if one.mode == "chat":
        return read_chat_set(one.name, one.role, TextSource(one.name), enumerate(one.rows), one.documents)
    rows = itertools.islice(one.rows, one.documents)
    said = (str(formatting(row)) if formatting is not None else row.get(text_field) for row in rows)
    documents = tuple(text for text in said if text and not text.isspace())
    if not documents:
        raise UserError.of(
            f"evaluation set {one.name!r}",
            expected=f"texts in column {text_field!r}",
            found="none",
            remedy="Name the column in args.dataset_text_field",
        )
    return EvaluationSet(one.name, one.role, documents)
