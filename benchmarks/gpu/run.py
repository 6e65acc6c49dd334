"""The GPU benchmark: does an 8 B model fit a consumer card, and how fast is it, beside TRL, unsloth and axolotl?

    python benchmarks/gpu/run.py [--minutes 30] [--shapes llama-3.1-8b,...] [--ways ours,trl-best,...] [--work DIR]

Does everything, the most important first, as far as the time goes: a job that by its estimate does not fit into what is
left is passed over. Results are written after every job; one that fails is recorded with its message, and the next one
follows. The same command on the same commit goes on from there. Models are made here, of random weights, and deleted
when no job needs them any more: 64 GB of disk suffice. To try it all on a CPU in minutes: `--device cpu --shapes tiny`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for common/, as scripts are run by path
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # this tree's bam_lora, which need not be installed
from common.provenance import ROOT, provenance_of
from executing import Failed, execute
from holding import CannotHold, Card
from inputs_place import folder_of, is_made
from peer_python import OWN_ENVIRONMENTS, PEERS, is_ready
from plan import SCALES, WAYS, Job, jobs
from record import OtherMachine, Record
from tables import tables

from bam_lora.machine import environment

HERE = Path(__file__).resolve().parent
SCRIPTS = {"branch": HERE / "branch_job.py", "fold": HERE / "fold_job.py", "run": HERE / "run_job.py",
           "speed": PEERS / "job.py"}  # fmt: skip
INSTALL_SECONDS = 300.0  # of a peer's environment, about
_MACHINE_SECONDS = 300.0
_DISK_BYTES = {"cuda": 2 << 30, "cpu": 16 << 20}


class Session:
    """One call of the script: its options, its time, its results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.record = Record(options.results, provenance(options))
        self.ends: float = time.monotonic() + 60 * options.minutes
        self.environ = environ_of(options)

    @property
    def seconds_left(self) -> float:
        """Of the time that was given."""
        return self.ends - time.monotonic()

    def execute(self, python: str, script: Path, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
        """A job's result, within three times what it is thought to take and what is left."""
        limit = max(60.0, min(3 * seconds, self.seconds_left))
        return execute(python, script, settings, self.options.work, seconds=limit, environ=self.environ)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that jobs and holders end, too
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    session = Session(options)
    try:
        session.record.machine(machine_facts(session))
    except OtherMachine as error:
        sys.exit(f"error: {error}; name another file with --results")
    todo = jobs(options.shapes, options.ways)
    for number, job in enumerate(todo):
        if not session.record.is_done(job, options.device, retry=options.retry):
            attempt(session, job)
        if not options.keep:
            drop_inputs(session, job.shape, todo[number + 1 :])
    print(tables(session.record.values), options.results, sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [name for name in SCALES if name != "tiny"]
    parser.add_argument("--minutes", type=float, default=30.0, help="time for all jobs together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", default=",".join(shapes), help=f"of {', '.join(SCALES)}, with commas between")
    parser.add_argument("--ways", default=",".join(WAYS), help="whose speed is measured; '' for nobody's")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu", help="models, environments, outputs")
    parser.add_argument("--results", type=Path, default=None, help="the JSON file; none: results/DATE-COMMIT.json")
    parser.add_argument("--retry", action="store_true", help="jobs that have failed, too")
    parser.add_argument("--keep", action="store_true", help="the models, when no job needs them any more")
    parser.add_argument("--commit", default=None, help="that the code is of, where the tree is no git checkout")
    parser.add_argument("--allow-dirty", action="store_true", help="measure a tree with uncommitted changes")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.shapes, options.ways = (
        [name for name in value.split(",") if name] for value in (options.shapes, options.ways)
    )
    for name, given, known in (("--shapes", options.shapes, SCALES), ("--ways", options.ways, WAYS)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"{name}: expected some of {', '.join(known)}, found {', '.join(unknown)}")
    if options.results is None:
        options.results = results_file(options)
    return options


def results_file(options: argparse.Namespace) -> Path:
    """Where the results of this commit are, or will be; what was only tried is not among the recorded."""
    if options.device == "cpu":
        return Path(options.work) / "trial.json"
    commit = (options.commit or environment("cuda", 1)["commit"] or "unknown")[:12]
    before = sorted((HERE / "results").glob(f"*-{commit}.json"))
    return before[-1] if before else HERE / "results" / f"{datetime.date.today().isoformat()}-{commit}.json"


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    command, threads = "make bench-gpu", len(os.sched_getaffinity(0))
    if (ROOT / ".git").exists():
        facts = provenance_of(command, threads, allow_dirty=options.allow_dirty, device=options.device)
    elif options.commit is None:  # a copy of a checkout, on a machine that is only lent
        sys.exit(f"error: {ROOT}: expected a git checkout, or --commit to say of which it is a copy; found neither")
    else:
        facts = {**environment(options.device, threads), "command": command, "commit": options.commit, "dirty": False}
    return {**facts, "load": os.getloadavg()}


def environ_of(options: argparse.Namespace) -> dict[str, str]:
    """The jobs' environment: one GPU, numbered as NVML does, or none; this tree's package; nothing from the Hub."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if options.device == "cpu":
        return {**os.environ, **given, "CUDA_VISIBLE_DEVICES": ""}
    one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    os.environ |= {"CUDA_VISIBLE_DEVICES": one, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # the holder's, too
    return {**os.environ, **given}


def machine_facts(session: Session) -> dict[str, Any]:
    device = session.options.device
    settings = {"device": device, "work": str(session.options.work), "disk_bytes": _DISK_BYTES[device]}
    try:
        return session.execute(sys.executable, HERE / "machine_job.py", settings, _MACHINE_SECONDS)
    except Failed as error:
        sys.exit(f"error: the machine: expected a {device} device that works, found {error}")


def attempt(session: Session, job: Job) -> None:
    """Does a job and records what came of it, or passes it over."""
    needed = job.seconds + preparing_seconds(session, job)
    if needed > session.seconds_left:
        session.record.skip(job, f"takes about {needed:.0f} s, {max(0.0, session.seconds_left):.0f} s were left")
        print(f"skipped: {job.name}", flush=True)
        return
    print(f"{session.seconds_left / 60:.1f} minutes left: {job.name}", flush=True)
    started, card = time.perf_counter(), Card(job.card_gib, session.options.device)
    entry: dict[str, Any]
    try:
        make_inputs(session, job)
        python = python_of(session, job)
        with card:
            entry = {"result": session.execute(python, SCRIPTS[job.kind], settings_of(session, job), job.seconds)}
    except (Failed, CannotHold) as error:
        entry = {"error": str(error)}
        print(f"failed: {error}", flush=True)
    session.record.done(
        job, session.options.device, {**entry, "card": card.facts, "seconds": time.perf_counter() - started}
    )


def preparing_seconds(session: Session, job: Job) -> float:
    """About what it takes until the job itself can begin."""
    work = session.options.work
    seconds = 0.0 if is_made(job.shape, work) else SCALES[job.shape].input_seconds
    return seconds + (INSTALL_SECONDS if job.way and not is_ready(job.way, work) else 0.0)


def make_inputs(session: Session, job: Job) -> None:
    """Has the model and its text made, unless they are there."""
    options, scale = session.options, SCALES[job.shape]
    if is_made(job.shape, options.work):
        return
    settings = {"shape": job.shape, "work": str(options.work), "device": options.device,
                "text_tokens": scale.text_tokens}  # fmt: skip
    facts = session.execute(sys.executable, HERE / "inputs.py", settings, scale.input_seconds)
    session.record.values.setdefault("inputs", {})[job.shape] = facts


def python_of(session: Session, job: Job) -> str:
    """The interpreter of a job; raises `Failed` with the reason if a peer has none here."""
    if job.way not in OWN_ENVIRONMENTS:
        return sys.executable
    settings = {"way": job.way, "work": str(session.options.work)}
    found = session.execute(sys.executable, HERE / "peer_python.py", settings, INSTALL_SECONDS)
    if found["python"] is None:
        raise Failed(found["reason"])
    return str(found["python"])


def settings_of(session: Session, job: Job) -> dict[str, Any]:
    """What the job's script is given."""
    options = session.options
    if job.kind != "speed":
        return {**job.settings, "work": str(options.work), "device": options.device}
    root = folder_of(job.shape, options.work)
    return {**job.settings, "base": str(root / "base"), "text": str(root / "text.jsonl"), "device": options.device}


def drop_inputs(session: Session, shape: str, rest: list[Job]) -> None:
    """Deletes a model that no later job needs."""
    device, retry = session.options.device, session.options.retry
    if not any(job.shape == shape and not session.record.is_done(job, device, retry=retry) for job in rest):
        shutil.rmtree(folder_of(shape, session.options.work), ignore_errors=True)


if __name__ == "__main__":
    main()
