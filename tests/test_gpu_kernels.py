"""Fused kernels on a card: Liger's against transformers' own arithmetic; `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import liger_stand_in
import pytest
import torch
from conftest import ENGLISH, GERMAN, write_jsonl
from safetensors.torch import load_file
from small_models import SMALL

from bam_lora import doctor_device
from bam_lora.base import Loading, load_model, load_tokenizer
from bam_lora.branch import BranchJob, train_branch
from bam_lora.data import Layout, TrainingSource, prepare
from bam_lora.doctor_finding import OK
from bam_lora.errors import Interrupted
from bam_lora.interrupt import StopRequest
from bam_lora.kernels import LIGER, choose_kernels, package_lacks
from bam_lora.loop import run
from bam_lora.packing import load_rows
from bam_lora.recipe import recipe_from_dict
from bam_lora.sft_arguments import checkpointing_name
from bam_lora.sft_branch import SftBranch
from bam_lora.sources import TextSource
from bam_lora.store import read_record

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
needs_liger = pytest.mark.skipif(package_lacks() is not None, reason="needs liger-kernel and triton")
HOW = Loading(4, attention="auto")


@pytest.fixture(scope="module")
def rows(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("rows")
    source = TrainingSource(TextSource(str(write_jsonl(folder / "german.jsonl", GERMAN))), "target")
    layout = Layout(slices=1, sequence_length=128, slicing="random", replay_share=0.0, seed=0)
    facts = prepare([source], layout, load_tokenizer(tiny_base), folder / "01", key="k", say=lambda text: None)
    return load_rows(folder / "01", tuple(facts["slices"][0]["rows"]))


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return load_model(tiny_base, HOW)


def losses(
    folder: Path, base: Path, model: Any, rows: Any, kernels: str | None, *, checkpointing: bool = False,
    stop_at: int | None = None,
) -> list[float]:  # fmt: skip
    """Of a branch of eight steps."""
    stop = StopRequest()

    def on_step(step: int, loss: float | None) -> None:
        if step == stop_at:
            stop.signal_name = "SIGTERM"

    adapter = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.1}
    arguments = {
        "learning_rate": 1e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1,
        "save_steps": 100, checkpointing_name(): checkpointing,
    }  # fmt: skip
    make = SftBranch(HOW, load_tokenizer(base), rows, adapter, arguments, 8, 7, 128)
    job = BranchJob("branch", "key", 8, 1600, "tiny", kernels=kernels)
    train_branch(model, job, folder, make, on_step=on_step, stop=stop)
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("checkpointing", [False, True])
@needs_liger
def test_a_branch_learns_the_same(tiny_base: Path, model: Any, rows: Any, tmp_path: Path, checkpointing: bool) -> None:
    found = losses(tmp_path / "fused", tiny_base, model, rows, LIGER, checkpointing=checkpointing)
    expected = losses(tmp_path / "plain", tiny_base, model, rows, None, checkpointing=checkpointing)
    assert found == pytest.approx(expected, rel=0.01)  # bfloat16, whose rounding eight steps carry on
    assert found != expected
    assert liger_stand_in.untouched()


@needs_liger
def test_a_branch_goes_on_where_it_stopped(tiny_base: Path, model: Any, rows: Any, tmp_path: Path) -> None:
    losses(tmp_path / "whole", tiny_base, model, rows, LIGER)
    with pytest.raises(Interrupted):
        losses(tmp_path / "cut", tiny_base, model, rows, LIGER, stop_at=4)
    losses(tmp_path / "cut", tiny_base, model, rows, LIGER)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    for name, value in one.items():
        assert float((value - two[name]).norm() / value.norm()) < 1e-3, name


@needs_liger
@pytest.mark.parametrize(("kind", "values"), [("qwen3", {"head_dim": 16}), ("gemma3_text", {}), ("phi3", {})])
def test_other_kinds_learn_the_same(kind: str, values: dict[str, Any], tmp_path: Path) -> None:
    """One step in fp32, by Triton as it is compiled for this card."""
    from test_packed_attention import adapted, model_of, places, step, tokens

    from bam_lora.kernels import fused

    view = adapted(model_of(kind, **{**SMALL, **values})).to("cuda")
    ids, at = tokens().cuda(), places().cuda()
    expected = step(view, "sdpa", ids, at)
    with fused(view, LIGER):
        found = step(view, "sdpa", ids, at)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[2].items():
        assert (found[2][name] - gradient).norm() <= 1e-3 * gradient.norm(), name


@needs_liger
def test_a_run_takes_them_by_itself_and_folds(tiny_base: Path, tmp_path: Path) -> None:
    texts = {name: write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("de", GERMAN), ("en", ENGLISH))}
    recipe = recipe_from_dict(
        {
            "base": str(tiny_base),
            "output": "unused",
            "data": {"target": [{"path": str(texts["de"])}], "sequence_length": 64},
            "bam": {"slices": 4, "branches": 2},
            "lora": {"r": 8},
            "training": {
                "learning_rate": 5e-3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            },
            "evaluation": {"target": [{"path": str(texts["de"]), "documents": 4}]},
        }
    )  # fmt: skip
    expected = LIGER if torch.cuda.get_device_capability()[0] >= 8 else None
    assert choose_kernels("auto", tiny_base, "cuda") == expected
    assert run(recipe, tmp_path / "run")["summary"]["learned"] > 0
    assert (read_record(tmp_path / "run" / "environment.json") or {})["kernels"] == expected


@needs_liger
def test_doctor_finds_them_right() -> None:
    (found,) = doctor_device.fused_kernels()
    assert found.status == OK, found.text
