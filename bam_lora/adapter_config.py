"""adapter_config.json: what it may say for the adapter to mean what we take it for, and ranks and scalings from it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError

CONFIG_FILE = "adapter_config.json"

# Initialisations that leave the base as it was; all others (PiSSA, OLoRA, CorDA, LoftQ, ...) subtract from it.
_PLAIN_INITIALISATIONS = (None, True, False, "true", "gaussian", "eva", "orthogonal")
# Keys of adapter_config.json that are read elsewhere or do not change what the tensors mean.
_HARMLESS_KEYS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}


def _unsupported(path: Path, key: str, found: object, remedy: str) -> UserError:
    return UserError.of(f"{key} in {path}", expected="a LoRA adapter", found=repr(found)[:120], remedy=remedy)


def check_config(path: Path, config: object) -> None:
    """Refuses everything in adapter_config.json that gives the tensors another meaning.

    Raises:
        UserError: Naming the key.
    """
    if not isinstance(config, dict):
        raise _unsupported(path, "the top level", type(config).__name__, "Restore the file")
    if config.get("peft_type") != "LORA":
        raise _unsupported(path, "peft_type", config.get("peft_type"), "Only LORA is supported")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise _unsupported(path, "bias", config["bias"], "Use none, all or lora_only")
    initial = config.get("init_lora_weights")
    if (initial.lower() if isinstance(initial, str) else initial) not in _PLAIN_INITIALISATIONS:
        raise _unsupported(
            path,
            "init_lora_weights",
            initial,
            "It changed the base; convert it with PEFT's path_initial_model_for_weight_conversion",
        )
    for key, value in config.items():
        if key not in _HARMLESS_KEYS and value:
            raise _unsupported(path, key, value, "This is not in this version")


def rank_of(path: Path, config: Mapping[str, Any], module: str) -> float:
    """The rank of a module: by the first pattern that matches, else the adapter's; UserError if it is none."""
    return _patterned(path, config, "rank_pattern", "r", module)


def scaling_of(path: Path, config: Mapping[str, Any], module: str) -> float:
    """The number that multiplies a module's B·A: alpha / r, or alpha / √r with rsLoRA (arXiv 2312.03732)."""
    rank, alpha = rank_of(path, config, module), _patterned(path, config, "alpha_pattern", "lora_alpha", module)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _patterned(path: Path, config: Mapping[str, Any], patterns_key: str, default_key: str, module: str) -> float:
    """The value for a module: the first pattern that matches the end of its name (PEFT's rule), else the default."""
    patterns = config.get(patterns_key) or {}
    try:
        matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
        key = next(matching, None)
        value = config.get(default_key) if key is None else patterns[key]
    except (re.error, TypeError) as error:
        raise _unsupported(path, patterns_key, str(error), "Restore the file") from None
    if isinstance(value, int | float) and math.isfinite(value) and (value > 0 or default_key == "lora_alpha"):
        return float(value)
    raise _unsupported(path, default_key, value, f"{default_key} must be a positive number")


def is_saved_whole(config: Mapping[str, Any], name: str) -> bool:
    """Whether adapter_config.json accounts for a tensor that is a weight or bias as such, not a factor."""
    module, _, parameter = name.rpartition(".")
    if parameter == "bias" and config.get("bias", "none") != "none":
        return True
    parts = module.split(".")
    above = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(path.endswith(str(saved)) for saved in config.get("modules_to_save") or () for path in above)


def token_indices(path: Path, config: Mapping[str, Any], module: str, count: int) -> tuple[int, ...]:
    """The rows of a module's weight that were trained as they are (`trainable_token_indices`).

    Raises:
        UserError: If the configuration does not list `count` of them for the module.
    """
    stated = config.get("trainable_token_indices")
    if isinstance(stated, dict):
        stated = next((value for key, value in stated.items() if module.endswith(key)), None)
    fitting = isinstance(stated, list) and all(isinstance(one, int) and one >= 0 for one in stated)
    if not fitting or len(set(stated or ())) != count:
        raise UserError.of(
            f"trainable_token_indices in {path}",
            expected=f"{count} different token numbers for {module}, as the file holds",
            found=repr(stated)[:80],
            remedy="The two files do not belong together; save the adapter again",
        )
    return tuple(stated or ())
