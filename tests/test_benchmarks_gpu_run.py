"""The GPU benchmark's script: it goes on after failures and from its record, keeps to its time, says what holds."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_benchmarks_gpu import load

run, executing, record, shows = load("run"), load("executing"), load("record"), load("shows")
overhead, tables, plan = load("overhead"), load("tables"), load("plan")
MACHINE = {"name": "NVIDIA H200", "total_bytes": 150 << 30, "cuda": "13.0", "product_flops_per_second": 7e14,
           "stated_peak_flops_per_second": 989e12, "write_bytes_per_second": 1e9}  # fmt: skip
FAKES = {
    "machine_job.py": 'print(json.dumps({"name": "CPU", "product_flops_per_second": 1e12, '
    '"stated_peak_flops_per_second": None, "write_bytes_per_second": 1e9}))',
    "inputs.py": "folder = pathlib.Path(given['work']) / 'inputs' / given['shape']\n"
    "folder.mkdir(parents=True)\n(folder / 'made.json').write_text('{}')\nprint('{}')",
    "fails.py": "sys.exit('torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB')",
    "fold.py": 'print(json.dumps({"bytes": 1e9, "copy_seconds": 2.0, "device_seconds": 2.1, "cpu_seconds": 9.0, '
    '"device_over_copy": 1.05, "identical": 1.0, "different": 0, "elements": 5}))',
}


def branch(card: float, length: int, peak_gib: float, estimate_gib: float) -> dict[str, Any]:
    memory = {"peak_driver_bytes": round(peak_gib * 2**30), "peak_torch_bytes": 1, "stages": [
        {"name": name, "driver_bytes": 1} for name in tables._STAGES], "estimated_bytes": round(estimate_gib * 2**30),
        "estimated_components": [{"name": "GPU context", "bytes": 1}],
        "estimated_over_measured": estimate_gib / peak_gib}  # fmt: skip
    used = {"batch": 1, "accumulation": 8, "length": length, "checkpointing": True, "attention": "sdpa"}
    result = {"memory": memory, "effective": used, "flops_per_second": 2e14, "tokens_per_second": 6000.0,
              "load_seconds": 20.0}  # fmt: skip
    free = round((card - 0.8) * 2**30)
    return {"kind": "branch", "way": None, "result": result, "card": {"free_bytes": free, "card_gib": card}}


def speed(way: str, seconds: float, losses: list[float]) -> dict[str, Any]:
    steps = len(losses)
    result = {"way": way, "step_seconds": [9.0, 9.0] + [seconds] * (steps - 2), "tokens": [1000] * steps,
              "losses": losses, "checksums": list(range(steps)), "peak_driver_bytes": 1,
              "peak_torch_bytes": None}  # fmt: skip
    return {"kind": "speed", "way": way, "result": result, "card": {"free_bytes": None}}


def results() -> dict[str, Any]:
    """Of a GPU on which all holds."""
    curve = [11.5, 10.0, 9.0, 8.0]
    stages = {"load": 30.0, "merge": 2.0, "fold": 30.0, "train": 100.0, "data": 5.0, "evaluate": 20.0}
    whole = {"branches": [{}, {}], "seconds_by_stage": stages, "wall_seconds": 197.0, "setup_seconds": 2.0,
             "write_seconds": 1.0, "median_step_seconds": 2.0, "tokens_per_step": 16000, "load_seconds": 30.0,
             "evaluation": {"seconds": 9.0, "bytes": 4096},
             "memory": {"estimated_over_measured": 1.05, "peak_driver_bytes": 1}}  # fmt: skip
    fold = {"device_over_copy": 1.05, "identical": 0.99999, "different": 80_000, "elements": 8_000_000_000,
            "device_seconds": 21.0, "copy_seconds": 20.0, "cpu_seconds": 40.0, "bytes": 16e9}  # fmt: skip
    jobs = {
        "branch llama-3.1-8b, length 2048, 12 GB": branch(12, 2048, 10.0, 10.5),
        "branch llama-3.1-8b, length 8192, 24 GB": branch(24, 8192, 14.0, 13.0),
        "speed llama-3.1-8b, ours": speed("ours", 1.0, curve),
        "speed llama-3.1-8b, trl-best": speed("trl-best", 0.98, [one * 1.001 for one in curve]),
        "speed llama-3.1-8b, trl-best-fp32": speed("trl-best-fp32", 1.0, [one + 1e-5 for one in curve]),
        "speed llama-3.1-8b, trl-defaults": speed("trl-defaults", 4.0, curve),
        "fold llama-3.1-8b": {"kind": "fold", "way": None, "result": fold},
        "run llama-3.1-8b, 24 GB": {
            "kind": "run", "way": None, "result": whole, "settings": {"shape": "llama-3.1-8b"}
        },
    }  # fmt: skip
    values: dict[str, Any] = {
        "machine": MACHINE,
        "jobs": jobs,
        "skipped": {"branch x": "takes about 100 s, 9 s were left"},
    }
    values["overhead"] = overhead.overhead(values)
    values["must_show"] = shows.must_show(values)
    return values


def verdicts(values: dict[str, Any]) -> list[str]:
    return [one["verdict"] for one in shows.must_show({**values, "overhead": overhead.overhead(values)})]


def test_what_holds_passes_and_the_rest_is_not_measured() -> None:
    values = results()
    assert verdicts(values) == ["PASS"] * 3 + ["not measured"] + ["PASS"] * 7  # no unsloth
    figures = {one["claim"]: one["figures"] for one in values["must_show"]}
    assert figures["gain over TRL's defaults"] == "1,000 / 250 = 4.000"
    assert figures["tokens/s at least 0.97 of TRL's at its best"] == "1,000 / 1,020 = 0.980"
    assert verdicts({"machine": None, "jobs": {}}) == ["not measured"] * 11
    cpu = {name: value for name, value in MACHINE.items() if name != "total_bytes"}
    assert verdicts({**values, "machine": cpu}) == ["not measured"] * 11


@pytest.mark.parametrize(
    ("job", "path", "value", "failed"),
    [
        ("branch llama-3.1-8b, length 2048, 12 GB", "result.memory.peak_driver_bytes", 12 << 30, 0),
        ("branch llama-3.1-8b, length 2048, 12 GB", "card.free_bytes", 12 << 30, 0),
        ("branch llama-3.1-8b, length 8192, 24 GB", "result.effective.length", 4096, 1),
        ("speed llama-3.1-8b, ours", "result.step_seconds", [9.0, 9.0, 1.1, 1.1], 2),
        ("speed llama-3.1-8b, trl-defaults", "result.step_seconds", [9.0, 9.0, 0.9, 0.9], 4),
        ("speed llama-3.1-8b, trl-best-fp32", "result.checksums", [0, 1, 2, 4], 5),
        ("speed llama-3.1-8b, trl-best-fp32", "result.losses", [11.5, 10.0, 9.0, 8.1], 5),
        ("speed llama-3.1-8b, trl-best", "result.losses", [11.5, 10.0, 9.0, 9.0], 6),
        ("fold llama-3.1-8b", "result.device_over_copy", 1.2, 7),
        ("fold llama-3.1-8b", "result.identical", 0.9998, 8),
        ("branch llama-3.1-8b, length 8192, 24 GB", "result.memory.estimated_over_measured", 0.89, 9),
        ("run llama-3.1-8b, 24 GB", "result.memory.estimated_over_measured", 1.11, 9),
        ("run llama-3.1-8b, 24 GB", "result.setup_seconds", 70.0, 10),
    ],
)
def test_what_does_not_hold_fails(job: str, path: str, value: Any, failed: int) -> None:
    values = copy.deepcopy(results())
    place = values["jobs"][job]
    *sections, last = path.split(".")
    for section in sections:
        place = place[section]
    place[last] = value
    expected = ["PASS"] * 3 + ["not measured"] + ["PASS"] * 7
    expected[failed] = "FAIL"
    assert verdicts(values) == expected


def test_a_failed_job_is_a_failure_with_its_message() -> None:
    values = results()
    values["jobs"]["branch llama-3.1-8b, length 2048, 12 GB"] = {"kind": "branch", "error": "out of memory"}
    values["jobs"]["speed llama-3.1-8b, unsloth"] = {"kind": "speed", "way": "unsloth", "error": "no network"}
    found = shows.must_show(values)
    assert (found[0]["verdict"], found[0]["figures"]) == ("FAIL", "out of memory")
    assert (found[3]["verdict"], found[3]["figures"]) == ("not measured", "unsloth: no network")


def test_the_arithmetic_of_the_overhead() -> None:
    found = overhead.overhead(results())
    assert found["tokens_per_second"] == 8000
    assert found["plain_seconds"] == 2 * 10_000_000 / 8000
    assert found["per_iteration_seconds"]["rest of the run"] == 197 - 187
    assert found["added_seconds"] == 30 + 2 + 30 + 10 + 2 * (2 + 1)
    assert found["share"] == 78 / 2500
    assert found["share_beside_a_script"] == (78 - 33) / (2500 + 33)
    assert overhead.overhead({"jobs": {}}) is None


def test_tables_have_every_result() -> None:
    said = tables.tables(results())
    assert "| llama-3.1-8b, length 2048, 12 GB | 11.20 |" in said
    assert "| 6,000 | 200 | 20.2% | 28.6% | 20.0 |" in said
    assert "2 x 10,000,000 / 8,000 tokens/s = 2,500 s; 3.12%" in said
    assert "| run llama-3.1-8b, 24 GB | change of branch: an adapter written, a trainer set up | 3.00 |" in said
    assert "skipped: branch x: takes about 100 s, 9 s were left" in said


def script(folder: Path, code: str, name: str = "job.py") -> Path:
    path = folder / name
    path.write_text(f"import json, pathlib, sys\ngiven = json.loads(pathlib.Path(sys.argv[1]).read_text())\n{code}\n")
    return path


def execute(path: Path, seconds: float = 60) -> dict[str, Any]:
    result: dict[str, Any] = executing.execute(
        sys.executable, path, {"x": 3}, path.parent, seconds=seconds, environ=os.environ
    )
    return result


def test_the_last_line_of_a_job_is_its_result(tmp_path: Path) -> None:
    found = execute(script(tmp_path, "print('talk')\nprint(json.dumps({'x': given['x'] + 1}))"))
    assert found["x"] == 4
    assert found["wall_seconds"] > 0


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (FAKES["fails.py"], r"exit status 1; torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        ("print('no json')", r"its last line: expected JSON, found 'no json'"),
        ("print('[1]')", r"expected a JSON object, found '\[1\]'"),
        ("print('{\"loss\": NaN}')", r"NaN is no number"),
        ("pass", "it said nothing"),
    ],
)
def test_a_job_without_a_result_has_failed(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(executing.Failed, match=message):
        execute(script(tmp_path, code))


def test_a_job_ends_with_its_children_when_its_time_is_over(tmp_path: Path) -> None:
    code = (
        "import subprocess, time\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path(sys.argv[1]).with_name('pid').write_text(str(child.pid))\ntime.sleep(60)"
    )
    with pytest.raises(executing.Failed, match="not done after 3 s"):
        execute(script(tmp_path, code), seconds=3)
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("its child is still there")


@pytest.fixture
def faked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return with_fakes(tmp_path, monkeypatch)


def with_fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with jobs that take no time: branches fail, the fold gives numbers, the run says which it is."""
    for name, code in FAKES.items():
        script(tmp_path, code, name)
    count = "count = pathlib.Path(given['work']) / 'branches'\ncount.open('a').write('x')\n"
    script(tmp_path, count + FAKES["fails.py"], "fails.py")
    monkeypatch.setattr(run, "HERE", tmp_path)
    scripts = {"branch": tmp_path / "fails.py", "fold": tmp_path / "fold.py", "run": tmp_path / "fails.py"}
    monkeypatch.setattr(run, "SCRIPTS", scripts)
    return run


