"""Copies and evaluation text among the examples of a `BamTrainer`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_lora.chat_rows import read_row
from bam_lora.sieve import Sieve, SourceSieve
from bam_lora.text_filters import FilterRules

_BATCH_ROWS = 1000
_NOTHING = {"rows": 0, "dropped": {}, "contaminated": 0, "example": None}


@dataclass
class ExampleScreen:
    """Screens the examples of one data set before they are tokenised.

    Attributes:
        name: Of the data set.
        sieve: What all data sets of the run are screened by.
        mode: "text", "chat", or None for examples without text, which are not screened.
        text_field: The column with the text.
        formatting: The caller's formatting function.
    """

    name: str
    sieve: Sieve
    mode: str | None
    text_field: str
    formatting: Any
    _screen: SourceSieve = field(init=False)
    _seen: int = 0

    def __post_init__(self) -> None:
        self._screen = self.sieve.source(self.name, FilterRules())

    def kept(self, rows: Any) -> Any:
        """The examples that stay, of a `datasets.Dataset` that follows those seen before."""
        if self.mode is None:
            return rows
        chosen: list[int] = []
        for start in range(0, len(rows), _BATCH_ROWS):
            batch = rows.select(range(start, min(start + _BATCH_ROWS, len(rows))))
            numbers = list(range(self._seen, self._seen + len(batch)))
            texts = [self._text(number, row) for number, row in zip(numbers, batch, strict=True)]
            chosen += [start + index for index in self._screen.keep(numbers, texts)]
            self._seen += len(batch)
        return rows if len(chosen) == len(rows) else rows.select(chosen)

    def facts(self) -> dict[str, Any]:
        """`rows` seen, `dropped` by reason, `contaminated` and an `example`.

        Raises:
            UserError: If evaluation text was found and that is to be an error.
        """
        if self.mode is None:
            return dict(_NOTHING)
        with tempfile.TemporaryDirectory() as folder:
            facts = self._screen.close(Path(folder), 0)
            self.sieve.take_over(Path(folder), self.name, screened=True)
        return facts

    def _text(self, number: int, row: Mapping[str, Any]) -> str:
        if self.formatting is not None:
            return str(self.formatting(row))
        if self.mode == "chat":
            return read_row(row, f"{self.name}, row {number + 1}").text
        return str(row.get(self.text_field) or "")
