"""Fused kernels for what a layer does between its products: norms, rotary embeddings, gated activations.

They are Liger's, of the package liger-kernel, in Triton. Of the loss nothing is taken from there: TRL has a tiled one.
Liger patches the model that it is given, but also classes and functions in the modules of transformers, which every
other model of the process would go through: what is scored after a branch, and the next base that is loaded. `fused`
undoes that, so that a run that was interrupted scores by the same arithmetic as one that was not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bam_lora.attention import AUTO, Recorded
from bam_lora.errors import UserError

LIGER, NONE = "liger", "none"
PACKAGE = "the package liger-kernel, 0.8.5 or newer, and triton"
INSTALL = "pip install 'bam-lora[kernels]'"
_OLDEST = (0, 8, 5)  # the one that was compared here
_CAPABILITY = 8  # Ampere: Triton has bfloat16 only emulated before
_ACTIVATIONS = {"silu": {"silu", "swish"}, "gelu": {"gelu_pytorch_tanh"}}
# Kinds of models whose kernels are compared with transformers' own arithmetic in the tests, and their activation.
LIGER_MODELS: Mapping[str, str] = {
    **dict.fromkeys(
        ("glm4", "granite", "llama", "ministral", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3"),
        "silu",
    ),
    **dict.fromkeys(("gemma", "gemma3_text"), "gelu"),
}
_PATCHED = ("transformers.models.", "transformers.loss.")
_TORCH = ("torch.nn", "torch.nn.functional")


def choose_kernels(wanted: str, folder: Path, device: str, *, before: Recorded | None = None) -> str | None:
    """The fused kernels to train a branch with.

    Args:
        wanted: `auto`, `liger` or `none`.
        folder: The model.
        device: Where it is trained, such as "cuda:0".
        before: What a run has trained with so far, which `auto` keeps where it can.

    Returns:
        `liger`, or None.

    Raises:
        UserError: If `liger` is asked for by name where it cannot be.
    """
    if wanted == NONE:
        return None
    missing = _missing(folder, device)
    if wanted == LIGER and missing is not None:
        raise missing
    if wanted == AUTO and (missing is not None or not surely_faster() or (before and before.name != LIGER)):
        return None
    return LIGER


def package_lacks() -> str | None:
    """What is there instead of the package, in a few words; None if it is there."""
    try:
        version = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return "no liger-kernel"
    if _numbers(version) < _OLDEST:
        return f"liger-kernel {version}"
    return "no triton" if find_spec("triton") is None else None


def _missing(folder: Path, device: str) -> UserError | None:
    """What Liger's kernels want here: GPU, packages, a kind of model that they are right for."""
    remedy = "Leave it at auto"
    if not device.startswith("cuda"):
        return _error("a GPU", f"device {device}", remedy)
    if (found := package_lacks()) is not None:
        return _error(PACKAGE, found, f"Run {INSTALL}, or leave it at auto")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if config.model_type not in LIGER_MODELS:
        return _error("a model of one of the kinds " + ", ".join(sorted(LIGER_MODELS)), config.model_type, remedy)
    # Its gated layers compute the one activation that a kind usually has, whatever the config says.
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in (right := _ACTIVATIONS[LIGER_MODELS[config.model_type]]):
        return _error(f"a model with the activation {' or '.join(sorted(right))}", str(activation), remedy)
    return None


def _error(expected: str, found: str, remedy: str) -> UserError:
    return UserError.of(f"training.kernels: {LIGER}", expected=expected, found=found, remedy=remedy)


def surely_faster() -> bool:
    """Whether `auto` takes them on the GPU that is here, if it has the package and knows the model."""
    import torch

    return not torch.version.hip and torch.cuda.get_device_capability()[0] >= _CAPABILITY


def _numbers(version: str) -> tuple[int, ...]:
    from packaging.version import Version

    return Version(version).release


@contextmanager
def fused(model: Any, kernels: str | None) -> Iterator[None]:
    """Has a model compute with fused kernels, and leaves all other models as they were.

    Also where `kernels` is None: a script's own `use_liger_kernel` patches when its trainer begins to train.

    Args:
        model: A branch's model with its adapter; it stays patched.
        kernels: What `choose_kernels` gave.
    """
    before = _names()
    try:
        if kernels == LIGER:
            _patch(model.get_base_model())
        yield
    finally:
        _put_back(before)


def _patch(model: Any) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance  # what transformers' Trainer calls, too

    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    own = (module.__dict__.get("forward") for module in model.modules())
    patched = [getattr(one, "__module__", "") for one in own if one is not None]
    # It only logs that it does not know a model.
    assert any(name.startswith("liger_kernel") for name in patched), type(model).__name__


def _names() -> dict[str, dict[str, Any]]:
    """What all names mean in the modules that Liger writes to."""
    modules = [name for name in list(sys.modules) if name.startswith(_PATCHED) or name in _TORCH]
    return {name: dict(vars(sys.modules[name])) for name in modules}


def _put_back(before: Mapping[str, Mapping[str, Any]]) -> None:
    for module, names in before.items():
        now = vars(sys.modules[module])
        theirs = [name for name in names if str(getattr(now.get(name), "__module__", "")).startswith("liger_kernel")]
        now.update({name: names[name] for name in theirs})
