"""Which attention a base is loaded with: packed rows are many short documents, which not every kind takes well.

With transformers' default, `sdpa`, a batch of packed rows is one long row with a dense mask: time and memory grow with
its square. Flash attention takes the documents' boundaries instead, but needs a package, a GPU and a model that fit;
our own `packed` (`packed_attention`) takes them, too, and needs nothing but torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError

AUTO = "auto"
FLASH = "flash_attention_2"
PACKED = "packed"
BY_DOCUMENT = frozenset({FLASH, PACKED})
"""Kinds of attention that make no mask of packed rows."""
_FLASH_CAPABILITY = 8  # Ampere
FLASH_HEAD_DIM = 256
PACKED_HEAD_DIM = 192  # on all cards but the largest chips
# Whose attention is nothing but what `packed` computes; each of them is compared with `sdpa` in the tests.
PACKED_MODELS = frozenset(
    {
        "apertus", "arcee", "gemma", "gemma3_text", "glm4", "granite", "llama", "ministral", "mistral", "mixtral",
        "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
    }
)  # fmt: skip
_WITHOUT_ATTENTION = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"}  # of the kinds that transformers 5.23 knows
_SHARED_BLOCKS = {"zamba", "zamba2"}


def require_attention(config: Mapping[str, Any], name: str) -> None:
    """Checks that a base's layers attend, each with weights of its own.

    Mamba, RWKV and their like carry a state from token to token: in a packed row it would run from one document into
    the next, which nothing but attention keeps apart. PEFT refuses some of their layers, too, and 4 bits others. (In
    hybrids, of both kinds of layers, `documents_apart` keeps them apart.) Zamba's attention is one block that many
    layers use; what adapters learn in it has no one place in the files.

    Args:
        config: What its config.json holds.
        name: What errors call it.

    Raises:
        UserError: If it is of a kind without attention, or with one block for many layers.
    """
    kind = config.get("model_type")
    if kind in _WITHOUT_ATTENTION:
        raise UserError.of(
            f"base {name}",
            expected="a model whose layers attend",
            found=f"a {kind} model, in which texts packed side by side would run into each other",
            remedy="Choose a transformer",
        )
    if kind in _SHARED_BLOCKS:
        raise UserError.of(
            f"base {name}",
            expected="a model whose layers have weights of their own",
            found=f"a {kind} model, in which many layers share one block, so that its adapters cannot be folded",
            remedy="Choose another",
        )


@dataclass(frozen=True)
class Recorded:
    """By what attention, or fused kernels, a run was trained before: a name, or None for transformers' own."""

    name: str | None


def attention_of(how: Any, folder: Path, device: str) -> str | None:
    """The `attn_implementation` of a model that is held as a `base.Loading` says; see `choose_attention`."""
    return choose_attention(how.attention, folder, how.compute_dtype, device, before=how.before)


def register_attention(name: str | None) -> None:
    """Makes transformers know `packed`, if that is what a model is to be loaded with."""
    if name == PACKED:
        from bam_lora import packed_attention

        packed_attention.register()


def choose_attention(
    wanted: str | None, folder: Path, compute_dtype: str, device: str, *, before: Recorded | None = None
) -> str | None:
    """The `attn_implementation` to load a model with.

    Args:
        wanted: `auto`; a name, which is taken as it is; or None, which leaves it to transformers.
        folder: The model.
        compute_dtype: Of activations.
        device: Where it goes, such as "cuda:0".
        before: What a run has trained with so far, which `auto` keeps where it can.

    Returns:
        A name for transformers, or None to leave it to transformers (`sdpa`, for models that have it).

    Raises:
        UserError: If flash attention or `packed` is asked for by name where it cannot be.
    """
    if wanted == FLASH:
        _require_flash(device)
    if wanted == PACKED:
        _require_packed(folder)
    if wanted != AUTO:
        return wanted
    allowed = BY_DOCUMENT if before is None else {before.name}
    if FLASH in allowed and _flash_fits(folder, compute_dtype, device):
        return FLASH
    return PACKED if PACKED in allowed and _packed_fits(folder, compute_dtype, device) else None


def assumed_attention(wanted: str | None, compute_dtype: str, *, newer: bool, packed: bool, flash: bool) -> str | None:
    """What `choose_attention` would choose on a CUDA GPU that is not here, without flash-attn.

    Args:
        wanted: As there.
        compute_dtype: Of activations.
        newer: Whether the card is from Ampere on.
        packed: Whether `packed` has a kernel for the base (`packs`).
        flash: Whether flash attention has one.
    """
    if wanted == FLASH and not (flash and newer):
        return None
    if wanted != AUTO:
        return wanted
    return PACKED if newer and packed and compute_dtype != "float32" else None


def packs(config: Any) -> bool:
    """Whether `packed` knows a model and torch's kernel takes its heads on any card from Ampere on."""
    return _packed_knows(config) and _head_dim(config) <= PACKED_HEAD_DIM and _head_dim(config) % 8 == 0


def _flash_fits(folder: Path, compute_dtype: str, device: str) -> bool:
    """Whether flash attention surely works: package, GPU, number format, model, size of its heads."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import is_flash_attn_2_available

    if not device.startswith("cuda") or compute_dtype == "float32" or not is_flash_attn_2_available():
        return False
    if torch.cuda.get_device_capability(device)[0] < _FLASH_CAPABILITY:
        return False
    config = _config(folder)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not getattr(architecture, "_supports_flash_attn", False):
        return False
    if getattr(architecture, "_compatible_flash_implementations", None):  # kernels of its own, from the Hub
        return False
    return _head_dim(config.get_text_config()) <= FLASH_HEAD_DIM


def _packed_fits(folder: Path, compute_dtype: str, device: str) -> bool:
    """Whether `packed` is as right as `sdpa` and surely no slower: on CPUs, and where torch's own kernel takes it."""
    config = _config(folder)
    if not _packed_knows(config) or not device.startswith(("cpu", "cuda")):
        return False
    if device.startswith("cpu"):
        return True
    import torch

    from bam_lora.packed_attention import kernel_takes

    width = _head_dim(config)
    return kernel_takes(torch.device(device), getattr(torch, compute_dtype), width, width)


def _packed_knows(config: Any) -> bool:
    """Whether a model is one of those that `packed` was tested with: the kind, and nothing unusual in its config."""
    plain = not getattr(config, "attention_dropout", 0.0) and getattr(config, "is_causal", True) is not False
    return config.model_type in PACKED_MODELS and plain


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder), local_files_only=True)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _require_flash(device: str) -> None:
    from transformers.utils import is_flash_attn_2_available, is_kernels_available

    there = device.startswith("cuda") and (is_flash_attn_2_available() or is_kernels_available())
    if not there:
        raise UserError.of(
            "quantization.attention: flash_attention_2",
            expected="an NVIDIA GPU and the package flash-attn or kernels",
            found="no GPU" if not device.startswith("cuda") else "neither package",
            remedy="Install one, or leave it at auto",
        )


def _require_packed(folder: Path) -> None:
    config = _config(folder)
    if not _packed_knows(config):
        drops = config.model_type in PACKED_MODELS
        raise UserError.of(
            f"quantization.attention: {PACKED}",
            expected="a model of one of the kinds " + ", ".join(sorted(PACKED_MODELS)),
            found=f"{config.model_type} with dropout in attention, or not causal" if drops else config.model_type,
            remedy="Leave it at auto",
        )
