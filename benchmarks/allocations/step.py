"""One branch's steps over fake tensors on a GPU that is not there, and what torch would allocate for them.

    python benchmarks/allocations/step.py SETTINGS.json

The trainer is the very one of a run (`SftBranch`), with the recipe that `check --fit` makes for the card; the forward
and backward passes, clipping and the optimizer are transformers', TRL's, PEFT's and bitsandbytes' own code.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretended_gpu import fake_tensors, pretend, real_tensors

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "gpu"))  # for its shapes
_PASSES = (1, 2)
"""Micro-batches of the steps: after the first there is the optimizer's state, then there are gradients, too."""


def main(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, what `check` estimates for it, and what torch would allocate."""
    from counting import Allocations

    from bam_lora.memory import estimate

    recipe, shape, config = recipe_of(settings)
    attention = settings["attention"]
    found = estimate(recipe, shape, attention=attention, device="cuda")
    counted = Allocations()
    with fake_tensors(), counted:
        stages = train(recipe, config, attention, counted)
    training = recipe.training
    return {
        "batch": training.per_device_train_batch_size,
        "checkpointing": training.checkpointing,
        "length": recipe.data.sequence_length,
        "optimizer": training.optim,
        "bits": recipe.quantization.bits,
        "attention": attention,
        "stages": stages,
        "allocated": counted.peak,
        "at_peak": {name: size for name, size in counted.at_peak.items() if size},
        "reserved": counted.allocator.reserved_peak,
        "estimated": [asdict(one) for one in found.training],
    }


def recipe_of(settings: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The recipe, fitted to a card where one is given, the base's shape and its config."""
    from shapes import SHAPES

    from bam_lora.fit import fit_recipe
    from bam_lora.memory_shape import shape_of_config
    from bam_lora.recipe import recipe_from_dict

    config = SHAPES[settings["shape"]].config
    shape = shape_of_config(config, settings["shape"])
    recipe = recipe_from_dict(settings["recipe"])
    if settings["card_gib"] is not None:
        memory = round(settings["card_gib"] * 2**30)
        fit = fit_recipe(recipe, shape, memory, attention=settings["attention"], device="cuda")
        recipe = fit.applied(recipe)
    return recipe, shape, config


def train(recipe: Any, config: Mapping[str, Any], attention: str | None, counted: Any) -> dict[str, int]:
    """Takes a few steps; returns the bytes that are allocated after each stage."""
    from fake_base import fake_base

    from bam_lora.attention import register_attention
    from bam_lora.branch_adapters import no_input_casting, settle_adapter
    from bam_lora.views import branch_view

    register_attention(attention)
    counted.stage = "base"
    base = fake_base(config, attention, recipe.quantization.bits)
    stages = {"base": counted.allocated}
    counted.stage = "adapter"
    with tempfile.TemporaryDirectory() as folder:
        trainer = branch_trainer(recipe, branch_view(base), Path(folder))
        settle_adapter(trainer.model, base)
        stages["adapter"] = counted.allocated
        batch = first_batch(trainer, recipe)
        describe_documents(recipe)
        with no_input_casting(trainer):
            take_steps(trainer, batch, counted)
    stages["between steps"] = counted.allocated
    return stages


def branch_trainer(recipe: Any, view: Any, folder: Path) -> Any:
    """What `Front.trainer` gives a branch of a recipe, over full rows of two documents each."""
    from datasets import Dataset

    import bam_lora.quickstart
    from bam_lora.base import Loading, load_tokenizer
    from bam_lora.sft_branch import SftBranch

    length, batch = recipe.data.sequence_length, recipe.training.per_device_train_batch_size
    with real_tensors():
        rows = Dataset.from_dict({"input_ids": [[5] * length] * batch, "seq_lengths": [documents(length)] * batch})
        tokenizer = load_tokenizer(Path(bam_lora.quickstart.__file__).parent / "base")
    return SftBranch(
        how=Loading(bits=recipe.quantization.bits),
        tokenizer=tokenizer,
        rows=rows,
        adapter=recipe.lora.arguments(),
        arguments=recipe.training.sft_arguments(),
        steps=len(_PASSES),
        seed=recipe.seed,
        sequence_length=length,
    )(view, folder, [])


def documents(length: int) -> list[int]:
    """Lengths of a row's documents."""
    return [length // 2, length - length // 2]


def first_batch(trainer: Any, recipe: Any) -> dict[str, Any]:
    """What the trainer's collator makes of the first rows, on the CPU."""
    with real_tensors():
        rows = trainer.train_dataset
        batch: dict[str, Any] = trainer.data_collator(
            [rows[index] for index in range(recipe.training.per_device_train_batch_size)]
        )
    return batch


def describe_documents(recipe: Any) -> None:
    """Says where documents end: `packed` reads it off the positions' values, which fake tensors do not have."""
    import torch
    from transformers import AttentionMaskInterface

    from bam_lora.attention import PACKED
    from bam_lora.packed_attention import Documents

    lengths = documents(recipe.data.sequence_length) * recipe.training.per_device_train_batch_size

    def mask(**_: Any) -> Documents:
        offsets = torch.empty(len(lengths) + 1, dtype=torch.int32, device="cuda:0")
        return Documents(tuple(lengths), offsets, None)

    AttentionMaskInterface.register(PACKED, mask)


def take_steps(trainer: Any, batch: Mapping[str, Any], counted: Any) -> None:
    """Steps as the trainer's loop takes them; the peak is that of the last."""
    from torch import Tensor

    args = trainer.args
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    model.train()
    if args.activation_checkpointing:
        model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    for passes in _PASSES:
        counted.begin()
        for _ in range(passes):
            counted.stage = "batch"
            moved = {name: one.to("cuda:0") if isinstance(one, Tensor) else one for name, one in batch.items()}
            counted.stage = "forward and backward"
            trainer.training_step(model, moved)
        counted.stage = "optimizer"
        trainer.accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        model.zero_grad()


def without_kernels_of_triton() -> None:
    """TRL's loss works on its tiles in place, by Triton where there is a GPU: nothing is allocated."""
    import trl.kernels.chunked_logprob as kernels

    kernels._forward_tile = kernels._backward_tile = lambda *_, **__: None


if __name__ == "__main__":
    read = json.loads(Path(sys.argv[1]).read_text())
    pretend(Path(read["work"]))
    without_kernels_of_triton()
    print(json.dumps(main(read)))
