"""A branch equals a plain SFTTrainer run, resumes bit for bit, and leaves the base as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import GERMAN, write_jsonl

from bam_lora.base import Loading, load_model, load_tokenizer
from bam_lora.branch import BranchJob, train_branch
from bam_lora.data import Layout, TrainingSource, prepare
from bam_lora.errors import Interrupted, UserError
from bam_lora.interrupt import StopRequest
from bam_lora.packing import load_rows
from bam_lora.sft_arguments import checkpointing_name
from bam_lora.sft_branch import SftBranch, as_arrays
from bam_lora.sources import TextSource
from bam_lora.store import hash_file
from bam_lora.views import adapted, branch_view, count_linear_modules

HOW = Loading(4)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    return load_model(tiny_base, HOW)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(tiny_base)


@pytest.fixture(scope="module")
def rows(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("rows")
    source = TrainingSource(TextSource(str(write_jsonl(folder / "german.jsonl", GERMAN))), "target")
    layout = Layout(slices=1, sequence_length=64, slicing="random", replay_share=0.0, seed=0)
    facts = prepare([source], layout, tokenizer, folder / "01", key="k", say=lambda text: None)
    return load_rows(folder / "01", tuple(facts["slices"][0]["rows"]))


ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Todo:
    """A branch and what its trainer is made with."""

    job: BranchJob
    arguments: dict[str, Any]
    adapter: dict[str, Any]
    seed: int = 7


def todo_of(
    arguments: dict[str, Any] | None = None, adapter: dict[str, Any] | None = None, seed: int = 7, **changes: Any
) -> Todo:
    values = {
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": 3,
        "lr_scheduler_type": "cosine",
        checkpointing_name(): False,
        "gradient_checkpointing": False,
        **(arguments or {}),
    }
    named = {"label": "iteration 1/1, branch 1, slice 1", "key": "key", "steps": 8, "tokens": 1600, "base_name": "tiny"}
    return Todo(BranchJob(**{**named, **changes}), values, {**ADAPTER, **(adapter or {})}, seed)


def train(
    folder: Path, model: Any, tokenizer: Any, rows: Any, todo: Todo, stop_at: int | None = None
) -> dict[str, Any]:
    stop = StopRequest()

    def on_step(step: int, loss: float | None) -> None:
        if step == stop_at:
            stop.signal_name = "SIGTERM"

    make = SftBranch(HOW, tokenizer, rows, todo.adapter, todo.arguments, todo.job.steps, todo.seed, 64)
    return train_branch(model, todo.job, folder, make, on_step=on_step, stop=stop)


def weights(folder: Path) -> str:
    return hash_file(folder / "adapter" / "adapter_model.safetensors")


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def test_rows_as_arrays_make_the_same_batch() -> None:
    from datasets import Dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    ids = [[5, 6, 7, 8], [9, 10, 11]]
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100, 6, 7, -100], ids[1]], "seq_lengths": [[3, 1], [3]]})
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    arrays = as_arrays(rows)
    assert type(arrays[0]["input_ids"]).__name__ == "ndarray"
    lists, found = collate([rows[0], rows[1]]), collate([arrays[0], arrays[1]])
    assert found.keys() == lists.keys()
    for name, value in lists.items():
        assert found[name] is value or torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name
        assert getattr(found[name], "dtype", None) == getattr(value, "dtype", None), name


def test_branch_equals_plain_sft_trainer(
    tmp_path: Path, tiny_base: Path, model: Any, tokenizer: Any, rows: Any
) -> None:
    from peft import LoraConfig
    from safetensors.torch import load_file
    from trl import SFTConfig, SFTTrainer

    train(tmp_path / "ours", model, tokenizer, rows, todo_of())
    arguments = SFTConfig(
        **todo_of().arguments, output_dir=str(tmp_path / "plain"), max_steps=8, seed=7, data_seed=7, use_cpu=True,
        packing=True, packing_strategy="bfd_split", max_length=64, dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none", disable_tqdm=True, save_strategy="no", warmup_steps=0,
    )  # fmt: skip
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    base = load_model(tiny_base, HOW)
    transformers.set_seed(7)  # TRL 1.10 does not, before it draws the adapter
    plain = SFTTrainer(base, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    for parameter in plain.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    plain.train()
    plain.model.save_pretrained(tmp_path / "plain")
    ours, theirs = (load_file(tmp_path / path / "adapter_model.safetensors") for path in ("ours/adapter", "plain"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resume_is_equal_bit_for_bit(
    tmp_path: Path, model: Any, tokenizer: Any, rows: Any, checkpointing: bool
) -> None:
    todo = todo_of(arguments={checkpointing_name(): checkpointing}, adapter={"lora_dropout": 0.1})
    train(tmp_path / "whole", model, tokenizer, rows, todo)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", model, tokenizer, rows, todo, stop_at=4)
    assert not (tmp_path / "cut" / "done.json").exists()
    facts = train(tmp_path / "cut", model, tokenizer, rows, todo)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert facts["steps"] == 8
    assert 0 < facts["setup_seconds"] < facts["seconds"]
    assert 0 < facts["checkpoint_seconds"] < facts["seconds"] - facts["setup_seconds"]
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == losses
    assert not (tmp_path / "cut" / "checkpoints").exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "no manifest", "no optimizer"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, model: Any, tokenizer: Any, rows: Any, damage: str
) -> None:
    train(tmp_path / "whole", model, tokenizer, rows, todo_of())
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", model, tokenizer, rows, todo_of(), stop_at=6)
    checkpoints = sorted((tmp_path / "cut" / "checkpoints").glob("checkpoint-*"))
    newest = checkpoints[-1]
    assert len(checkpoints) >= 2
    optimizer = newest / "optimizer.pt"
    if damage == "truncate":
        optimizer.write_bytes(optimizer.read_bytes()[:-100])
    elif damage == "flip":
        data = bytearray(optimizer.read_bytes())
        data[len(data) // 2] ^= 1
        optimizer.write_bytes(bytes(data))
    elif damage == "no manifest":
        (newest / "done.json").unlink()
    else:
        optimizer.unlink()
    train(tmp_path / "cut", model, tokenizer, rows, todo_of())
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_a_second_branch_on_the_same_base_equals_one_on_a_fresh_base(
    tmp_path: Path, tiny_base: Path, model: Any, tokenizer: Any, rows: Any
) -> None:
    before, modules = state(model), [(name, type(module)) for name, module in model.named_modules()]
    train(tmp_path / "first", model, tokenizer, rows, todo_of(arguments={checkpointing_name(): True}))
    train(tmp_path / "second", model, tokenizer, rows, todo_of(seed=8))
    train(tmp_path / "fresh", load_model(tiny_base, HOW), tokenizer, rows, todo_of(seed=8))
    assert weights(tmp_path / "second") == weights(tmp_path / "fresh") != weights(tmp_path / "first")
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert not any(module._forward_hooks for module in model.modules())
    assert "forward" not in vars(model)


def test_scoring_in_between_changes_nothing(tmp_path: Path, model: Any, tokenizer: Any, rows: Any) -> None:
    train(tmp_path / "a", model, tokenizer, rows, todo_of(steps=2))
    with torch.inference_mode(), adapted(model, tmp_path / "a" / "adapter") as subject:
        subject(torch.tensor([[0, 5, 6, 7]]))
        subject.generate(torch.tensor([[0, 5, 6, 7]]), max_new_tokens=3, pad_token_id=2)
    train(tmp_path / "b", model, tokenizer, rows, todo_of(steps=2))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_the_base_is_four_bit_and_shared(model: Any) -> None:
    assert count_linear_modules(model) == {"4bit": 14, "8bit": 0, "unquantised": 1}
    view = branch_view(model)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), view.named_parameters(), strict=True):
        assert mine is theirs, name
    packed = [p for name, p in model.named_parameters() if "proj" in name]
    assert all(p.dtype == torch.uint8 for p in packed)


class Poisoned(torch.autograd.Function):
    """Identity whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


