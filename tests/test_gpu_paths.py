"""Every path that differs on a GPU, against the CPU's; run with `pytest -m gpu` where there is a card."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENGLISH, GERMAN, write_jsonl
from safetensors.torch import load_file

from bam_lora.adapters import Adapter
from bam_lora.base import Loading, load_model, load_tokenizer
from bam_lora.branch import BranchJob, train_branch
from bam_lora.data import Layout, TrainingSource, prepare
from bam_lora.errors import Interrupted, UserError
from bam_lora.evaluate import Window, score
from bam_lora.folding import fold, fold_into
from bam_lora.gpu_memory import OutOfMemory
from bam_lora.interrupt import StopRequest
from bam_lora.loop import run
from bam_lora.machine import release_memory
from bam_lora.merge import MergedAdapters
from bam_lora.packing import load_rows
from bam_lora.recipe import Recipe, dump_recipe, recipe_from_dict
from bam_lora.sft_branch import SftBranch
from bam_lora.sources import TextSource
from bam_lora.store import read_record
from bam_lora.views import adapted

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

EXACT = Loading(16, compute_dtype="float32")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, texts in (("german", GERMAN), ("english", ENGLISH)):
        write_jsonl(folder / f"{name}.jsonl", [*texts[:24], *texts[40:-3]])
        write_jsonl(folder / f"{name}.choose.jsonl", texts[24:40])
        write_jsonl(folder / f"{name}.test.jsonl", texts[-3:])
    return folder


def recipe(base: Path, files: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "base": str(base),
        "output": "unused",
        "data": {"target": [{"path": str(files / "german.jsonl")}], "sequence_length": 64},
        "bam": {"slices": 4, "branches": 2, "merge": {"weights": "learned", "learned": {"share": 1.0, "steps": 8}}},
        "lora": {"r": 8},
        "quantization": {"bits": 16, "compute_dtype": "float32"},
        "training": {
            "learning_rate": 5e-3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "logging_steps": 1, "save_steps": 2,
        },
        "evaluation": {
            "target": [{"path": str(files / "german.test.jsonl"), "set": "german"}],
            "source": [{"path": str(files / "english.test.jsonl"), "set": "english"}],
            "precision": "16bit", "samples": ["Am Morgen"],
        },
        "selection": {
            "target": [{"path": str(files / "german.choose.jsonl")}],
            "source": [{"path": str(files / "english.choose.jsonl")}],
        },
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return recipe_from_dict(values)


@pytest.fixture(scope="module")
def runs(tiny_base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run on both, in fp32: the CPU's in a process that sees no card."""
    root = tmp_path_factory.mktemp("runs")
    wanted = recipe(tiny_base, files)
    (root / "recipe.yaml").write_text(dump_recipe(wanted), encoding="utf-8")
    command = [sys.executable, "-m", "bam_lora", "run", str(root / "recipe.yaml"), "--output", str(root / "cpu")]
    done = subprocess.run(
        command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    run(wanted, root / "cuda")
    return {"cpu": root / "cpu", "cuda": root / "cuda"}


def test_a_run_is_the_cpus_in_outline(runs: dict[str, Path]) -> None:
    cpu, cuda = (json.loads((runs[where] / "report.json").read_text()) for where in ("cpu", "cuda"))
    assert (cpu["environment"]["device"], cuda["environment"]["device"]) == ("cpu", "cuda")
    places = [(one["iteration"], one["branch"], one["set"]) for one in cpu["scores"]]
    assert [(one["iteration"], one["branch"], one["set"]) for one in cuda["scores"]] == places
    for one, two in zip(cpu["scores"], cuda["scores"], strict=True):
        # Rounding differs, and training carries it on: the base agrees to five digits, the rest in outline.
        assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-4 if one["iteration"] == 0 else 0.05)
    assert cuda["summary"]["learned"] > 0
    assert [one["steps"] for one in cpu["iterations"][0]["branches"]] == [
        one["steps"] for one in cuda["iterations"][0]["branches"]
    ]


