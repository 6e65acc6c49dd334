"""At which commits a run reads the Hub: looked up once, then kept in the run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from bam_lora.errors import UserError
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

    def moved(self, text: str) -> str | None:
        """Where what a message begins with is not any more what it was when the run saw it first, a line on that."""
        for known, commit in self._known:
            if text.startswith(known.name) and (now := _newest(known)) not in (None, commit):
                there = f"The run reads it at commit {commit[:12]}, as it first found it; it is at {str(now)[:12]} now"
                return f"{there}: delete {self._path} to take that."
        return None

    def put(self, wanted: Repository, commit: str) -> None:
        """Keeps a commit."""
        if not self._enter:
            return
        self._known.append((wanted, commit))
        listed = [{**vars(known), "commit": commit} for known, commit in self._known]
        write_record(self._path, "hub", {"format": 1, "repositories": listed})


def _newest(wanted: Repository) -> str | None:
    """The commit that a revision is now, whatever is pinned; None if the Hub does not say."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    file = "README.md" if wanted.kind == "dataset" else "config.json"
    try:
        url = hf_hub_url(wanted.name, file, repo_type=wanted.kind, revision=wanted.revision)
        commit: str | None = get_hf_file_metadata(url).commit_hash
        return commit
    except Exception:  # of no consequence: it is asked on the way to another error
        return None


PINS: ContextVar[Pins | None] = ContextVar("bam_lora_hub_pins", default=None)


@contextlib.contextmanager
def pinned(path: Path, *, enter: bool = True) -> Iterator[None]:
    """Reads every repository at the commit that the record at `path` has, or enters it there.

    Raises:
        UserError: That of what is done in it; of a repository that has moved on since, with what to do to follow it, as
            long as nothing is planned.
    """
    pins = Pins(path, enter=enter)
    token = PINS.set(pins)
    try:
        yield
    except UserError as error:
        planned = (path.parent / "plan.json").exists()
        if planned or (moved := pins.moved(str(error))) is None:
            raise
        raise UserError(f"{error} {moved}") from error
    finally:
        PINS.reset(token)
