"""A lack of memory as one line, peaks by stage, which GPU is used: with a card that only seems to be there."""

from __future__ import annotations

import types
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from bam_lora import gpu_memory, stages
from bam_lora.errors import UserError
from bam_lora.evaluate import Window, score
from bam_lora.gpu_memory import OutOfMemory, freed_after_errors, is_out_of_memory, room_for
from bam_lora.learned_weights import _cross_entropy, _nats, fitting_tokens
from bam_lora.loop import run
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.rundir import recipe_key
from bam_lora.session import Session
from bam_lora.stage_clock import StageClock
from bam_lora.store import read_record
from bam_lora.trainer_words import script_words


class Memory:
    """Stands in for `torch.cuda`: 12 GiB, of which a program beside ours has one."""

    def __init__(self) -> None:
        self.held = self.peak = 0
        self.emptied = 0

    def use(self, size: int) -> None:
        self.held = size
        self.peak = max(self.peak, size)

    def is_initialized(self) -> bool:
        return True

    def mem_get_info(self) -> tuple[int, int]:
        return (11 << 30) - self.held, 12 << 30

    def memory_reserved(self) -> int:
        return self.held

    def max_memory_reserved(self) -> int:
        return self.peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.held

    def empty_cache(self) -> None:
        self.emptied += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Memory:
    card = Memory()
    monkeypatch.setattr(gpu_memory, "_module", lambda: card)
    return card


def test_what_a_lack_of_memory_looks_like() -> None:
    lacks = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.0 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
    ]
    assert all(map(is_out_of_memory, lacks))
    others = [ValueError("out of memory"), RuntimeError("CUDA error: no kernel image"), KeyError("memory")]
    assert not any(map(is_out_of_memory, others))


def test_one_line_says_who_holds_the_card(card: Memory) -> None:
    card.use(10 << 30)
    with pytest.raises(OutOfMemory) as caught, room_for("training branch 2", "Use less"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert str(caught.value) == (
        "training branch 2: expected enough memory, found too little: of the GPU's 12.0 GiB this run held 10.0, "
        "CUDA itself and other programs 1.0. Use less."
    )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_pass_and_the_first_line_stays() -> None:
    with pytest.raises(RuntimeError, match="no kernel image"), room_for("a", "b"):
        raise RuntimeError("CUDA error: no kernel image is available")
    with pytest.raises(OutOfMemory, match=r"\Ainner"), room_for("outer", "b"), room_for("inner", "b"):
        raise MemoryError
    with pytest.raises(UserError, match=r"^ours$"), room_for("outer", "b"):
        raise UserError("ours")


def test_a_script_is_told_in_its_words() -> None:
    with pytest.raises(OutOfMemory) as caught, script_words(), room_for("training", gpu_memory.LESS_TO_TRAIN):
        raise MemoryError
    for words in ("call train() again", "args.gradient_checkpointing", "args.per_device_train_batch_size"):
        assert words in str(caught.value)
    assert "RECIPE" not in str(caught.value)


class Model:
    """Something large."""


def test_models_are_freed_though_the_traceback_is_kept() -> None:
    kept: list[BaseException] = []
    seen: list[Any] = []

    def train() -> None:
        model = Model()
        seen.append(weakref.ref(model))
        with room_for("training", "Use less"):
            raise torch.OutOfMemoryError(f"no room for {model}")

    cleared: list[bool] = []
    try:
        with freed_after_errors(lambda: cleared.append(True)):
            train()
    except OutOfMemory as error:
        kept.append(error)  # as a notebook does
    assert cleared == [True]
    assert seen[0]() is None


def test_peaks_by_stage(card: Memory, tmp_path: Path) -> None:
    clock = StageClock()
    session = Session(tmp_path / "sessions.json", clock)
    with clock.stage("load"):
        card.use(6 << 30)
    with clock.stage("train"):
        card.use(9 << 30)
        card.use(6 << 30)
        session.update()  # in the middle of a stage
        assert gpu_memory.gpu_peak_bytes() == 9 << 30  # and a branch still sees the peak of its own stage
        with clock.stage("evaluate"):
            card.use(7 << 30)
            card.use(6 << 30)
    session.update()
    record = read_record(tmp_path / "sessions.json")
    assert record is not None
    (found,) = record["sessions"]
    assert found["peak_gpu_bytes_by_stage"] == {"load": 6 << 30, "train": 9 << 30, "evaluate": 7 << 30}
    assert found["peak_gpu_bytes"] == 9 << 30


def test_no_gpu_no_peaks(tmp_path: Path) -> None:
    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("there is one")
    clock = StageClock()
    with clock.stage("train"):
        pass
    Session(tmp_path / "sessions.json", clock)
    record = read_record(tmp_path / "sessions.json")
    assert record is not None
    assert record["sessions"][0]["peak_gpu_bytes"] is None
    assert "peak_gpu_bytes_by_stage" not in record["sessions"][0]


class Small:
    """A language model for which there is room for so many windows at once."""

    device = torch.device("cpu")

    def __init__(self, room: int) -> None:
        self.room, self.batches = room, list[int]()
        self.config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace(vocab_size=8))

    def __call__(self, input_ids: torch.Tensor, **others: Any) -> Any:
        if len(input_ids) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.batches.append(len(input_ids))
        return types.SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 8).float())