def test_samples_of_the_base_are_the_same(runs: dict[str, Path]) -> None:
    texts = []
    for where in ("cpu", "cuda"):
        record = read_record(runs[where] / "samples.json")
        assert record is not None
        texts.append(record["samples"][0]["text"])
    assert texts[0] == texts[1]


def test_peaks_by_stage(runs: dict[str, Path]) -> None:
    record = read_record(runs["cuda"] / "sessions.json")
    assert record is not None
    peaks = record["sessions"][-1]["peak_gpu_bytes_by_stage"]
    assert {"load", "train", "evaluate"} <= peaks.keys()
    assert record["sessions"][-1]["peak_gpu_bytes"] == max(peaks.values())
    done = read_record(runs["cuda"] / "iterations" / "01" / "branch-1" / "done.json")
    assert done is not None
    assert 0 < done["facts"]["peak_gpu_bytes"] <= peaks["train"]


def test_nothing_stays_on_the_card(runs: dict[str, Path]) -> None:
    assert bytes_that_stay() < 4 << 20


def bytes_that_stay() -> int:
    """Without the workspaces of cuBLAS, one a thread: 8 MiB each, and 32 on Hopper."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def bytes_alike(one: Path, two: Path) -> float:
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    same = torch.cat([(first[name] == second[name]).flatten() for name in first])
    return float(same.double().mean())


def adapters_of(root: Path) -> list[Adapter]:
    return [Adapter.open(root / "iterations" / "01" / f"branch-{k}" / "adapter") for k in (1, 2)]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_fold_is_the_cpus(runs: dict[str, Path], tiny_base: Path, tmp_path: Path, rounding: str) -> None:
    merged = MergedAdapters(adapters_of(runs["cuda"]), [0.5, 0.5])
    for where in ("cpu", "cuda"):
        facts = fold_into(
            tiny_base, merged, tmp_path / where, key="k", device=where, rounding=rounding, verify=rounding == "nearest"
        )
        assert facts["changed"] == 14
    assert bytes_alike(tmp_path / "cpu", tmp_path / "cuda") > 0.9999


@pytest.mark.parametrize("method", ["ties", "dare_linear", "breadcrumbs"])
def test_methods_by_element_are_the_cpus_to_the_bit(
    runs: dict[str, Path], tiny_base: Path, tmp_path: Path, method: str
) -> None:
    merged = MergedAdapters(adapters_of(runs["cuda"]), [0.5, 0.5], method)
    for where in ("cpu", "cuda"):
        fold_into(tiny_base, merged, tmp_path / where, key="k", device=where)
    one, two = ((tmp_path / where / "model.safetensors").read_bytes() for where in ("cpu", "cuda"))
    assert one == two


def test_a_card_that_is_not_there(tiny_base: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    folders = [adapter.path for adapter in adapters_of(runs["cuda"])]
    with pytest.raises(UserError, match="found 'cuda:99' on a machine with"):
        fold(tiny_base, folders, tmp_path / "out", device="cuda:99", any_base=True)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """None but what is held already, and what is free in that is taken."""
    release_memory()
    fraction = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(max(fraction, 1e-6))
    taken = []
    for size in (1 << 20, 1 << 16, 1 << 12, 1 << 9):
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    try:
        yield
    finally:
        del taken
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_fold_that_does_not_fit(tiny_base: Path, runs: dict[str, Path], tmp_path: Path, little_memory: None) -> None:
    merged = MergedAdapters(adapters_of(runs["cuda"]), [0.5, 0.5])
    with pytest.raises(OutOfMemory, match=r"folding on cuda: expected enough memory.*leave out --device"):
        fold_into(tiny_base, merged, tmp_path / "out", key="k", device="cuda")
    assert not (tmp_path / "out").exists()
    fold_into(tiny_base, merged, tmp_path / "out", key="k")


def test_a_base_that_does_not_fit(tiny_base: Path, little_memory: None) -> None:
    with pytest.raises(OutOfMemory, match="in 16 bits: expected enough memory, found too little: of the GPU's"):
        load_model(tiny_base, EXACT)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_scores_of_one_model(tiny_base: Path, bits: int) -> None:
    model = load_model(tiny_base, Loading(bits))
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    windows = [Window(n, (0,), tuple(range(3, 20 + n)), 60) for n in range(6)]
    alone, _ = score(model, windows, pad=2, batch_size=1, dtype="bfloat16")
    together, _ = score(model, windows, pad=2, batch_size=6, dtype="bfloat16")
    assert together == pytest.approx(alone, rel=0.02)


@pytest.fixture(scope="module")
def rows(tiny_base: Path, files: Path) -> Any:
    source = TrainingSource(TextSource(str(files / "german.jsonl")), "target")
    layout = Layout(slices=1, sequence_length=64, slicing="random", replay_share=0.0, seed=0)
    facts = prepare([source], layout, load_tokenizer(tiny_base), files / "rows", key="k", say=lambda text: None)
    return load_rows(files / "rows", tuple(facts["slices"][0]["rows"]))


def train(
    folder: Path, model: Any, tokenizer: Any, rows: Any, *, how: Loading, optim: str, r: int = 8,
    dropout: float = 0.1, stop_at: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    stop = StopRequest()

    def on_step(step: int, loss: float | None) -> None:
        if step == stop_at:
            stop.signal_name = "SIGTERM"

    adapter = {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", "lora_dropout": dropout}
    arguments = {
        "learning_rate": 1e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1,
        "save_steps": 100, "optim": optim,
    }  # fmt: skip
    make = SftBranch(how, tokenizer, rows, adapter, arguments, 8, 7, 64)
    job = BranchJob("branch", "key", 8, 1600, "tiny")
    return train_branch(model, job, folder, make, on_step=on_step, stop=stop)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_branch_goes_on_where_it_stopped(tiny_base: Path, rows: Any, tmp_path: Path, optim: str) -> None:
    """With dropout: the card's random numbers are in the checkpoint. Rank 2048: only large states are paged."""
    model, tokenizer = load_model(tiny_base, EXACT), load_tokenizer(tiny_base)
    given: dict[str, Any] = {"how": EXACT, "optim": optim, "r": 2048 if "paged" in optim else 8}
    whole = train(tmp_path / "whole", model, tokenizer, rows, **given)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", model, tokenizer, rows, stop_at=4, **given)
    train(tmp_path / "cut", model, tokenizer, rows, **given)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    for name, value in one.items():
        difference = (value - two[name]).norm() / value.norm()
        assert float(difference) < 1e-3, name  # without the state or the random numbers it is a tenth and more
    assert whole["loss_last"] < whole["loss_first"]


