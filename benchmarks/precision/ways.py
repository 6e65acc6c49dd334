"""Four ways of folding iteration after iteration into bf16 weights; each yields what it has achieved so far.

All take the weights at the start {name: W_oi in bf16}, the iterations [{name: [(A_ri, B_or) of each branch]}], whose
deltas are averaged, the iterations to look at, and a folder to work in, and yield (iterations done, {name: change in
float64}). Shapes: o output, i input, r rank, R stacked rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import bitsandbytes.functional as bnb
import peft
import torch
from safetensors.torch import load_file, save_file

from bam_lora.coefficients import Coefficients
from bam_lora.folding import fold_into
from bam_lora.ledger import Ledger

Branch = tuple[torch.Tensor, torch.Tensor]
Weights = Mapping[str, torch.Tensor]
Step = Mapping[str, Sequence[Branch]]
Achieved = Iterator[tuple[int, dict[str, torch.Tensor]]]


def ledger(starts: Weights, steps: Sequence[Step], looks: Sequence[int], folder: Path) -> Achieved:
    """bam_lora's own: adapters recorded in a ledger, each look a fold of the original base."""
    save_base(starts, folder / "base")
    history = Ledger.start(folder, {"name": "base", "revision": None, "files": {}})
    for number, step in enumerate(steps, start=1):
        paths = save_adapters(step, folder, f"iterations/{number:02d}")
        even = Coefficients.scalar([1 / len(paths)] * len(paths))
        history.record(number, paths, "linear", {f"{name}.weight": even for name in step})
    for look in looks:
        fold_into(folder / "base", history.view(look), folder / "folded", key=f"{look}")
        yield look, changes(starts, load_model(folder / "folded"))


def bf16(starts: Weights, steps: Sequence[Step], looks: Sequence[int], folder: Path) -> Achieved:
    """Each iteration added in fp32 to the rounded weights of the one before."""
    now = dict(starts)
    for number, step in enumerate(steps, start=1):
        now = {name: (weight.float() + delta(step[name])).to(torch.bfloat16) for name, weight in now.items()}
        if number in looks:
            yield number, changes(starts, now)


def nf4(starts: Weights, steps: Sequence[Step], looks: Sequence[int], folder: Path) -> Achieved:
    """Each iteration added to the dequantised weights, which are quantised again, as on a 4-bit model."""
    held = {name: bnb.quantize_4bit(weight.float(), quant_type="nf4") for name, weight in starts.items()}
    quantised = {name: bnb.dequantize_4bit(*pair) for name, pair in held.items()}
    for number, step in enumerate(steps, start=1):
        for name, pair in held.items():
            held[name] = bnb.quantize_4bit(bnb.dequantize_4bit(*pair) + delta(step[name]), quant_type="nf4")
        if number in looks:
            yield number, changes(quantised, {name: bnb.dequantize_4bit(*pair) for name, pair in held.items()})


def peft_merge(starts: Weights, steps: Sequence[Step], looks: Sequence[int], folder: Path) -> Achieved:
    """Each iteration's adapters loaded into PEFT, combined exactly, merged into a bf16 model and unloaded."""
    model = torch.nn.Module()
    for name, weight in starts.items():
        place(model, name, weight)
    for number, step in enumerate(steps, start=1):
        paths = [folder / path for path in save_adapters(step, folder, "adapters")]
        names = [path.name for path in paths]
        wrapped = peft.PeftModel.from_pretrained(model, str(paths[0]), adapter_name=names[0])
        for path in paths[1:]:
            wrapped.load_adapter(str(path), path.name)
        wrapped.add_weighted_adapter(names, [1 / len(names)] * len(names), "all", combination_type="cat")
        wrapped.set_adapter("all")
        model = wrapped.merge_and_unload()
        if number in looks:
            yield number, changes(starts, {name: model.get_submodule(name).weight.detach() for name in starts})


METHODS: dict[str, Callable[[Weights, Sequence[Step], Sequence[int], Path], Achieved]] = {
    "ledger": ledger,
    "bf16": bf16,
    "peft": peft_merge,
    "nf4": nf4,
}


def delta(branches: Sequence[Branch]) -> torch.Tensor:
    """The average of the branches' deltas, in fp32."""
    B_oR = torch.cat([B_or for _, B_or in branches], dim=1)
    return (B_oR / len(branches)) @ torch.cat([A_ri for A_ri, _ in branches])


def changes(before: Weights, after: Weights) -> dict[str, torch.Tensor]:
    """{name: after - before}, in float64."""
    return {name: after[name].double() - weight.double() for name, weight in before.items()}


def place(model: torch.nn.Module, name: str, weight: torch.Tensor) -> None:
    """Puts a linear layer of this weight where its name says."""
    *parents, last = name.split(".")
    for part in parents:
        if not hasattr(model, part):
            model.add_module(part, torch.nn.Module())
        model = model.get_submodule(part)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    model.add_module(last, layer)


def save_base(starts: Weights, folder: Path) -> None:
    """A model folder of these weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.weight": weight for name, weight in starts.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of such a folder."""
    loaded = load_file(folder / "model.safetensors")
    return {name.removesuffix(".weight"): weight.clone() for name, weight in loaded.items()}


def save_adapters(step: Step, root: Path, folder: str) -> list[str]:
    """One PEFT adapter a branch, alpha = rank; returns their paths relative to the root."""
    paths = []
    for number in range(len(next(iter(step.values())))):
        path = f"{folder}/branch-{number + 1}"
        paths.append(path)
        tensors = {}
        for name, branches in step.items():
            for half, factor in zip("AB", branches[number], strict=True):
                tensors[f"base_model.model.{name}.lora_{half}.weight"] = factor.contiguous()
        rank = next(iter(step.values()))[number][0].shape[0]
        config = {"peft_type": "LORA", "base_model_name_or_path": None, "r": rank, "lora_alpha": rank,
                  "target_modules": sorted(step), "lora_dropout": 0.0, "bias": "none"}  # fmt: skip
        (root / path).mkdir(parents=True, exist_ok=True)
        save_file(tensors, root / path / "adapter_model.safetensors", {"format": "pt"})
        (root / path / "adapter_config.json").write_text(json.dumps(config))
    return paths