@pytest.fixture
def poisoned(model: Any) -> Iterator[Any]:
    """The base with a NaN in the gradient of its last layer's output."""
    view = branch_view(model)
    view.model.norm.register_forward_hook(lambda module, inputs, output: Poisoned.apply(output))
    return view


def test_non_finite_gradients_stop_before_the_update(tmp_path: Path, poisoned: Any, tokenizer: Any, rows: Any) -> None:
    words = r"iteration 1/1, branch 1, slice 1, step 1: expected a finite gradient, found NaN or infinity\. Start"
    with pytest.raises(UserError, match=words):
        train(tmp_path / "x", poisoned, tokenizer, rows, todo_of())
    assert not (tmp_path / "x" / "done.json").exists()
    assert not (tmp_path / "x" / "adapter").exists()


def test_a_view_of_a_base_with_placement_hooks_runs_its_own_modules(tiny_base: Path) -> None:
    """On a GPU accelerate wraps the forward of every module; a view must not call back into the base."""
    from accelerate import dispatch_model

    base = load_model(tiny_base, HOW)
    dispatch_model(base, {"": "cpu"}, force_hooks=True)
    assert hasattr(base, "_hf_hook")
    view = branch_view(base)
    called: list[str] = []
    base.model.layers[0].register_forward_hook(lambda *args: called.append("base"))
    view.model.layers[0].register_forward_hook(lambda *args: called.append("view"))
    ids = torch.tensor([[0, 5, 6, 7]])
    with torch.no_grad():
        logits = view(ids).logits
        assert called == ["view"]
        assert torch.equal(logits, base(ids).logits)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_views_agree_with_the_base_at_every_precision(tiny_base: Path, bits: int) -> None:
    base = load_model(tiny_base, Loading(bits))
    ids = torch.tensor([[0, 5, 6, 7]])
    with torch.no_grad():
        first = branch_view(base)(ids).logits
        assert torch.equal(first, branch_view(base)(ids).logits)
        assert torch.equal(first, base(ids).logits)