def test_branches_leave_nothing_behind(tiny_base: Path, rows: Any, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny_base, Loading(4)), load_tokenizer(tiny_base)
    held = []
    for number in range(3):
        train(tmp_path / str(number), model, tokenizer, rows, how=Loading(4), optim="paged_adamw_8bit", r=2048)
        with adapted(model, tmp_path / str(number) / "adapter") as subject:
            score(subject, [Window(0, (0,), (5, 6, 7), 9)], pad=2, batch_size=1, dtype="bfloat16")
        del subject
        release_memory()
        held.append(torch.cuda.memory_allocated())
    assert held[0] == held[1] == held[2]


def test_training_that_does_not_fit_goes_on_with_less(
    tiny_base: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: dict[str, Any] = {"bam": {"slices": 2, "branches": 2, "merge": {"weights": "uniform"}}}
    whole = recipe(tiny_base, files, **wanted)
    from bam_lora import branch

    make = branch.branch_view

    def too_large(model: Any) -> Any:
        torch.empty(torch.cuda.mem_get_info()[1], dtype=torch.uint8, device="cuda")  # all there is: torch's own error
        return make(model)

    monkeypatch.setattr(branch, "branch_view", too_large)
    with pytest.raises(OutOfMemory, match=r"training iteration 1/1, branch 1.*the run goes on"):
        run(whole, tmp_path / "run")
    release_memory()
    assert bytes_that_stay() < 4 << 20
    monkeypatch.undo()
    training = {**whole.resolved()["training"], "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    less = recipe(tiny_base, files, **wanted, training={**training, "checkpointing": True})
    assert run(less, tmp_path / "run")["summary"]["learned"] > 0
