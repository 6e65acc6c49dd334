"""Rows of a source chosen by the values of their columns: a recipe's `where`."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bam_lora import columns
from bam_lora.errors import UserError
from bam_lora.terminal_text import escaped

Value = str | int | float | bool
_KEPT_VALUES = 50  # of a column, to name in an error
_SHOWN_VALUES = 8
_VALUE_CHARACTERS = 40
_QUIET_ROWS, _QUIET_SECONDS = 100_000, 60.0  # read without a word
_FEW = 0.01  # of the rows: worth a word


@dataclass(frozen=True)
class Where:
    """Conditions that all must hold: per column the values that a row may have there."""

    conditions: tuple[tuple[str, tuple[Value, ...]], ...]

    @classmethod
    def of(cls, values: Mapping[str, Sequence[Value]] | None) -> Where | None:
        """From the recipe; None for no conditions."""
        if not values:
            return None
        return cls(tuple((column, tuple(wanted)) for column, wanted in values.items()))

    def to_json(self) -> dict[str, list[Value]]:
        """As the recipe has it."""
        return {column: list(wanted) for column, wanted in self.conditions}

    def describe(self) -> str:
        """In words: `language is 'fin' or 'swe' and split is 'train'`."""
        return " and ".join(
            f"{escaped(column)} is {' or '.join(map(_show, wanted))}" for column, wanted in self.conditions
        )


@dataclass
class RowFilter:
    """Chooses rows as they are read, and counts; where they are few, it says so from time to time.

    Attributes:
        path: Of the source, for errors.
        where: The conditions.
        say: Receives a line after 100,000 rows or a minute, and after twice as much each time, as long as fewer than
            one in a hundred was chosen; None: nobody is told.
        patience_seconds: How long is read at the most where only a sample is wanted; None: to the end.
        read: Rows looked at so far.
        chosen: Of them, those in which all conditions hold.
    """

    path: str
    where: Where
    say: Callable[[str], None] | None = None
    patience_seconds: float | None = None
    read: int = 0
    chosen: int = 0
    _wanted: list[tuple[str, set[tuple[bool, Value]]]] = field(init=False)
    _seen: dict[str, dict[tuple[bool, Value], None]] = field(init=False)
    _others: dict[str, dict[str, None]] = field(init=False)

    def __post_init__(self) -> None:
        conditions = self.where.conditions
        self._wanted = [(column, {_exact(value) for value in wanted}) for column, wanted in conditions]
        self._seen = {column: {} for column, _ in conditions}
        self._others = {column: {} for column, _ in conditions}
        self._started = time.monotonic()
        self._next_rows, self._next_time = _QUIET_ROWS, self._started + _QUIET_SECONDS

    @property
    def left_out(self) -> int:
        """Rows in which a condition does not hold."""
        return self.read - self.chosen

    def takes(self, row: Mapping[str, Any]) -> bool:
        """Whether all conditions hold in a row; true and 1 are different values, 1 and 1.0 are not.

        Raises:
            UserError: If the row lacks one of the columns.
        """
        self.read += 1
        taken = True
        for column, wanted in self._wanted:
            if column not in row:
                raise self._no_column(column, row)
            value = row[column]
            if isinstance(value, str | int | float) and _exact(value) in wanted:
                self._seen[column][_exact(value)] = None
            else:
                taken = False
                if len(self._others[column]) < _KEPT_VALUES:
                    self._others[column][_show(value)] = None
        self.chosen += taken
        if self.say is not None:
            self._tell(self.say)
        return taken

    @property
    def tired(self) -> bool:
        """Whether a sample has been looked for long enough."""
        return self.patience_seconds is not None and time.monotonic() > self._started + self.patience_seconds

    def _tell(self, say: Callable[[str], None]) -> None:
        now = time.monotonic()
        if self.read < self._next_rows and now < self._next_time:
            return
        self._next_rows, self._next_time = 2 * self.read, now + max(_QUIET_SECONDS, now - self._started)
        if self.chosen < _FEW * self.read:
            say(
                f"  {self.path}: {self.read:,} rows read, {self.chosen:,} of them where {self.where.describe()}; "
                "reading on (Ctrl-C stops)"
            )

    def unseen(self) -> list[tuple[str, Value]]:
        """Columns and values asked for that no row had so far."""
        return [
            (column, value)
            for column, wanted in self.where.conditions
            for value in wanted
            if _exact(value) not in self._seen[column]
        ]

    def unseen_lines(self) -> list[str]:
        """A line for each value that no row had so far; it may come later, or be misspelled."""
        return [
            f"no row of the {self.read:,} read has {_show(value)} in column {column!r}; {self.values(column)}"
            for column, value in self.unseen()
        ]

    def require_found(self, *, all_values: bool, cut: bool = False) -> None:
        """Checks, when the source has been read, that the conditions chose something.

        Args:
            all_values: Each value must have been seen, as there are no further rows.
            cut: There are further rows, which are not looked at.

        Raises:
            UserError: If no row was chosen, or a value was not seen that should have been.
        """
        unseen = self.unseen()
        if not self.read or (self.chosen and not (all_values and unseen)):
            return
        if not unseen:
            raise UserError.of(
                self.path,
                expected=f"rows where {self.where.describe()}",
                found=f"none of the {self._read_so_far(cut)} that has all of it at once",
                remedy="Change this source's `where:`",
            )
        column, value = unseen[0]
        raise UserError.of(
            self.path,
            expected=f"rows where {escaped(column)} is {_show(value)}",
            found=f"none in {'the ' if cut else ''}{self._read_so_far(cut)}; {self.values(column)}",
            remedy=f"Change this source's `where:`{self._hint(column, value)}",
        )

    def _read_so_far(self, cut: bool) -> str:
        return f"first {self.read:,} rows (no more are looked at here)" if cut else f"{self.read:,} rows"

    def values(self, column: str) -> str:
        """The values that were seen in a column, in words."""
        seen = [*(_show(value) for _, value in self._seen[column]), *self._others[column]]
        return f"they have {', '.join(seen[:_SHOWN_VALUES])}" + (" and others" if len(seen) > _SHOWN_VALUES else "")

    def _hint(self, column: str, value: Value) -> str:
        others = list(self._others[column])
        if isinstance(value, str) and value in others:
            return "; there it is no text: write it without quotes"
        if not isinstance(value, str) and repr(str(value)) in others:
            return "; there it is text: write it in quotes"
        near = difflib.get_close_matches(_show(value), others, n=1, cutoff=0.8)
        return f"; it looks like {near[0]}" if near else ""

    def _no_column(self, column: str, row: Mapping[str, Any]) -> UserError:
        near = difflib.get_close_matches(column, list(map(str, row)), n=1)
        return UserError.of(
            self.path,
            expected=f"a column {column!r}, as its `where` says",
            found=f"columns {columns.names(row)}",
            remedy="Name one of them in this source's `where:`" + (f"; it looks like {near[0]!r}" if near else ""),
        )


def _exact(value: Value) -> tuple[bool, Value]:
    return isinstance(value, bool), value


def _show(value: Any) -> str:
    """A value as a recipe would have it; of what can be no value there, the kind."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "nothing"
    if isinstance(value, str):
        text = value if len(value) <= _VALUE_CHARACTERS else value[:_VALUE_CHARACTERS] + "…"
        return repr(escaped(text))
    return str(value) if isinstance(value, int | float) else columns.kind(value)
