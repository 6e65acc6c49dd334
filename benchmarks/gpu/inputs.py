"""What the GPU benchmark works on: a model of a real shape with random weights, two adapters, a tokenizer, text.

    python benchmarks/gpu/inputs.py SETTINGS.json

Weights are drawn on the device and written one tensor after the other, so that neither it nor the host holds the
model. Their spread is that of a trained model, the adapters' deltas are 1 % of it. All of it is seeded, and made once.
"""

from __future__ import annotations

import math
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from inputs_place import MADE, folder_of
from job import job
from shapes import SHAPES, Shape
from text import write_text, write_tokenizer

from bam_lora.memory_shape import shape_of_config
from bam_lora.safetensors_stream import write_stream
from bam_lora.store import require_space, write_json

RANK, ALPHA = 64, 128
SHARD_BYTES = 4 << 30
_WEIGHT_STD = 0.02
_RELATIVE_DELTA = 0.01  # of each adapter
Layout = list[tuple[str, tuple[int, ...]]]


def make_inputs(shape: Shape, work: Path, device: str, text_tokens: int) -> dict[str, Any]:
    """Makes all of it for one shape, in a folder that holds nothing else.

    Args:
        shape: The model.
        work: Folder of the benchmark.
        device: Where numbers are drawn.
        text_tokens: About how many tokens of text.

    Returns:
        {"parameters", "base_bytes", "base_seconds", "adapters_seconds", "text_seconds"}.

    Raises:
        UserError: If the disk has no room.
    """
    root = folder_of(shape.name, work)
    shutil.rmtree(root, ignore_errors=True)
    linears = shape_of_config(shape.config, shape.name).linears
    layout = model_layout(shape)
    parameters = sum(math.prod(size) for _, size in layout)
    assert shape.parameters in (None, parameters), (shape.name, parameters)
    adapters = 2 * 4 * RANK * sum(one.rows + one.columns for one in linears)
    require_space(root, 2 * parameters + adapters + (1 << 20), f"the model {shape.name} and two adapters")
    started = time.perf_counter()
    facts = {"parameters": parameters, "base_bytes": write_base(root / "base", shape, layout, device)}
    based = time.perf_counter()
    for number in (1, 2):
        write_adapter(root / f"adapter-{number}", root / "base", linears, device, seed=number)
    adapted = time.perf_counter()
    write_text(root / "text.jsonl", shape.config["vocab_size"], text_tokens, seed=0)
    write_text(root / "held-out.jsonl", shape.config["vocab_size"], text_tokens // 10, seed=1)
    texts = time.perf_counter() - adapted
    seconds = {"base_seconds": based - started, "adapters_seconds": adapted - based, "text_seconds": texts}
    write_json(root / MADE, {**facts, **seconds})
    return {**facts, **seconds}


def model_layout(shape: Shape) -> Layout:
    """Name and size of every tensor in the model's files, as transformers names them; a tied head is not among them."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[shape.config["model_type"]].from_dict(dict(shape.config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def write_base(folder: Path, shape: Shape, layout: Layout, device: str) -> int:
    """Writes weights in shards with their index, config and tokenizer; returns the bytes of the weights."""
    shards = _shards(layout)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        entries = [(name, "BF16", size) for name, size in shard]
        write_stream(folder / file, entries, _weights(shard, device), {"format": "pt"})
        index |= {name: file for name, _ in shard}
    total = sum(2 * math.prod(size) for _, size in layout)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    last = shape.config["vocab_size"] - 1
    write_json(folder / "config.json", {**shape.config, "bos_token_id": last - 1, "eos_token_id": last})
    write_tokenizer(folder, shape.config)  # whose special tokens are its last
    return total


def _shards(layout: Layout) -> list[Layout]:
    shards: list[Layout] = [[]]
    room = SHARD_BYTES
    for name, size in layout:
        needed = 2 * math.prod(size)
        if needed > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((name, size))
        room -= needed
    return shards


def _weights(shard: Layout, device: str) -> Iterator[torch.Tensor]:
    for name, size in shard:
        if len(size) == 1:  # a norm
            yield torch.ones(size, dtype=torch.bfloat16)
        else:
            yield _gaussian(name, size, _WEIGHT_STD, torch.bfloat16, device)


def _gaussian(name: str, size: Sequence[int], std: float, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random numbers, drawn on the device, on the CPU."""
    generator = torch.Generator(device=device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*size, generator=generator, device=device, dtype=dtype).mul_(std).cpu()


def write_adapter(folder: Path, base: Path, linears: Sequence[Any], device: str, seed: int) -> None:
    """An adapter on all linear layers as PEFT writes it: fp32 factors, their delta 1 % of the weights."""
    layout: list[tuple[str, str, tuple[int, ...]]] = []
    spreads: dict[str, float] = {}
    for linear in linears:
        A_std = linear.columns**-0.5
        B_std = _RELATIVE_DELTA * _WEIGHT_STD / (ALPHA / RANK * RANK**0.5 * A_std)
        for half, size, std in (("A", (RANK, linear.columns), A_std), ("B", (linear.rows, RANK), B_std)):
            name = f"base_model.model.{linear.name}.lora_{half}.weight"
            layout.append((name, "F32", size))
            spreads[name] = std
    tensors = (_gaussian(f"{seed} {name}", size, spreads[name], torch.float32, device) for name, _, size in layout)
    write_stream(folder / "adapter_model.safetensors", layout, tensors, {"format": "pt"})
    write_json(
        folder / "adapter_config.json",
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.resolve()), "r": RANK,
         "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
         "target_modules": sorted({linear.name.rpartition(".")[2] for linear in linears}), "inference_mode": True},
    )  # fmt: skip


def main(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the inputs of a shape."""
    shape = SHAPES[settings["shape"]]
    return make_inputs(shape, Path(settings["work"]), settings["device"], settings["text_tokens"])


if __name__ == "__main__":
    job(main)
