"""The GPU benchmark: does an 8 B model fit a consumer card, and how fast is it, beside TRL, unsloth and axolotl?

    python benchmarks/gpu/run.py [--minutes 30] [--shapes llama-3.1-8b,...] [--ways ours,trl-best,...] [--work DIR]

Does everything, the most important first, as far as the time goes: a job that by its estimate does not fit into what is
left is passed over. Results are written after every job; one that fails is recorded with its message, and the next one
follows. The same command on the same commit goes on from there, also on another machine of the same kind that has only
the file of results. Models are made here, of random weights, and deleted when no job needs them any more; those of jobs
that were passed over stay for the next call. 52 GB of disk suffice, 36 GB where /dev/shm has 17 GB. To try it all on a
CPU in minutes: `--device cpu --shapes tiny`.
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
UNPACK_SECONDS = 40.0  # the same, from wheels
_MACHINE_SECONDS = 300.0
_DISK_BYTES = {"cuda": 2 << 30, "cpu": 16 << 20}
_LEAST_SECONDS = 20.0  # that a job gets, even if what was given is over
_DISK_GB_PER_SECOND = 1.0  # until it is measured


class NoTimeLeft(Exception):
    """A job was ended because the time that was given is over, not because it took too long."""


class Session:
    """One call of the script: its options, its time, its results."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ends: float = time.monotonic() + 60 * options.minutes
        self.record = Record(options.results, provenance(options), any_code=options.any_commit)
        self.environ = environ_of(options)
        self.broken: dict[str, str] = {}  # shapes whose inputs could not be made, and why

    @property
    def seconds_left(self) -> float:
        """Of the time that was given."""
        return self.ends - time.monotonic()

    def execute(
        self, python: str, script: Path, settings: dict[str, Any], seconds: float, *, foreign: bool = False
    ) -> dict[str, Any]:
        """A job's result, within three times what it is thought to take and what is left.

        Args:
            python: The interpreter.
            script: The job.
            settings: What it is given.
            seconds: It is thought to take.
            foreign: The interpreter is of another environment, which shall not see the libraries of this one.

        Raises:
            Failed: If it gives no result.
            NoTimeLeft: If what was left is the reason.
        """
        allowed, left = 3 * seconds, max(_LEAST_SECONDS, self.seconds_left)
        environ = {**self.environ, **({"PYTHONPATH": str(ROOT)} if foreign else {})}
        try:
            return execute(python, script, settings, self.options.work, seconds=min(allowed, left), environ=environ)
        except Failed as error:
            if error.late and left < allowed:
                raise NoTimeLeft(f"the time that was given was over after {left:.0f} s of it") from None
            raise

    def writing_seconds(self, written_gb: float) -> float:
        """About what it takes to write so much, by the disk's speed as it was measured."""
        machine = self.record.values["machine"]
        return written_gb / (machine["write_bytes_per_second"] / 1e9 if machine else _DISK_GB_PER_SECOND)


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
    for job in todo:
        needed = job.instead_of is None or session.record.has_failed(job.instead_of)
        if needed and not session.record.is_done(job, options.device, retry=options.retry):
            attempt(session, job)
        if not options.keep:
            drop_inputs(session, job.shape, todo)
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
    parser.add_argument(
        "--any-commit", action="store_true", help="go on from results of other code; each job names its"
    )
    parser.add_argument("--wheels", type=Path, default=None, help="folder with unsloth/*.whl, axolotl/*.whl: no index")
    parser.add_argument("--keep", action="store_true", help="the models, when no job needs them any more")
    parser.add_argument("--commit", default=None, help="that the code is of, where the tree is no git checkout")
    parser.add_argument("--allow-dirty", action="store_true", help="measure a tree with uncommitted changes")
    options = parser.parse_args()
    options.work, options.wheels = options.work.resolve(), options.wheels and options.wheels.resolve()
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
    facts = environment(options.device, threads)
    if facts["commit"] is not None:
        facts = provenance_of(command, threads, allow_dirty=options.allow_dirty, device=options.device)
    elif options.commit is None:  # a copy of a checkout, on a machine that is only lent, or one without git
        sys.exit(f"error: {ROOT}: expected a git checkout, or --commit to say of which it is a copy; found neither")
    else:
        facts |= {"command": command, "commit": options.commit, "dirty": False}
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
    except (Failed, NoTimeLeft) as error:
        log = getattr(error, "log", "")
        sys.exit(f"{log}\nerror: the machine: expected a {device} device that works, found {error}")