def test_scoring_goes_on_with_smaller_batches(card: Memory) -> None:
    windows = [Window(n, (1,), (2, 3, 4 + n % 3), 3) for n in range(9)]
    whole, tight = Small(8), Small(3)
    steps: list[int] = []
    expected, _ = score(whole, windows, pad=0, batch_size=8, dtype="float32")
    found, sizes = score(tight, windows, pad=0, batch_size=8, dtype="float32", on_batch=steps.append)
    assert found.tolist() == expected.tolist()
    assert sizes.tolist() == [3.0] * 9
    assert tight.batches == steps == [2, 2, 2, 2, 1]  # once found, the size stays
    assert card.emptied == 2


def test_one_window_that_does_not_fit() -> None:
    with pytest.raises(
        OutOfMemory, match=r"scoring a text of 4 tokens: expected enough memory.*evaluation\.batch_size"
    ):
        score(Small(0), [Window(0, (1,), (2, 3, 4), 3)], pad=0, batch_size=8, dtype="float32")


def test_the_loss_in_parts_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from bam_lora import learned_weights

    torch.manual_seed(0)
    logits, labels = torch.randn(50, 16, requires_grad=True), torch.randint(16, (50,))
    labels[::7] = -100
    whole = _cross_entropy(logits, labels)
    (expected,) = torch.autograd.grad(whole, logits)
    monkeypatch.setattr(learned_weights, "CHUNK_BYTES", 4 * 16 * 8)
    parts = _nats(logits, labels)
    (found,) = torch.autograd.grad(parts, logits)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.allclose(found, expected, atol=1e-7)


def test_a_large_vocabulary_makes_batches_smaller() -> None:
    def model(size: int) -> Any:
        text = types.SimpleNamespace(vocab_size=size)
        return types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda: text))

    assert fitting_tokens(model(384), 8192) == 8192
    assert 600 < fitting_tokens(model(256_000), 8192) < 800


def recipe(**changes: Any) -> Recipe:
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, **changes.pop("training", {})}
    values = {"base": "b", "output": "o", "data": {"target": [{"path": "t.jsonl"}]}, "training": training}
    return recipe_from_dict({**values, **changes})


def test_what_takes_less_memory_does_not_make_another_run() -> None:
    begun = recipe_key(recipe())
    assert recipe_key(recipe(training={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16})) == begun
    assert recipe_key(recipe(training={"checkpointing": False})) == begun
    assert recipe_key(recipe(evaluation={"batch_size": 1})) == begun
    assert recipe_key(recipe(training={"gradient_accumulation_steps": 8})) != begun
    assert recipe_key(recipe(training={"learning_rate": 1e-3})) != begun


def test_a_run_that_did_not_fit_goes_on_with_smaller_batches(
    tiny_base: Path, german_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wanted(batch: int, accumulation: int) -> Recipe:
        return recipe_from_dict(
            {
                "base": str(tiny_base),
                "output": "unused",
                "data": {"target": [{"path": str(german_file)}], "sequence_length": 64},
                "bam": {"slices": 2, "branches": 2},
                "lora": {"r": 2},
                "training": {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation},
                "evaluation": {"batch_size": batch},
            }
        )

    whole = stages.train_branch

    def for_small_batches(model: Any, job: Any, folder: Path, make: Any, **others: Any) -> Any:
        if make.arguments["per_device_train_batch_size"] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(model, job, folder, make, **others)

    monkeypatch.setattr(stages, "train_branch", for_small_batches)
    with pytest.raises(
        OutOfMemory, match=r"\Atraining iteration 1/1, branch 1, slice 1: .*the run goes on\. A shorter"
    ):
        run(wanted(4, 2), tmp_path / "run")
    plan = (tmp_path / "run" / "plan.json").read_bytes()
    data = (tmp_path / "run" / "data" / "01" / "done.json").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"other values for .*per_device_train_batch_size"):
        run(wanted(1, 2), tmp_path / "run")
    run(wanted(1, 8), tmp_path / "run")
    assert (tmp_path / "run" / "plan.json").read_bytes() == plan
    assert (tmp_path / "run" / "data" / "01" / "done.json").stat().st_mtime_ns == data
    assert "per_device_train_batch_size: 1" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert (tmp_path / "run" / "model" / "config.json").is_file()
