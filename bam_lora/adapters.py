"""PEFT LoRA adapters on disk as named low-rank factors; every tensor of the file is accounted for.

Shapes: o output, i input, r rank. The delta of a weight W_oi is scaling · B_or · A_ri (Hu et al., arXiv 2106.09685).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bam_lora.errors import UserError
from bam_lora.safetensors_stream import TORCH_DTYPES, Header, TensorRecord, all_finite, read_header, read_tensor
from bam_lora.store import hash_file, inside, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_OTHER_KINDS = (
    ("lora_magnitude_vector", "DoRA"),
    ("lora_embedding_", "LoRA on an embedding"),
    ("lora_B.bias", "a bias of LoRA"),
    ("modules_to_save", "a module saved in full"),
    (".bias", "a bias"),
)
# Initialisations that leave the base as it was; all others (PiSSA, OLoRA, CorDA, LoftQ, ...) subtract from it.
_PLAIN_INITIALISATIONS = (None, True, False, "true", "gaussian", "eva", "orthogonal")
# Keys of adapter_config.json that are checked on their own or do not change what scaling · B · A means.
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
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}


@dataclass(frozen=True)
class Factors:
    """The two halves of one delta, on the CPU as stored, and its scaling: ΔW_oi = scaling · B_or · A_ri."""

    A_ri: torch.Tensor
    B_or: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class _Module:
    A: TensorRecord
    B: TensorRecord
    scaling: float


class Adapter:
    """A checked PEFT LoRA adapter; its tensors are read only when asked for."""

    def __init__(self, path: Path, config: Mapping[str, Any], modules: Mapping[str, _Module]) -> None:
        self.path = path
        self.config = dict(config)
        self._modules = dict(modules)

    @classmethod
    def open(cls, path: str | Path, *, root: Path | None = None) -> Adapter:
        """Reads the configuration and the header, and checks that nothing is missing, left over or not understood.

        Args:
            path: Folder with adapter_config.json and adapter_model.safetensors.
            root: If given, `path` is relative to it and must stay inside.

        Raises:
            UserError: If it is not a plain LoRA adapter whose every tensor is used, naming the tensor and file.
        """
        folder = inside(root, str(path)) if root is not None else Path(path)
        if not (folder / WEIGHTS_FILE).is_file():
            raise _no_weights(folder)
        config = read_json(folder / CONFIG_FILE)
        _check_config(folder / CONFIG_FILE, config)
        header = read_header(folder / WEIGHTS_FILE)
        return cls(folder, config, _modules(folder, config, header))

    @property
    def names(self) -> list[str]:
        """The weights it changes, by their names in the checkpoint, sorted."""
        return sorted(self._modules)

    def __contains__(self, name: object) -> bool:
        """Whether it changes the weight of that name."""
        return name in self._modules

    @property
    def base_name(self) -> str | None:
        """The base it was trained on, as PEFT recorded it."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def shape(self, name: str) -> tuple[int, int]:
        """(o, i): the shape of the weight."""
        module = self._modules[name]
        return module.B.shape[0], module.A.shape[1]

    def rank(self, name: str) -> int:
        """The rank of the weight's delta."""
        return self._modules[name].A.shape[0]

    def scaling(self, name: str) -> float:
        """The number that multiplies B·A."""
        return self._modules[name].scaling

    def factors(self, name: str) -> Factors | None:
        """Reads one delta's factors.

        Args:
            name: The weight's name.

        Returns:
            The factors in their stored type, or None if the adapter does not change this weight.

        Raises:
            UserError: If one holds NaN or Inf, or the file has changed since it was opened.
        """
        module = self._modules.get(name)
        if module is None:
            return None
        return Factors(self._read(module.A), self._read(module.B), module.scaling)

    def _read(self, record: TensorRecord) -> torch.Tensor:
        path = self.path / WEIGHTS_FILE
        tensor = read_tensor(path, record)
        if not all_finite(tensor):
            raise UserError.of(
                f"tensor {record.name!r} in {path}",
                expected="finite numbers",
                found="NaN or Inf",
                remedy="The training diverged or the file is damaged; train this adapter again",
            )
        return tensor

    def hashes(self) -> dict[str, dict[str, Any]]:
        """{file: {"bytes", "sha256"}} of the two files that make the adapter."""
        paths = [self.path / CONFIG_FILE, self.path / WEIGHTS_FILE]
        return {path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in paths}