def attempt(session: Session, job: Job) -> None:
    """Does a job and records what came of it, or passes it over."""
    seconds = job.seconds + session.writing_seconds(job.written_gb)
    needed = seconds + preparing_seconds(session, job)
    if needed > session.seconds_left:
        session.record.skip(job, f"takes about {needed:.0f} s, {max(0.0, session.seconds_left):.0f} s were left")
        print(f"skipped: {job.name}", flush=True)
        return
    print(f"{session.seconds_left / 60:.1f} minutes left: {job.name}", flush=True)
    started, card = time.perf_counter(), Card(job.card_gib, session.options.device)
    entry: dict[str, Any]
    try:
        if why := make_inputs(session, job):
            session.record.skip(job, why)
            return
        python = python_of(session, job)
        with card:
            foreign = job.way in OWN_ENVIRONMENTS and session.options.wheels is None
            result = session.execute(python, SCRIPTS[job.kind], settings_of(session, job), seconds, foreign=foreign)
        entry = {"result": result}
    except NoTimeLeft as error:
        session.record.skip(job, str(error))
        print(f"skipped: {job.name}: {error}", flush=True)
        return
    except (Failed, CannotHold) as error:
        entry = {"error": str(error), "log": getattr(error, "log", "")}
        print(f"failed: {error}", flush=True)
    session.record.done(
        job, session.options.device, {**entry, "card": card.facts, "seconds": time.perf_counter() - started}
    )


def preparing_seconds(session: Session, job: Job) -> float:
    """About what it takes until the job itself can begin."""
    work = session.options.work
    scale = SCALES[job.shape]
    seconds = 0.0 if is_made(job.shape, work) else scale.input_seconds + session.writing_seconds(scale.input_gb)
    installing = INSTALL_SECONDS if session.options.wheels is None else UNPACK_SECONDS
    return seconds + (installing if job.way and not is_ready(job.way, work) else 0.0)


def make_inputs(session: Session, job: Job) -> str | None:
    """Has the model and its text made, unless they are there; returns why that failed, which is no failure of a job."""
    options, scale = session.options, SCALES[job.shape]
    make_room(session, job)
    if is_made(job.shape, options.work):
        return None
    if job.shape in session.broken:
        return session.broken[job.shape]
    settings = {"shape": job.shape, "work": str(options.work), "device": options.device,
                "text_tokens": scale.text_tokens}  # fmt: skip
    seconds = scale.input_seconds + session.writing_seconds(scale.input_gb)
    try:
        facts = session.execute(sys.executable, HERE / "inputs.py", settings, seconds)
    except Failed as error:
        print(f"failed: the model {job.shape}: {error}\n{error.log}", flush=True)
        session.broken[job.shape] = f"its model could not be made: {error}"
        return session.broken[job.shape]
    session.record.values.setdefault("inputs", {})[job.shape] = facts
    return None


def python_of(session: Session, job: Job) -> str:
    """The interpreter of a job; raises `Failed` with the reason if a peer has none here."""
    if job.way not in OWN_ENVIRONMENTS:
        return sys.executable
    wheels = session.options.wheels
    settings = {"way": job.way, "work": str(session.options.work), "wheels": wheels and str(wheels)}
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


def drop_inputs(session: Session, shape: str, todo: list[Job]) -> None:
    """Deletes a model that no job needs, those passed over included: the next call does them."""
    device, retry = session.options.device, session.options.retry
    if not any(job.shape == shape and not session.record.is_done(job, device, retry=retry) for job in todo
               if job.instead_of is None):  # fmt: skip
        shutil.rmtree(folder_of(shape, session.options.work), ignore_errors=True)


def make_room(session: Session, job: Job) -> None:
    """Deletes the other models where the disk has no room for all; they are made again when a job needs them."""
    work, scale = session.options.work, SCALES[job.shape]
    needed_gb = min(job.written_gb, 2 * scale.base_gb) + (0.0 if is_made(job.shape, work) else scale.input_gb) + 1
    if shutil.disk_usage(work).free >= 1e9 * needed_gb:
        return
    for shape in SCALES:
        if shape != job.shape:
            shutil.rmtree(folder_of(shape, work), ignore_errors=True)


if __name__ == "__main__":
    main()
