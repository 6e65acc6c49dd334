"""What a job is given; the same for every way, and without a library, as it is read in environments of all kinds."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAYS = ("trl-defaults", "trl-best", "trl-best-fp32", "ours", "unsloth", "axolotl")


class BadSettings(Exception):
    """Settings that no job can be done by; the message is one line."""


@dataclass(frozen=True)
class Settings:
    """One job.

    Attributes:
        base: Folder of a full-precision model with its tokenizer; quantised to NF4 on loading.
        text: JSON lines with a column `text`; a line is a document.
        length: Tokens in a row.
        batch: Rows in a micro-batch.
        accumulation: Micro-batches in a step.
        steps: Optimizer steps.
        rank: Of the adapter, on all linear layers but the output head; alpha is twice the rank, without dropout.
        checkpointing: Whether activations are computed again in the backward pass.
        learning_rate: Peak, of a cosine without warm-up.
        seed: Of adapter and order.
        device: "cuda" or "cpu".
        way: One of `WAYS`.
        optimizer: As transformers names it.
        attention: As transformers names it; None: the best there is.
        order_seed: Of the order of rows alone, for ways of TRL's but its defaults; None: `seed`.
    """

    base: str
    text: str
    length: int
    batch: int
    accumulation: int
    steps: int
    rank: int
    checkpointing: bool
    learning_rate: float
    seed: int
    device: str
    way: str
    optimizer: str = "adamw_torch_fused"
    attention: str | None = None
    order_seed: int | None = None

    @classmethod
    def read(cls, file: Path) -> Settings:
        """Settings in a JSON file.

        Raises:
            BadSettings: If one is unknown or missing.
        """
        given: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        fields = dataclasses.fields(cls)
        needed = {field.name for field in fields if field.default is dataclasses.MISSING}
        unknown, missing = sorted(set(given) - {field.name for field in fields}), sorted(needed - set(given))
        if unknown or missing:
            wrong = [f"unknown: {', '.join(unknown)}"] * bool(unknown) + [f"missing: {', '.join(missing)}"] * bool(
                missing
            )
            raise BadSettings(f"{file}: expected the settings of a job, found {'; '.join(wrong)}")
        if given["way"] not in WAYS:
            raise BadSettings(f"{file}: way: expected one of {', '.join(WAYS)}, found {given['way']}")
        return cls(**given)

    @property
    def on_gpu(self) -> bool:
        """Whether it trains on a GPU."""
        return self.device.partition(":")[0] == "cuda"

    def texts(self) -> list[str]:
        """The documents."""
        with open(self.text, encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines]
