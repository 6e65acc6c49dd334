"""The results file: written whole after every job, and read again by a run that goes on."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overhead import overhead
from plan import Job
from shows import must_show

from bam_lora.store import digest, read_json, write_json


class OtherMachine(Exception):
    """Results of one GPU are not gone on with on another; the message is one line."""


class Record:
    """What is known so far.

    Attributes:
        path: The JSON file.
        values: What it holds: provenance, machine, jobs by name, skipped jobs by name, what must be shown.
    """

    def __init__(self, path: Path, provenance: Mapping[str, Any], *, any_code: bool = False) -> None:
        """Opens the results of this commit, or begins anew where there are none or those of another, which are kept.

        Args:
            path: The JSON file. Results of other code are moved to a file beside it, whose name says `before`.
            provenance: What is to be recorded of code and machine.
            any_code: Go on from results of other code, too: what is done stays done. Every job says what code it is of.
        """
        self.path = path
        self.values: dict[str, Any] = {"provenance": dict(provenance), "machine": None, "jobs": {}, "skipped": {}}
        if path.exists():
            before = read_json(path)
            if any_code or _same_code(before["provenance"], provenance):
                self.values = {**before, "provenance": dict(provenance), "skipped": {}}
            else:
                path.replace(_unused(path))

    def is_done(self, job: Job, device: str, *, retry: bool) -> bool:
        """Whether a job with these settings has a result; a failure counts as one unless it is to be tried again."""
        known = self.values["jobs"].get(job.name)
        return known is not None and known["key"] == key_of(job, device) and not (retry and "error" in known)

    def machine(self, facts: Mapping[str, Any]) -> None:
        """Notes the machine.

        Raises:
            OtherMachine: If the results are another one's.
        """
        before = self.values["machine"]
        if before is not None and before["name"] != facts["name"]:
            raise OtherMachine(f"{self.path}: expected results of {facts['name']}, found those of {before['name']}")
        self.values["machine"] = dict(facts)
        self.save()

    def done(self, job: Job, device: str, entry: Mapping[str, Any]) -> None:
        """Notes what came of a job: {"result"} or {"error", "log"}, and "card"."""
        code = {name: self.values["provenance"].get(name) for name in ("commit", "dirty")}
        kept = {"key": key_of(job, device), "kind": job.kind, "way": job.way, "settings": job.settings, **code, **entry}
        self.values["jobs"][job.name] = kept
        self.save()

    def has_failed(self, name: str) -> bool:
        """Whether a job was tried and gave no result."""
        return "error" in self.values["jobs"].get(name, {})

    def skip(self, job: Job, reason: str) -> None:
        """Notes that a job was passed over."""
        self.values["skipped"][job.name] = reason
        self.save()

    def save(self) -> None:
        """Writes all of it, with what follows from it."""
        self.values["overhead"] = overhead(self.values)
        self.values["must_show"] = must_show(self.values)
        self.values["written"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.values)


def key_of(job: Job, device: str) -> str:
    """What a job's result is a function of, code and machine aside."""
    key: str = digest([job.kind, job.settings, job.card_gib, device])
    return key


def _unused(path: Path) -> Path:
    """A name beside it that no file has."""
    names = (path.with_suffix(f".before-{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _same_code(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(name) == other.get(name) for name in ("commit", "dirty", "versions"))
