"""The GPU benchmark without a GPU: its inputs, its holder, its counting, what it makes of results, a branch, a fold."""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


def load(name: str) -> ModuleType:
    """A module of the benchmark; neither its folder nor its modules' plain names stay behind for other tests."""
    known = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
        for new in set(sys.modules) - known:
            file = getattr(sys.modules[new], "__file__", None) or ""
            if file.startswith(str(FOLDER)) or new == "peers":
                del sys.modules[new]


measuring, holding, flops = load("measuring"), load("holding"), load("flops")
inputs, text, shapes, plan = load("inputs"), load("text"), load("shapes"), load("plan")
branch_job, fold_job = load("branch_job"), load("fold_job")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark's folder with the tiny shape's inputs."""
    work = tmp_path_factory.mktemp("gpu")
    inputs.make_inputs(shapes.SHAPES["tiny"], work, "cpu", 4000)
    return work


@pytest.mark.parametrize("name", sorted(shapes.SHAPES))
def test_shapes_have_as_many_parameters_as_their_models(name: str) -> None:
    shape = shapes.SHAPES[name]
    sizes = {tensor: math.prod(size) for tensor, size in inputs.model_layout(shape)}
    assert shape.parameters in (None, sum(sizes.values()))
    assert ("lm_head.weight" in sizes) is not shape.config["tie_word_embeddings"]


def test_the_model_is_one_that_a_run_takes(made: Path) -> None:
    from bam_lora.base import Loading, find_base, load_model, load_tokenizer
    from bam_lora.merge import open_adapters
    from bam_lora.views import count_linear_modules

    root = made / "inputs" / "tiny"
    base = find_base(str(root / "base"))
    model = load_model(base.folder, Loading(4))
    assert count_linear_modules(model) == {"4bit": 14, "8bit": 0, "unquantised": 1}
    assert len(load_tokenizer(base.folder)) == shapes.SHAPES["tiny"].config["vocab_size"]
    assert (
        len(open_adapters([root / "adapter-1", root / "adapter-2"], [0.5, 0.5], "linear", any_base=False).adapters) == 2
    )
    assert (root / "made.json").is_file()


def test_the_model_is_in_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bam_lora.checkpoint import open_checkpoint

    monkeypatch.setattr(inputs, "SHARD_BYTES", 150_000)
    shape = shapes.SHAPES["tiny"]
    layout = inputs.model_layout(shape)
    size = inputs.write_base(tmp_path / "base", shape, layout, "cpu")
    checkpoint = open_checkpoint(tmp_path / "base")
    assert len(checkpoint.shards) > 2
    assert {name: tuple(record.shape) for name, record in checkpoint.tensors().items()} == dict(layout)
    assert size == 2 * sum(math.prod(one) for _, one in layout)


def test_every_word_of_the_text_is_one_token(made: Path) -> None:
    from bam_lora.base import load_tokenizer

    tokenizer = load_tokenizer(made / "inputs/tiny/base")
    known = text.words(shapes.SHAPES["tiny"].config["vocab_size"])
    assert len(set(known)) == len(known) > 600
    assert all(len(tokenizer(word)["input_ids"]) == 1 for word in known)
    documents = [json.loads(line)["text"] for line in (made / "inputs/tiny/text.jsonl").read_text().splitlines()]
    counts = [len(tokenizer(one, verbose=False)["input_ids"]) for one in documents]
    assert counts == [len(one.split()) for one in documents]
    assert sum(counts) >= 4000 > sum(counts[:-1])


class FakeGpu:
    """Gives out memory in grains, and some of it to nobody."""

    def __init__(self, total: int, stuck_at: int = 0) -> None:
        self.left = total
        self.stuck_at = stuck_at

    def free(self) -> int:
        return self.left

    def take(self, size: int) -> None:
        self.left = max(self.stuck_at, self.left - size)


def test_the_holder_leaves_what_a_card_has() -> None:
    target = round((12 - holding.DESKTOP_GIB) * holding.GIB)
    gpu = FakeGpu(139 * holding.GIB)
    taken = holding.fill(gpu.free, gpu.take, target)
    assert target <= gpu.left < target + (2 << 20)
    assert taken == 139 * holding.GIB - gpu.left
    smaller = FakeGpu(8 * holding.GIB)
    assert holding.fill(smaller.free, smaller.take, target) == 0
    assert smaller.left == 8 * holding.GIB


def test_the_holder_says_when_memory_cannot_be_taken() -> None:
    gpu = FakeGpu(20 * holding.GIB, stuck_at=13 * holding.GIB)
    with pytest.raises(holding.CannotHold, match=r"expected 12,884,901,888 bytes free, found 13,958,643,712"):
        holding.fill(gpu.free, gpu.take, 12 * holding.GIB)


def test_the_holder_lives_as_long_as_its_context() -> None:
    with holding.Card(12, "cpu") as card:
        holder = card._holder
        assert holder.poll() is None
        assert card.facts == {"card_gib": 12, "free_bytes": None, "held_bytes": None}
    assert holder.returncode == 0
    with holding.Card(None, "cpu") as card:
        assert card._holder is None


def test_the_holder_ends_when_its_parent_is_killed() -> None:
    code = (
        "import holding, time\nwith holding.Card(12, 'cpu') as c:\n print(c._holder.pid, flush=True)\n time.sleep(60)"
    )
    environ = {**os.environ, "PYTHONPATH": str(FOLDER)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ) as parent:
        assert parent.stdout is not None
        holder = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    for _ in range(200):
        try:
            os.kill(holder, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{holder}/stat").exists() and Path(f"/proc/{holder}/stat").read_text().split()[2] == "Z":
            return  # ended, and nobody here to collect it
        time.sleep(0.05)
    pytest.fail("the holder is still there")


class FakeNvml:
    """NVML with one GPU of 100 bytes, of which so many are free."""

    def __init__(self) -> None:
        self.free = 90
        self.asked: list[Any] = []

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        self.asked.append(index.value)
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        self.asked.append(name)
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free, memory._obj.used = 100, self.free, 7
        return 0


def test_the_peak_is_what_the_driver_gave_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    nvml = FakeNvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    for name, value in (("max_memory_reserved", 11), ("memory_allocated", 5), ("max_memory_allocated", 6)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with measuring.DevicePeak("cuda") as peak:
        nvml.free = 60
        noted = peak.mark("full")
        nvml.free = 20
        time.sleep(0.1)  # seen by the sampler alone
        nvml.free = 80
    assert (peak.driver_bytes, peak.torch_bytes, peak.source) == (70, 11, "NVML")
    assert noted == {"name": "full", "driver_bytes": 30, "torch_allocated_bytes": 5, "torch_peak_bytes": 6}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    measuring.DevicePeak("cuda:0")
    assert nvml.asked == [3, b"GPU-1234"]


def test_on_a_cpu_the_peak_is_the_resident_set() -> None:
    with measuring.DevicePeak("cpu") as peak:
        held = bytearray(1 << 20)
        peak.mark("held")
    assert len(held) == 1 << 20
    assert peak.driver_bytes == peak.marks[0]["driver_bytes"] == measuring.peak_rss_bytes() > 1 << 25
    assert peak.torch_bytes is None


def test_steps_are_timed_with_what_is_around_them() -> None:
    begun: list[int] = []
    clock = measuring.step_clock("cpu", lambda: begun.append(1))
    clock.on_train_begin(None, None, None)
    for loss in (3.0, 2.0):
        time.sleep(0.02)
        clock.on_step_end(None, None, None)
        clock.on_log(None, None, None, logs={"loss": loss})
    clock.on_log(None, None, None, logs={"train_runtime": 1.0})
    assert begun == [1]
    assert clock.losses == [3.0, 2.0]
    assert all(0.02 <= seconds < 2 for seconds in clock.step_seconds)


def test_operations_of_a_token() -> None:
    from bam_lora.memory_shape import shape_of_config

    assert flops.seen_tokens([1]) == 1
    assert flops.seen_tokens([3, 1]) == (1 + 2 + 3 + 1) / 4
    shape = shapes.SHAPES["llama-3.1-8b"]
    found = flops.flops_per_token(shape_of_config(shape.config, "x"), 1000, 10.0)
    # All weights but the embedding are multiplied with, and the norms.
    assert found["linear"] == 4 * (shape.parameters - 128256 * 4096 - 65 * 4096)
    assert found["adapter"] == 6000
    assert found["attention"] == 12 * 4096 * 32 * 10
    assert found["total"] == found["linear"] + found["adapter"] + found["attention"]
    assert flops.peak_of("NVIDIA H200") == 989e12
    assert flops.peak_of("NVIDIA GeForce GTX 1080") is None


def test_what_is_compared_in_speed_is_what_fit_chooses_for_24_gb() -> None:
    from bam_lora.fit import fit_recipe
    from bam_lora.memory_shape import shape_of_config
    from bam_lora.recipe import recipe_from_dict

    settings = {"length": 2048, "step_tokens": 16384, "steps": 1, "learning_rate": 1e-4}
    recipe = recipe_from_dict(branch_job.recipe_values(settings, Path("base")))
    outline = shape_of_config(shapes.SHAPES["llama-3.1-8b"].config, "8b")
    for attention in (None, "flash_attention_2"):
        training = fit_recipe(recipe, outline, 24 << 30, attention=attention).applied(recipe).training
        chosen = (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.checkpointing)
        assert chosen == tuple(plan.SPEED[name] for name in ("batch", "accumulation", "checkpointing"))


def test_the_most_important_comes_first() -> None:
    names = [job.name for job in plan.jobs([name for name in plan.SCALES if name != "tiny"], plan.WAYS)]
    assert len(set(names)) == len(names)
    assert names[:4] == [
        "branch llama-3.1-8b, length 2048, 12 GB",
        "branch llama-3.1-8b, length 8192, 24 GB",
        "speed llama-3.1-8b, ours",
        "speed llama-3.1-8b, trl-best",
    ]
    assert names.index("fold llama-3.1-8b") < names.index("run llama-3.1-8b, 24 GB") < 10
    again = next(job for job in plan.jobs(["tiny"], ["ours-again"]) if job.kind == "speed")
    assert again.settings == plan.speed("tiny", "ours").settings


def test_a_branch_is_measured(made: Path) -> None:
    settings = {"shape": "tiny", "work": str(made), "device": "cpu", "card_gib": 12, "length": 32, "step_tokens": 64,
                "steps": 3, "learning_rate": 1e-3}  # fmt: skip
    result = branch_job.main(settings)
    assert len(result["step_seconds"]) == len(result["losses"]) == 3
    assert result["effective"] == {"batch": 2, "accumulation": 1, "checkpointing": False, "length": 32,
                                   "optimizer": "adamw_torch_fused", "attention": "sdpa"}  # fmt: skip
    assert 50 < result["tokens"][0] <= 64
    assert result["tokens_per_second"] == pytest.approx(result["tokens"][0] / result["step_seconds"][2])
    assert result["adapter_parameters"] == 131072
    memory = result["memory"]
    assert [stage["name"] for stage in memory["stages"]] == [
        "base loaded", "adapter and trainer made", "after the first step"
    ]  # fmt: skip
    assert memory["estimated_bytes"] == sum(part["bytes"] for part in memory["estimated_components"])
    assert memory["estimated_over_measured"] is None  # a CPU's process is more than its model


def test_a_fold_is_measured(made: Path) -> None:
    result = fold_job.main({"shape": "tiny", "work": str(made), "device": "cpu"})
    assert result["elements"] == 205120
    assert result["identical"] == 1.0
    assert result["device_over_copy"] == result["device_seconds"] / result["copy_seconds"]
    assert not (made / "fold").exists()


def test_numbers_that_differ_are_counted(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for name, last in (("one", 2.0), ("other", 2.0 + 2**-6)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([1.0, -0.0, last]).bfloat16()}, tmp_path / name / "model.safetensors")
    found = fold_job.identical(tmp_path / "one", tmp_path / "other", "cpu")
    assert found == {"elements": 3, "different": 1, "identical": pytest.approx(2 / 3)}
