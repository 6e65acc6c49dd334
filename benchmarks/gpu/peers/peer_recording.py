"""Loss, time and tokens of every step, taken from a trainer in the same way whichever library it belongs to.

Losses are what `training_step` returns, summed over a step's micro-batches: each is the micro-batch's share of the
mean over the step's trained tokens. So nothing hangs on what is logged, nor how often.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "triton", "xformers",
    "flash-attn", "liger-kernel", "kernels", "unsloth", "unsloth_zoo", "axolotl", "bam-lora",
)  # fmt: skip
_SAID = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16", "tf32", "max_length", "packing",
    "packing_strategy", "padding_free", "seed", "data_seed", "dataloader_num_workers", "dataloader_pin_memory",
    "logging_steps", "use_liger_kernel", "torch_compile",
)  # fmt: skip
_CYCLE = 8191  # a prime: places count in a checksum, and no sum of a step overflows 64 bits


class Recorder:
    """Watches one trainer.

    Attributes:
        losses: Per step, in nats per trained token.
        step_seconds: From the end of the step before, callbacks and waiting for data included; the device is settled.
        step_cpu_seconds: Processor time of this process in it, all threads.
        tokens: Tokens per step that are not padding.
        checksums: Per step a number made of its tokens and their places: equal rows in equal order have equal ones.
    """

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self._pending: list[tuple[Any, Any, Any]] = []
        self._since = self._cpu_since = 0.0
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.step_cpu_seconds: list[float] = []
        self.tokens: list[int] = []
        self.checksums: list[int] = []

    def attach(self, trainer: Any) -> None:
        """Watches a trainer; its other callbacks should be in place, as what they take is part of a step."""
        step = trainer.training_step

        def training_step(model: Any, inputs: Any, *args: Any, **given: Any) -> Any:
            counted = _counted(inputs)
            loss = step(model, inputs, *args, **given)
            self._pending.append((*counted, loss.detach()))
            return loss

        trainer.training_step = training_step
        trainer.add_callback(_callback(self))

    def begin(self) -> None:
        """Training begins."""
        self._settle()
        self._since, self._cpu_since = time.perf_counter(), time.process_time()

    def step_end(self) -> None:
        """A step is over; what was left on the device is fetched after the clock was read."""
        self._settle()
        now, cpu = time.perf_counter(), time.process_time()
        self.step_seconds.append(now - self._since)
        self.step_cpu_seconds.append(cpu - self._cpu_since)
        self.tokens.append(sum(int(tokens) for tokens, _, _ in self._pending))
        self.checksums.append(sum((place + 1) * int(total) for place, (_, total, _) in enumerate(self._pending)))
        self.losses.append(sum(float(loss) for _, _, loss in self._pending))
        self._pending.clear()
        self._since, self._cpu_since = time.perf_counter(), time.process_time()


def _counted(inputs: Any) -> tuple[Any, Any]:
    """(tokens that are not padding, checksum) of a micro-batch, on its device: nothing waits for it."""
    import torch

    ids = inputs["input_ids"].reshape(-1).long()
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.reshape(-1) != 0
    places = torch.arange(len(ids), device=ids.device) % _CYCLE + 1
    return real.sum(), ((ids + 1) * places * real).sum()


def _callback(recorder: Recorder) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            recorder.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            recorder.step_end()

    return Watch()


def effective(trainer: Any, **more: Any) -> dict[str, Any]:
    """What a trainer really used, read from it after training, and `more` that only the way knows."""
    arguments, model = trainer.args, trainer.model
    said = {name: _plain(getattr(arguments, name)) for name in _SAID if hasattr(arguments, name)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kinds = [(type(module).__module__.partition(".")[0], type(module).__name__) for module in model.modules()]
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return {
        **said,
        "checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
        "attention": model.config._attn_implementation,
        "optimizer": type(inner).__name__,
        "adapter_parameters": sum(parameter.numel() for parameter in trained),
        "adapter_dtypes": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in trained}),
        "linear_4bit": kinds.count(("bitsandbytes", "Linear4bit")),
        "rows": _length(trainer.train_dataset),
        **more,
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | None) else str(getattr(value, "value", value))


def _length(rows: Any) -> int | None:
    return len(rows) if hasattr(rows, "__len__") else None


def versions() -> dict[str, str]:
    """What is installed of `PACKAGES`, and Python's version."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
