"""The results file: written whole after every job, and read again by a run that goes on."""

from __future__ import annotations

import datetime
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

    def __init__(self, path: Path, provenance: Mapping[str, Any]) -> None:
        """Opens the results of this commit, or begins anew where there are none or those of another.

        Args:
            path: The JSON file.
            provenance: What is to be recorded of code and machine.
        """
        self.path = path
        self.values: dict[str, Any] = {"provenance": dict(provenance), "machine": None, "jobs": {}, "skipped": {}}
        if path.exists():
            before = read_json(path)
            if _same_code(before["provenance"], provenance):
                self.values = {**before, "provenance": dict(provenance), "skipped": {}}

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
        """Notes what came of a job: {"result"} or {"error"}, and "card"."""
        kept = {"key": key_of(job, device), "kind": job.kind, "way": job.way, "settings": job.settings, **entry}
        self.values["jobs"][job.name] = kept
        self.save()

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


def _same_code(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(name) == other.get(name) for name in ("commit", "dirty", "versions"))
