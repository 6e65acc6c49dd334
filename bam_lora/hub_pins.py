"""At which commits a run reads the Hub: looked up once, then kept in the run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from bam_lora.hub_errors import Repository
from bam_lora.store import read_record, write_record


class Pins:
    """The commits that a run reads repositories at, in a record of its own; looked up once, then kept."""

    def __init__(self, path: Path, *, enter: bool) -> None:
        self._path, self._enter = path, enter
        record = read_record(path, "hub") or {"repositories": []}
        self._known = [(Repository(r["name"], r["revision"], r["kind"]), r["commit"]) for r in record["repositories"]]

    def get(self, wanted: Repository) -> str | None:
        """The commit that was read before."""
        return next((commit for known, commit in self._known if known == wanted), None)

    def put(self, wanted: Repository, commit: str) -> None:
        """Keeps a commit."""
        if not self._enter:
            return
        self._known.append((wanted, commit))
        listed = [{**vars(known), "commit": commit} for known, commit in self._known]
        write_record(self._path, "hub", {"format": 1, "repositories": listed})


PINS: ContextVar[Pins | None] = ContextVar("bam_lora_hub_pins", default=None)


@contextlib.contextmanager
def pinned(path: Path, *, enter: bool = True) -> Iterator[None]:
    """Reads every repository at the commit that the record at `path` has, or enters it there."""
    token = PINS.set(Pins(path, enter=enter))
    try:
        yield
    finally:
        PINS.reset(token)