def _no_weights(folder: Path) -> UserError:
    if (folder / "adapter_model.bin").exists():
        found, remedy = "adapter_model.bin", "Load it with PEFT and save it again with safe_serialization=True"
    else:
        found = "no such file" if folder.is_dir() else "no such folder"
        remedy = "Give the folder that PEFT's save_pretrained wrote"
    return UserError.of(str(folder), expected=f"an adapter with {WEIGHTS_FILE}", found=found, remedy=remedy)


def _unsupported(path: Path, key: str, found: object, remedy: str) -> UserError:
    return UserError.of(f"{key} in {path}", expected="a plain LoRA adapter", found=repr(found)[:120], remedy=remedy)


def _check_config(path: Path, config: object) -> None:
    """Refuses everything in adapter_config.json that gives B·A another meaning."""
    if not isinstance(config, dict):
        raise _unsupported(path, "the top level", type(config).__name__, "Restore the file")
    if config.get("peft_type") != "LORA":
        raise _unsupported(path, "peft_type", config.get("peft_type"), "Only LORA is supported")
    if config.get("fan_in_fan_out"):
        raise _unsupported(path, "fan_in_fan_out", True, "Transposed (Conv1D) weights are not in this version")
    if config.get("bias", "none") != "none":
        raise _unsupported(path, "bias", config["bias"], "Trained biases are not in this version")
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


def _modules(folder: Path, config: Mapping[str, Any], header: Header) -> dict[str, _Module]:
    halves: dict[str, dict[str, TensorRecord]] = {}
    for record in header.tensors.values():
        match = _FACTOR.fullmatch(record.name)
        if match is None or len(record.shape) != 2 or record.dtype not in TORCH_DTYPES:
            raise _unused(header.path, record, matched=match is not None)
        halves.setdefault(match["module"], {})[match["half"]] = record
    if not halves:
        raise UserError.of(
            str(header.path), expected="LoRA tensors", found="none", remedy="Train or export the adapter again"
        )
    return {f"{module}.weight": _module(folder, config, module, pair) for module, pair in sorted(halves.items())}


def _unused(path: Path, record: TensorRecord, *, matched: bool) -> UserError:
    if matched:
        found = f"{record.dtype} of shape {list(record.shape)}"
        expected, remedy = "a floating-point matrix", "Convolutions and fused experts are not in this version"
    else:
        found = next((kind for mark, kind in _OTHER_KINDS if mark in record.name), "a tensor that is none")
        expected, remedy = "lora_A or lora_B of a linear layer", "This is not in this version"
    return UserError.of(f"tensor {record.name!r} in {path}", expected=expected, found=found, remedy=remedy)


def _module(folder: Path, config: Mapping[str, Any], module: str, pair: Mapping[str, TensorRecord]) -> _Module:
    path = folder / WEIGHTS_FILE
    if len(pair) < 2:
        there = next(iter(pair))
        missing = "lora_B" if there == "A" else "lora_A"
        raise UserError.of(
            f"module {module!r} in {path}",
            expected=f"{missing} too",
            found=f"only lora_{there}",
            remedy="Save it again",
        )
    A, B = pair["A"], pair["B"]
    rank = _patterned(folder, config, "rank_pattern", "r", module)
    if A.shape[0] != rank or B.shape[1] != rank:
        raise UserError.of(
            f"module {module!r} in {path}",
            expected=f"rank {rank:g}, as {CONFIG_FILE} says",
            found=f"A {list(A.shape)} and B {list(B.shape)}",
            remedy="The two files do not belong together; save the adapter again",
        )
    alpha = _patterned(folder, config, "alpha_pattern", "lora_alpha", module)
    return _Module(A, B, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _patterned(folder: Path, config: Mapping[str, Any], patterns_key: str, default_key: str, module: str) -> float:
    """The value for a module: the first pattern that matches the end of its name (PEFT's rule), else the default."""
    patterns = config.get(patterns_key) or {}
    try:
        matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
        key = next(matching, None)
        value = config.get(default_key) if key is None else patterns[key]
    except (re.error, TypeError) as error:
        raise _unsupported(folder / CONFIG_FILE, patterns_key, str(error), "Restore the file") from None
    if isinstance(value, int | float) and math.isfinite(value) and (value > 0 or default_key == "lora_alpha"):
        return float(value)
    raise _unsupported(folder / CONFIG_FILE, default_key, value, f"{default_key} must be a positive number")