def call(faked: ModuleType, monkeypatch: pytest.MonkeyPatch, work: Path, *options: str) -> dict[str, Any]:
    given = ["--device", "cpu", "--shapes", "tiny", "--ways", "", "--work", str(work), "--allow-dirty"]
    given += ["--commit", "none"]  # where these tests are run from a copy without git
    monkeypatch.setattr(sys, "argv", ["run.py", *given, *options])
    faked.main()
    values: dict[str, Any] = json.loads((work / "trial.json").read_text())
    return values


def test_it_goes_on_after_failures_and_from_what_is_recorded(
    faked: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    values = call(faked, monkeypatch, work)
    names = ["branch tiny, length 32, 12 GB", "branch tiny, length 64, 24 GB", "fold tiny", "run tiny, 24 GB"]
    assert list(values["jobs"]) == names
    assert "CUDA out of memory. Tried to allocate 2.00 GiB" in values["jobs"][names[0]]["error"]
    assert values["jobs"]["fold tiny"]["result"]["identical"] == 1.0
    assert not (work / "inputs" / "tiny").exists()  # no job needs it any more
    assert "| fold tiny | 1.00 GB |" in capsys.readouterr().out

    again = call(faked, monkeypatch, work)
    assert again["jobs"] == values["jobs"]
    assert (work / "branches").read_text() == "xxx"  # the run fails by the same script
    call(faked, monkeypatch, work, "--retry")
    assert (work / "branches").read_text() == "xxxxxx"


def test_results_of_other_code_are_begun_anew(
    faked: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    call(faked, monkeypatch, work)
    before = json.loads((work / "trial.json").read_text())
    before["provenance"]["commit"] = "another"
    (work / "trial.json").write_text(json.dumps(before))
    call(faked, monkeypatch, work)
    assert (work / "branches").read_text() == "xxxxxx"
    assert json.loads((work / "trial.before-1.json").read_text()) == before
    call(faked, monkeypatch, work)
    (work / "trial.before-1.json").replace(work / "trial.json")
    assert call(faked, monkeypatch, work, "--any-commit")["jobs"] == before["jobs"]
    assert (work / "branches").read_text() == "xxxxxx"


def test_results_of_another_gpu_are_left_alone(
    faked: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    before = call(faked, monkeypatch, work, "--minutes", "0.1")
    before["machine"]["name"] = "NVIDIA H200"
    (work / "trial.json").write_text(json.dumps(before))
    with pytest.raises(SystemExit, match=r"expected results of CPU, found those of NVIDIA H200; name another file"):
        call(faked, monkeypatch, work)
    assert json.loads((work / "trial.json").read_text()) == before


def test_what_does_not_fit_into_the_time_is_passed_over(
    faked: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = call(faked, monkeypatch, tmp_path / "work", "--minutes", "0.5")
    assert values["jobs"] == {}  # 30 s each, and 20 s for the model
    assert "takes about 50 s, " in values["skipped"]["fold tiny"]
    values = call(faked, monkeypatch, tmp_path / "work", "--minutes", "0.95")  # 57 s
    assert list(values["skipped"]) == ["run tiny, 24 GB"]
    assert "fold tiny" in values["jobs"]
