"""The GPU benchmark without a GPU: its inputs, its plan, a branch, a fold."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from versions import before

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


flops = load("flops")
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


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_peak_is_that_of_the_very_gpu(name: str, peak: float | None) -> None:
    assert flops.peak_of(name) == peak


def test_what_is_compared_in_speed_is_what_fit_chooses_for_24_gb() -> None:
    from bam_lora.fit import fit_recipe
    from bam_lora.memory_shape import shape_of_config
    from bam_lora.recipe import recipe_from_dict

    settings = {"length": 2048, "step_tokens": 16384, "steps": 1, "learning_rate": 1e-4}
    recipe = recipe_from_dict(branch_job.recipe_values(settings, Path("base")))
    outline = shape_of_config(shapes.SHAPES["llama-3.1-8b"].config, "8b")
    expected = tuple(plan.SPEED[name] for name in ("batch", "accumulation", "checkpointing"))
    if before("trl", "1.14"):  # which holds all logits, 3.7 GB of them for 2,048 tokens
        expected = (2, 4, True)
    for attention in (None, "flash_attention_2"):
        training = fit_recipe(recipe, outline, 24 << 30, attention=attention).applied(recipe).training
        chosen = (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.checkpointing)
        assert chosen == expected


def test_the_most_important_comes_first() -> None:
    names = [job.name for job in plan.jobs([name for name in plan.SCALES if name != "tiny"], plan.WAYS)]
    assert len(set(names)) == len(names)
    assert names[:5] == [
        "branch llama-3.1-8b, length 2048, 12 GB",
        "branch llama-3.1-8b, length 2048, 12 GB, one row at a time",  # if what is chosen for the card does not fit
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
                                   "optimizer": "adamw_torch_fused", "attention": "packed",
                                   "kernels": None}  # fmt: skip
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
    assert result["device_over_copy"] == result["device_seconds"] / min(
        result["copy_seconds"], result["copy_again_seconds"]
    )
    assert result["cpu_wrote_to"] == "disk"
    assert not (made / "fold").exists()


def test_numbers_that_differ_are_counted(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for name, last in (("one", 2.0), ("other", 2.0 + 2**-6)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([1.0, -0.0, last]).bfloat16()}, tmp_path / name / "model.safetensors")
    found = fold_job.identical(tmp_path / "one", tmp_path / "other", "cpu")
    assert found == {"elements": 3, "different": 1, "identical": pytest.approx(2 / 3)}
