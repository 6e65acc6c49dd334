"""Which GPU is used and how: shown ones, allocator, pages, number formats, with a card that only seems to be there."""

from __future__ import annotations

import os
import platform
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from transformers.training_args import OptimizerNames

from bam_lora import gpu_memory, sft_branch
from bam_lora.base import Loading
from bam_lora.cards import Card
from bam_lora.check_machine import find_machine
from bam_lora.compute_types import emulation_note
from bam_lora.errors import UserError
from bam_lora.gpu_memory import set_allocator, use_one_gpu
from bam_lora.loop import run
from bam_lora.paged_optimizer import PageState, paged_state
from bam_lora.recipe import recipe_from_dict


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({}, {"CUDA_VISIBLE_DEVICES": "0"}),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, {"CUDA_VISIBLE_DEVICES": "2"}),
        ({"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": ""}),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, {"CUDA_VISIBLE_DEVICES": "-1"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5f6b, GPU-88aa"}, {"CUDA_VISIBLE_DEVICES": "GPU-5f6b"}),
        ({"CUDA_VISIBLE_DEVICES": "MIG-12"}, {"CUDA_VISIBLE_DEVICES": "MIG-12"}),
        ({"HIP_VISIBLE_DEVICES": "1,0"}, {"HIP_VISIBLE_DEVICES": "1"}),
        ({"ROCR_VISIBLE_DEVICES": "0,1"}, {"ROCR_VISIBLE_DEVICES": "0"}),
    ],
)
def test_the_first_gpu_of_those_shown(
    given: dict[str, str], then: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    use_one_gpu()
    assert {name: os.environ[name] for name in os.environ if name.endswith("_VISIBLE_DEVICES")} == then


@pytest.mark.parametrize(
    ("machine", "wanted"),
    [
        (("linux", "6.8.0-generic", "x86_64", "2.13.0+cu130"), True),
        (("linux", "5.15.153.1-microsoft-standard-WSL2", "x86_64", "2.13.0+cu130"), False),
        (("linux", "6.8.0-tegra", "aarch64", "2.13.0"), False),
        (("linux", "6.8.0-generic", "x86_64", "2.13.0+rocm7.2"), False),
        (("win32", "11", "AMD64", "2.13.0+cu130"), False),
    ],
)
@pytest.mark.parametrize("in_use", [False, True])
def test_the_allocator(
    machine: tuple[str, str, str, str], wanted: bool, in_use: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "platform", machine[0])
    monkeypatch.setattr(platform, "release", lambda: machine[1])
    monkeypatch.setattr(platform, "machine", lambda: machine[2])
    monkeypatch.setattr(gpu_memory.metadata, "version", lambda name: machine[3])
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    set_allocator()
    assert told == (["expandable_segments:True"] if wanted and in_use else [])  # else torch reads the variable itself
    assert os.environ.get("PYTORCH_ALLOC_CONF") == ("expandable_segments:True" if wanted else None)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    set_allocator()
    assert "PYTORCH_ALLOC_CONF" not in os.environ  # the user's own word


class Paged:
    """A paged optimizer as bitsandbytes has it."""

    is_paged = True

    def __init__(self, parameter: torch.Tensor) -> None:
        self.parameter = parameter
        self.state = {parameter: {"state1": torch.full((4,), 3.0), "state2": None, "qmap1": torch.zeros(2)}}

    def get_state_buffer(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return functional.get_paged(4, dtype=dtype, device=torch.device("cuda", 0))


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from bam_lora import paged_optimizer

    made: list[Any] = []

    def get_paged(*shape: int, dtype: Any, device: Any) -> torch.Tensor:
        made.append(torch.zeros(shape, dtype=dtype))
        made[-1].is_paged = True
        return made[-1]

    monkeypatch.setattr(functional, "get_paged", get_paged)
    monkeypatch.setattr(paged_optimizer, "_free", defaultdict(list))
    return made


def trainer(optim: Any) -> Any:
    return types.SimpleNamespace(args=types.SimpleNamespace(optim=optim), add_callback=lambda callback: None)


def test_branches_share_the_pages_of_their_optimizers(allocated: list[Any]) -> None:
    device = torch.device("cuda", 0)
    original = functional.get_paged
    for optim in ("paged_adamw_8bit", OptimizerNames.PAGED_ADAMW_8BIT, OptimizerNames.PAGED_ADAMW_8BIT):
        with paged_state(trainer(optim)):
            pages = [functional.get_paged(4, 2, dtype=torch.uint8, device=device) for _ in range(2)]
            assert pages[0] is not pages[1]
    assert len(allocated) == 2
    assert functional.get_paged is original
    with paged_state(trainer("adamw_torch_fused")):
        assert functional.get_paged is original


def test_a_state_from_a_checkpoint_is_paged_again(allocated: list[Any]) -> None:
    optimizer = Paged(torch.empty(4, device="meta"))
    PageState().on_train_begin(None, None, None, optimizer=types.SimpleNamespace(optimizer=optimizer))
    moments = optimizer.state[optimizer.parameter]
    assert moments["state1"] is allocated[0]
    assert moments["state1"].tolist() == [3.0] * 4
    assert not hasattr(moments["qmap1"], "is_paged")
    PageState().on_train_begin(None, None, None, optimizer=optimizer)
    assert len(allocated) == 1


def test_a_card_that_emulates_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_lora.compute_types.device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    note = emulation_note("bfloat16", "org/llama")
    assert note is not None
    assert note.startswith("Tesla T4 has no bfloat16: torch emulates it, slowly")
    assert "quantization.compute_dtype: float16," in note
    assert "quantization.compute_dtype: float32," in str(emulation_note("bfloat16", "google/Gemma-3-1b-pt"))
    assert emulation_note("float16", "org/llama") is None
    assert find_machine(Card(2**34, "T4", bfloat16=False)).bfloat16 is False
    monkeypatch.setattr("bam_lora.compute_types.device", lambda: "cpu")
    assert emulation_note("bfloat16", "org/llama") is None
    assert str(emulation_note("bfloat16", "org/llama", "a T4")).startswith("a T4 has no bfloat16")


def test_a_run_says_so_before_it_looks_at_the_base(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bam_lora.compute_types.device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    values = {"base": str(tmp_path / "none"), "output": str(tmp_path / "run"), "data": {"target": [{"path": "x.txt"}]}}
    with pytest.raises(UserError, match="none"):
        run(recipe_from_dict(values))
    assert "Tesla T4 has no bfloat16" in "".join(capsys.readouterr())


def test_an_arc_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = types.SimpleNamespace(name="Arc", total_memory=16 << 30)
    monkeypatch.setattr("bam_lora.check_machine.device", lambda: "xpu")
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda number: found)
    machine = find_machine()
    assert (machine.name, machine.memory_bytes, machine.unified) == ("Arc", 16 << 30, False)


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("xpu", True), ("mps", False), ("cpu", False)])
def test_pinned_memory(device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sft_branch, "device", lambda: device)
    branch = sft_branch.SftBranch(Loading(16), None, None, {}, {}, 1, 0, 8)
    assert branch._arguments(tmp_path)["dataloader_pin_memory"] is pinned
