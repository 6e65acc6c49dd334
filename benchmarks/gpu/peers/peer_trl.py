"""TRL's `SFTTrainer` with QLoRA: at its defaults, and at the best settings that it can be given."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peer_recording import Recorder, effective
from peer_settings import Settings

SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0}
"""Of all ways but TRL's defaults."""


def train(settings: Settings, recorder: Recorder, folder: Path) -> dict[str, Any]:
    """Trains, and returns what was really used."""
    best = settings.way != "trl-defaults"
    trainer = make_trainer(settings, folder, best_arguments(settings) if best else {})
    if settings.way == "trl-best-fp32":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    recorder.attach(trainer)
    trainer.train()
    note = {} if best else {"not_as_set": "TRL's defaults: checkpointing, optimizer, schedule, attention, no packing"}
    return effective(trainer, **note)


def make_trainer(settings: Settings, folder: Path, chosen: dict[str, Any]) -> Any:
    """An `SFTTrainer` as TRL's page on PEFT shows it for QLoRA, with further arguments of `SFTConfig`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
    from trl import SFTConfig, SFTTrainer

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    model = AutoModelForCausalLM.from_pretrained(
        settings.base,
        quantization_config=quantization,
        device_map={"": 0 if settings.on_gpu else "cpu"},
        **({"attn_implementation": attention(settings)} if chosen else {}),
    )
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        max_length=settings.length,
        seed=settings.seed,
        use_cpu=not settings.on_gpu,
        save_strategy="no",  # only the steps are timed
        disable_tqdm=True,  # standard output is the result's
        **chosen,
    )
    set_seed(settings.seed)  # before 1.15 TRL draws the adapter and seeds only then
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"text": settings.texts()}),
        processing_class=AutoTokenizer.from_pretrained(settings.base),
        peft_config=LoraConfig(**adapter(settings)),
    )


def adapter(settings: Settings) -> dict[str, Any]:
    """Arguments of `LoraConfig`, the same for every way."""
    return {
        "r": settings.rank,
        "lora_alpha": 2 * settings.rank,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
    }


def best_arguments(settings: Settings) -> dict[str, Any]:
    """What a knowing user changes of TRL's defaults, each for its reason."""
    from trl import SFTConfig

    # transformers 5.2x renamed it; the old name warns there, the new one is unknown to older ones.
    checkpointing = "activation_checkpointing"
    if checkpointing not in SFTConfig.__dataclass_fields__:
        checkpointing = "gradient_checkpointing"
    return {
        **SCHEDULE,
        # No padding: rows are full. `bfd_split` rather than `bfd`, which packs as fast but throws away what of a
        # document is longer than a row. Both turn padding-free on: a micro-batch is one long row with boundaries.
        "packing": True,
        "packing_strategy": "bfd_split",
        # Half the memory traffic of fp32 (the default already; said here, as it must not depend on the version).
        "bf16": True,
        # A third more arithmetic where memory does not ask for it. Non-reentrant: the reentrant kind keeps the graph
        # of nothing but its inputs and needs these to have gradients.
        checkpointing: settings.checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False} if settings.checkpointing else None,
        # One kernel for all parameters. 8-bit states save memory, not time: for cards where they decide what fits.
        "optim": settings.optimizer,
        # fp32 products that are left (none under autocast but in a library's corners) go through tensor cores.
        **({"tf32": True} if settings.on_gpu else {}),
        # Two workers turn lists into tensors while the GPU works; on a CPU they would take the trainer's cores.
        "dataloader_num_workers": 2 if settings.on_gpu else 0,
        "dataloader_pin_memory": settings.on_gpu,
        # Fused norms, rotary embeddings and SwiGLU. Its fused cross-entropy is refused by TRL, which has one of its
        # own. TRL deprecates it for kernels from the Hub, which a machine without network cannot have.
        **({"use_liger_kernel": True} if settings.on_gpu and find_spec("liger_kernel") else {}),
        # torch.compile is left off: bitsandbytes' layers break its graphs, and packed rows change their boundaries.
        "data_seed": settings.seed if settings.order_seed is None else settings.order_seed,
        "report_to": "none",
    }


def attention(settings: Settings) -> str:
    """Flash attention where it is installed, as it takes packed documents' boundaries; else sdpa with a mask."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if settings.attention is not None:
        return settings.attention
    if settings.on_gpu and is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if settings.on_gpu and is_flash_attn_2_available() else "sdpa"
