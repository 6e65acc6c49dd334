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
_PLAIN_INITIALISATIONS = (None, True, False, "true", "gaussian", "eva", "orthogonal", "mica")
# Modules that PEFT itself adds to `modules_to_save` for a task: several names, of which a model has one.
_TASK_MODULES = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Keys that mean something else, or nothing, where they are of another type; each may be null.
_FLAGS = ("lora_bias", "use_dora", "use_rslora")
_LISTS_OF_NAMES = ("modules_to_save", "target_parameters")
_MAPPINGS = ("alpha_pattern", "rank_pattern")
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
    _check_types(path, config)
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


def _check_types(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses values that would be taken for others: the string "false" is true, one name is a list of its letters."""
    for key, value in config.items():
        if value is None:
            continue
        if key in _FLAGS and not isinstance(value, bool):
            raise _unsupported(path, key, value, "It must be true or false")
        if key in _LISTS_OF_NAMES and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            raise _unsupported(path, key, value, "It must be a list of names")
        if key in _MAPPINGS and not isinstance(value, dict):
            raise _unsupported(path, key, value, "It must be an object of patterns and numbers")


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
    wanted = "a finite number" if default_key == "lora_alpha" else "a positive whole number"
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    # PEFT takes a negative alpha, which turns the delta round.
    if number and value is not None and (default_key == "lora_alpha" or (value > 0 and value == int(value))):
        return float(value)
    raise _unsupported(path, default_key, value, f"{default_key} must be {wanted}")


def is_saved_whole(config: Mapping[str, Any], name: str) -> bool:
    """Whether adapter_config.json accounts for a tensor that is a weight or bias as such, not a factor."""
    if name.endswith(".bias") and config.get("bias", "none") != "none":
        return True
    return any(is_inside(saved, name) for saved in config.get("modules_to_save") or ())


def is_inside(saved: str, name: str) -> bool:
    """Whether a parameter belongs to a module that an item of `modules_to_save` names, by the end of its path."""
    parts = name.split(".")[:-1]
    return any(".".join(parts[: end + 1]).endswith(saved) for end in range(len(parts)))


def saved_alternatives(config: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The items of `modules_to_save`: one of each tuple must be in the file."""
    listed = config.get("modules_to_save") or ()
    added = _TASK_MODULES.get(str(config.get("task_type")), ())
    ours = tuple(name for name in listed if name in added)
    return [*((name,) for name in listed if name not in added), *([ours] if ours else [])]


def token_indices(path: Path, config: Mapping[str, Any], module: str, count: int) -> tuple[int, ...]:
    """The rows of a module's weight that were trained as they are (`trainable_token_indices`).

    Raises:
        UserError: If the configuration does not list `count` of them for the module.
    """
    stated = config.get("trainable_token_indices")
    if isinstance(stated, dict):
        own = [value for key, value in stated.items() if module.endswith(key)]
        tied = list(stated.values()) if len(stated) == 1 else [None]  # a head that is tied to the one embedding named
        stated = (own or tied)[0]
    fitting = isinstance(stated, list) and all(type(one) is int and one >= 0 for one in stated)
    if not fitting or len(set(stated or ())) != count:
        raise UserError.of(
            f"trainable_token_indices in {path}",
            expected=f"{count} different token numbers for {module}, as the file holds",
            found=repr(stated)[:80],
            remedy="The two files do not belong together; save the adapter again",
        )
    return tuple(stated or ())
