"""What adapter_config.json says was trained must be in the file beside it: tensors are known to get lost in saving."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bam_lora.adapter_config import CONFIG_FILE, is_inside, saved_alternatives
from bam_lora.adapter_entries import Entry
from bam_lora.errors import UserError


def check_promises(weights: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Refuses an adapter whose file lacks what its configuration promises.

    Args:
        weights: The file, for errors.
        config: adapter_config.json.
        entries: What the file holds.

    Raises:
        UserError: Naming the key or the module.
    """
    path = weights.with_name(CONFIG_FILE)
    _check_pairs(weights, config, entries)
    if config.get("trainable_token_indices") and not any(entry.tokens is not None for entry in entries.values()):
        raise _lost(path, "trainable_token_indices", config["trainable_token_indices"])
    kept = [name for name, entry in entries.items() if entry.value is not None]
    for choices in saved_alternatives(config):
        if not any(is_inside(saved, name) for saved in choices for name in kept):
            raise _lost(path, "modules_to_save", " or ".join(choices))
    for target in config.get("target_parameters") or ():
        last = target.rpartition(".")[2]
        if not any(name.partition("[")[0].endswith(f".{last}") for name in entries):
            raise _lost(path, "target_parameters", target)


def _check_pairs(weights: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """DoRA has a magnitude and `lora_bias` a bias for every module; PEFT refuses both beside `target_parameters`.

    It refuses `lora_bias` for embeddings, too.
    """
    for name, entry in entries.items():
        low_rank = entry.low_rank
        if low_rank is None or low_rank.A is None or low_rank.by_parameter:
            continue
        module = name.removesuffix(".weight")
        if config.get("use_dora") and entry.magnitude is None:
            raise _half(weights, module, "lora_magnitude_vector", "use_dora")
        bias = entries.get(f"{module}.bias", Entry()).low_rank
        if config.get("lora_bias") and low_rank.layout == "linear" and bias is None:
            raise _half(weights, module, "lora_B.bias", "lora_bias")


def _half(weights: Path, module: str, missing: str, key: str) -> UserError:
    return UserError.of(
        f"module {module!r} in {weights}",
        expected=f"{missing} too, as {key} says",
        found="only lora_A and lora_B",
        remedy="It was lost in saving; save the adapter again",
    )


def _lost(path: Path, key: str, value: object) -> UserError:
    return UserError.of(
        f"{key} in {path}",
        expected="the tensors that it names in the file beside it",
        found=f"none of {value!r}"[:120],
        remedy="They were lost in saving; save the adapter again, or take out of the list what the model does not have",
    )
