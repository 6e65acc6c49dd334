"""`bam-lora doctor`: what it finds here, and what it would find on machines that are not."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_fixtures import PatchedHub
from typer.testing import CliRunner

from bam_lora import check_machine, doctor, doctor_device, doctor_disk, doctor_hub, doctor_software
from bam_lora.cli import app
from bam_lora.doctor_finding import NOTE, OK, PROBLEM, Finding, gigabytes


def only(findings: Iterator[Finding], name: str = "") -> Finding:
    (found,) = [one for one in findings if one.name == name or not name]
    return found


def test_this_machine_has_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret0123456789")
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    problems = [one for one in found["checks"] if one["status"] == "problem"]
    assert (found["format"], found["ok"], result.exit_code, problems) == (1, True, 0, [])
    by_name = {one["name"]: one for one in found["checks"]}
    assert by_name["4-bit"]["status"] == "ok"
    assert f"torch {metadata.version('torch')}" in by_name["packages"]["text"]
    assert by_name["token"]["text"] == "found in HF_TOKEN"
    assert "HF_HUB_OFFLINE" in by_name["hub"]["text"]
    assert "hf_secret" not in result.output
    assert not list(tmp_path.iterdir())
    order = list(dict.fromkeys(one["name"] for one in found["checks"]))
    assert order[:2] == ["python", "packages"]
    assert order[-2:] == ["token", "hub"]


def test_a_problem_is_told_with_its_remedy_and_the_exit_status(monkeypatch: pytest.MonkeyPatch):
    found = [
        Finding("python", OK, "3.13"),
        Finding("torch", NOTE, "old", "Get a new one"),
        Finding("disk", PROBLEM, "full " + "of words " * 40, "Empty it"),
    ]
    monkeypatch.setattr(doctor, "diagnose", lambda folder: found)
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["OK", "python", "3.13"]
    assert "-> Get a new one" in lines[2]
    assert lines[-1] == "1 problem to put right, 1 note."
    assert CliRunner().invoke(app, ["doctor", "--json"]).exit_code == 1


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def broken() -> Iterator[Finding]:
        raise ZeroDivisionError("oh")
        yield

    quick = {"packages", "four_bit", "reachable"}
    for module in (doctor_software, doctor_device, doctor_hub):
        for name in quick & set(vars(module)):
            monkeypatch.setattr(module, name, lambda: iter([Finding("x", OK, "fine")]))
    monkeypatch.setattr(doctor_disk, "memory", broken)
    found = doctor.diagnose(tmp_path)
    assert only(found, "memory").status == PROBLEM
    assert "ZeroDivisionError: oh" in only(found, "memory").text
    assert [one.name for one in found].index("memory") < [one.name for one in found].index("token")


def test_packages_against_their_ranges(monkeypatch: pytest.MonkeyPatch):
    wanted = ["torch>=99", "peft<0.1", "numpy>=1", "not-there-at-all>=2", "lm-eval; extra == 'eval'"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    found = {one.name: one for one in doctor_software.packages()}
    assert found["torch"].text == f"{metadata.version('torch')}; wanted >=99"
    assert found["torch"].remedy == 'pip install "torch>=99"'
    assert found["not-there-at-all"].text == "not installed; wanted >=2"
    assert {one.status for one in found.values() if one.name != "packages"} == {PROBLEM}
    assert found["packages"].text == f"numpy {metadata.version('numpy')}"
    assert "lm-eval" not in found


def test_the_ranges_are_those_of_the_project():
    found = only(doctor_software.packages(), "packages")
    for name in ("accelerate", "bitsandbytes", "peft", "transformers", "trl", "typer"):
        assert f"{name} {metadata.version(name)}" in found.text


def test_an_old_python(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.9.2")
    found = only(doctor_software.python())
    assert found.status == PROBLEM
    assert "wanted >=3.11" in found.text


def test_variables_that_matter(monkeypatch: pytest.MonkeyPatch):
    for name in doctor_software._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "no variable" in only(doctor_software.environment_variables()).text
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@example.org/x\x1b[31m")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "4000")
    listed, offline, threads = doctor_software.environment_variables()
    assert "HF_ENDPOINT=https://***@example.org/x?[31m" in listed.text
    assert (offline.status, offline.remedy) == (NOTE, "unset TRANSFORMERS_OFFLINE, if that is not meant")
    assert "OMP_NUM_THREADS=4000" in threads.text


class Card:
    """A GPU as torch tells of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int] = (8, 9), free: float = 11e9):
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "get_device_name": lambda number: f"NVIDIA Card {number}",
            "get_device_capability": lambda number: capability,
            "mem_get_info": lambda number: (int(free), int(12e9)),
            "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90a", "sm_120", "compute_120"],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    Card(monkeypatch)
    first, second, several = doctor_device.gpus()
    assert first.text == "0: NVIDIA Card 0, compute capability 8.9, bfloat16, 11.0 GB of 12.0 GB free"
    assert (first.status, second.status, several.status) == (OK, OK, NOTE)
    assert "of 2 GPUs the first is used" in several.text
    assert "CUDA_VISIBLE_DEVICES=1" in several.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert len(list(doctor_device.gpus())) == 2


def test_an_old_gpu_and_a_full_one(monkeypatch: pytest.MonkeyPatch):
    Card(monkeypatch, capability=(7, 5))
    old = next(iter(doctor_device.gpus()))
    assert (old.status, old.remedy) == (
        NOTE,
        "Set quantization.compute_dtype: float16 in the recipe, as `bam-lora init` does here",
    )
    Card(monkeypatch, free=3e9)
    full = next(iter(doctor_device.gpus()))
    assert full.status == NOTE
    assert "3.0 GB of 12.0 GB free" in full.text
    assert "nvidia-smi" in full.remedy


