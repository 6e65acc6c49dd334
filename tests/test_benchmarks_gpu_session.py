"""The GPU benchmark on a machine that is only lent: no git, libraries on PYTHONPATH, time that ends, a small disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_benchmarks_gpu import FOLDER, load
from test_benchmarks_gpu_run import call, execute, executing, plan, run, script, shows, with_fakes
from test_benchmarks_gpu_run import results as good_results

fold_job = load("fold_job")
sys.path.insert(0, str(FOLDER / "peers"))
try:
    environments = load("environments")
finally:
    sys.path.remove(str(FOLDER / "peers"))
SLOW = "import time\ntime.sleep(60)"


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return with_fakes(tmp_path, monkeypatch)


def test_jobs_find_the_libraries_that_the_caller_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere/site")
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        environ = run.environ_of(SimpleNamespace(device=device))
        assert environ["PYTHONPATH"].split(os.pathsep) == [str(FOLDER.parents[1]), "/elsewhere/site"]
    monkeypatch.delenv("PYTHONPATH")
    assert run.environ_of(SimpleNamespace(device="cpu"))["PYTHONPATH"] == str(FOLDER.parents[1])


def test_peers_of_another_environment_do_not_see_them(
    faked: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere/site")
    seen = script(tmp_path, "import os\nprint(json.dumps({'path': os.environ['PYTHONPATH']}))", "seen.py")
    options = SimpleNamespace(device="cpu", minutes=1, work=tmp_path, results=tmp_path / "r.json", any_commit=False,
                              commit="none", allow_dirty=True)  # fmt: skip
    session = faked.Session(options)
    assert session.execute(sys.executable, seen, {}, 60, foreign=True)["path"] == str(FOLDER.parents[1])
    assert session.execute(sys.executable, seen, {}, 60)["path"].endswith("/elsewhere/site")


def wheel(folder: Path, name: str) -> None:
    """A wheel of one module."""
    folder.mkdir(parents=True)
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")


def test_peers_from_wheels_have_the_libraries_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(tmp_path / "wheels" / "unsloth", "onlyhere")
    (tmp_path / "callers").mkdir()
    (tmp_path / "callers" / "there.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "callers"))
    monkeypatch.setitem(environments.IMPORTS, "unsloth", "import onlyhere, there, pytest")
    python = environments.python_for("unsloth", tmp_path / "a b", tmp_path / "wheels")
    assert python == tmp_path / "a b" / "envs" / "unsloth" / "bin" / "python", python
    assert environments.python_for("unsloth", tmp_path / "a b", tmp_path / "wheels") == python  # as it is
    said = environments.python_for("axolotl", tmp_path / "a b", tmp_path / "wheels")
    assert said == f"axolotl could not be installed: {tmp_path}/wheels/axolotl: expected wheels, found none"


def test_without_git_the_commit_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = {"commit": None, "dirty": None, "versions": {}}
    monkeypatch.setattr(run, "environment", lambda device, threads: dict(bare))
    options = SimpleNamespace(device="cpu", commit="abc", allow_dirty=False)
    found = run.provenance(options)
    assert (found["commit"], found["dirty"]) == ("abc", False)
    options.commit = None
    with pytest.raises(SystemExit, match="expected a git checkout, or --commit"):
        run.provenance(options)


def test_what_the_end_of_the_time_cuts_off_is_not_a_failure(
    faked: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    really = faked.execute

    def execute_late(python: str, path: Path, *given: Any, **named: Any) -> Any:
        if path.name == "fold.py":
            raise faked.Failed("not done", "its log", late=True)
        return really(python, path, *given, **named)

    monkeypatch.setattr(faked, "execute", execute_late)
    monkeypatch.setattr(faked, "jobs", lambda shapes, ways: [plan.Job("fold tiny", "fold", 1, "tiny", {}, 20.0)])
    values = call(faked, monkeypatch, tmp_path / "work", "--minutes", "0.9")  # less than the minute that it might take
    assert values["jobs"] == {}
    assert "the time that was given was over" in values["skipped"]["fold tiny"]
    assert (tmp_path / "work" / "inputs" / "tiny").exists()  # for the next call
    values = call(faked, monkeypatch, tmp_path / "work", "--minutes", "5")
    assert values["jobs"]["fold tiny"]["error"] == "not done"
    assert values["skipped"] == {}


def test_a_job_is_done_in_place_of_one_that_failed(
    faked: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    first, other = plan.Job("one", "branch", 1, "tiny", {}, 1.0), plan.Job("fold tiny", "fold", 1, "tiny", {}, 1.0)
    todo = [first, other, plan.Job("less", "fold", 1, "tiny", {"n": 1}, 1.0, instead_of="one"),
            plan.Job("never", "fold", 1, "tiny", {"n": 2}, 1.0, instead_of="fold tiny")]  # fmt: skip
    monkeypatch.setattr(faked, "jobs", lambda shapes, ways: todo)
    values = call(faked, monkeypatch, tmp_path / "work")
    assert list(values["jobs"]) == ["one", "fold tiny", "less"]
    assert "Traceback" not in values["jobs"]["one"]["log"]
    assert "out of memory" in values["jobs"]["one"]["log"]
    assert values["jobs"]["less"]["commit"]


def test_a_model_that_cannot_be_made_fails_no_job(
    faked: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script(tmp_path, "sys.exit('no space left')", "inputs.py")
    values = call(faked, monkeypatch, tmp_path / "work")
    assert values["jobs"] == {}
    assert values["skipped"]["fold tiny"] == "its model could not be made: exit status 1; no space left"
    assert capsys.readouterr().out.count("failed: the model tiny") == 1  # not tried again by every job


def test_the_other_models_make_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = SimpleNamespace(free=0.0)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: disk)
    session = SimpleNamespace(options=SimpleNamespace(work=tmp_path))
    (job,) = [one for one in plan.jobs(["llama-3.1-8b"], []) if one.kind == "fold"]
    folders = [run.folder_of(shape, tmp_path) for shape in ("qwen3-4b", "llama-3.1-8b")]
    for disk.free, left in ((60e9, [True, True]), (30e9, [False, True])):
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "made.json").touch()
        run.make_room(session, job)
        assert [folder.exists() for folder in folders] == left
    shutil.rmtree(folders[1])
    assert 2 * 16.1 + 17.4 < 52  # what run.py says of the disk


def test_a_result_counts_whatever_comes_after_it(tmp_path: Path) -> None:
    found = execute(script(tmp_path, "print(json.dumps({'x': 1}))\nsys.exit(3)"))
    assert (found["x"], found["exit_status"]) == (1, 3)
    started = time.perf_counter()
    found = execute(script(tmp_path, "import time\nprint(json.dumps({'x': 2}), flush=True)\ntime.sleep(60)"), seconds=2)
    assert found["x"] == 2
    assert time.perf_counter() - started < 30


def test_a_failure_says_how_and_keeps_its_log(tmp_path: Path) -> None:
    with pytest.raises(executing.Failed, match="exit status 1; ValueError: wrong") as caught:
        execute(script(tmp_path, "raise ValueError('wrong')"))
    assert "Traceback" in caught.value.log
    assert not caught.value.late
    with pytest.raises(executing.Failed, match="not done after 1 s") as caught:
        execute(script(tmp_path, SLOW), seconds=1)
    assert caught.value.late


def test_a_second_model_goes_to_memory_where_the_disk_is_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fold_job, "MEMORY", tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    assert fold_job.place_for(1000, work) == work
    monkeypatch.setattr(
        fold_job.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 if path == work else 1 << 40)
    )
    place = fold_job.place_for(1000, work)
    assert place.parent == tmp_path
    assert fold_job._in_memory == [place]


LEAST = "branch llama-3.1-8b, length 2048, 12 GB, one row at a time"


@pytest.mark.parametrize("peak_gib", [10.4, 11.9])
def test_what_fits_with_one_row_fits(peak_gib: float) -> None:
    values: dict[str, Any] = good_results()
    name = "branch llama-3.1-8b, length 2048, 12 GB"
    values["jobs"][LEAST] = json.loads(json.dumps(values["jobs"][name]))
    values["jobs"][LEAST]["result"]["memory"]["peak_driver_bytes"] = round(peak_gib * 2**30)
    values["jobs"][name] = {"kind": "branch", "error": "out of memory"}
    claim = shows.must_show(values)[0]
    assert claim["verdict"] == ("PASS" if peak_gib < 11.2 else "FAIL")
    assert claim["figures"].endswith("one row at a time; with what check --fit chooses: out of memory")


@pytest.mark.slow
def test_all_of_it_on_a_cpu(tmp_path: Path) -> None:
    """As its own text says that one tries it; then again, which finds all done."""
    command = [sys.executable, str(FOLDER / "run.py"), "--device", "cpu", "--shapes", "tiny", "--allow-dirty"]
    command += ["--commit", "none", "--ways", "ours,trl-best,trl-best-fp32,trl-defaults", "--work", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values = json.loads((tmp_path / "trial.json").read_text())
    assert len(values["jobs"]) == 8
    assert all("result" in one for one in values["jobs"].values()), said
    assert values["overhead"]["share"] > 0
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "minutes left" not in again