def test_a_gpu_that_torch_has_no_code_for(monkeypatch: pytest.MonkeyPatch):
    Card(monkeypatch, capability=(6, 1))  # GTX 10, which builds for CUDA 13 leave out
    pascal = next(iter(doctor_device.gpus()))
    assert (pascal.status, "CUDA 12.6" in pascal.remedy) == (PROBLEM, True)
    assert "compute capability 6.1, for which torch" in pascal.text
    built = ["sm_75", "sm_86", "sm_90a", "sm_120", "compute_120"]
    fitting = {card: doctor_device._built_for(*card, built) for card in [(7, 5), (8, 9), (8, 0), (12, 1), (13, 0)]}
    assert fitting == {(7, 5): True, (8, 9): True, (8, 0): False, (12, 1): True, (13, 0): True}


def test_torch_and_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = tmp_path / "version"
    monkeypatch.setattr(doctor_device, "_NVIDIA_DRIVER", driver)
    monkeypatch.setattr(doctor_device, "_AMD_DRIVER", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert only(doctor_device.torch_build()).status == NOTE
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue\nGCC\n")
    cpu_build = only(doctor_device.torch_build())
    assert cpu_build.status == PROBLEM
    assert "built for CPUs, but there is a GPU (NVIDIA UNIX x86_64 Kernel Module 535.54.03)" in cpu_build.text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError("driver is too old")))
    too_old = only(doctor_device.torch_build())
    assert (too_old.status, too_old.text.endswith("cannot use the GPU: driver is too old")) == (PROBLEM, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides it" in only(doctor_device.torch_build()).text
    driver.unlink()
    assert "finds no GPU driver" in only(doctor_device.torch_build()).text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert only(doctor_device.torch_build()).text.endswith("built for CUDA 13.0; the driver works with it")


def test_four_bits_are_tried(monkeypatch: pytest.MonkeyPatch):
    error, device = doctor_device._try_nf4()
    assert device == "cpu"
    assert error == pytest.approx(0.092, abs=0.01)  # NF4 of normally distributed weights
    monkeypatch.setattr(doctor_device, "_try_nf4", lambda: (0.7, "cuda"))
    wrong = only(doctor_device.four_bit())
    assert (wrong.status, "found 70% off" in wrong.text) == (PROBLEM, True)
    monkeypatch.setattr(doctor_device, "_try_nf4", lambda: (_ for _ in ()).throw(RuntimeError("no kernel image\nmore")))
    assert only(doctor_device.four_bit()).text == "bitsandbytes fails: no kernel image"


def test_disk_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    usage = type("Usage", (), {"free": 0.0})
    for free, status in ((500e9, OK), (10e9, NOTE), (1e9, PROBLEM)):
        usage.free = free
        monkeypatch.setattr(doctor_disk.shutil, "disk_usage", lambda place: usage)
        runs, cache = doctor_disk.space(tmp_path)
        assert (runs.status, cache.status) == (status, status)
        assert gigabytes(free) in runs.text
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(check_machine, "_CGROUP", limit)
    limit.write_text("2000000000\n")
    little = only(doctor_disk.memory())
    assert (little.status, little.text) == (NOTE, "2.0 GB of 2.0 GB free")


def test_a_folder_that_cannot_be_written_or_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert next(iter(doctor_disk.files(tmp_path))).status == OK
    missing = next(iter(doctor_disk.files(tmp_path / "missing")))
    assert (missing.status, "cannot write" in missing.text) == (PROBLEM, True)

    def no_locks(path: Path, what: str) -> Any:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(doctor_disk, "held", no_locks)
    unlocked = next(iter(doctor_disk.files(tmp_path)))
    assert "cannot lock a file: [Errno 95] Operation not supported" in unlocked.text
    assert "local disk" in unlocked.remedy
    assert not list(tmp_path.iterdir())


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[BaseHTTPRequestHandler]]:
    """A Hub that answers with `status`."""

    class Answer(BaseHTTPRequestHandler):
        status = 200

        def do_HEAD(self) -> None:
            self.send_response(self.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(doctor_hub, "_SECONDS", 5.0)
    yield Answer
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_hub_answers(endpoint: type[BaseHTTPRequestHandler]):
    found = only(doctor_hub.reachable())
    assert (found.status, found.text.startswith("127.0.0.1 answers in ")) == (OK, True)
    endpoint.status = 404
    assert only(doctor_hub.reachable()).status == OK
    endpoint.status = 503
    assert "it answers with status 503" in only(doctor_hub.reachable()).text


def test_a_hub_that_is_away_is_a_note(monkeypatch: pytest.MonkeyPatch, endpoint: type[BaseHTTPRequestHandler]):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(doctor_hub, "_SECONDS", 0.2)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        found = only(doctor_hub.reachable())
    assert found.status == NOTE
    assert "out of reach" in found.text


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert only(doctor_hub.token()).remedy == "hf auth login"
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    found = only(doctor_hub.token())
    assert found.status == OK
    assert "hf_secret" not in found.text


def test_a_token_that_the_hub_refuses_is_a_problem(hub: PatchedHub):
    assert not list(doctor_hub.accepted())
    hub.log_in("read")
    assert not list(doctor_hub.accepted())
    hub.log_in("hf_expired")
    refused = only(doctor_hub.accepted())
    assert (refused.status, refused.name) == (PROBLEM, "token")
    assert "hf_expired" not in refused.text
    hub.stop()
    assert not list(doctor_hub.accepted())
