"""The base: where its full-precision files are, and a quantised copy of it to train on."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.checkpoint import open_checkpoint
from bam_lora.errors import UserError
from bam_lora.store import hash_file, read_record, write_record

_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "merges*", "vocab*"]
_HASHES = "base_files.json"


@dataclass(frozen=True)
class BaseFiles:
    """A base on disk: its name as the user gave it, the folder, the commit if it came from the Hub."""

    name: str
    folder: Path
    revision: str | None


@dataclass(frozen=True)
class Loading:
    """How a base is held in memory: bits 4, 8 or 16 (16: not quantised, in `compute_dtype`)."""

    bits: int
    quant_type: str = "nf4"
    double: bool = True
    compute_dtype: str = "bfloat16"


def find_base(name: str, revision: str | None = None) -> BaseFiles:
    """Finds a base: a local folder, or a Hub repository (its safetensors, config and tokenizer only).

    Raises:
        UserError: If it is not there, is damaged, is itself quantised, or has no safetensors weights.
    """
    if Path(name).is_dir():
        files = BaseFiles(name, Path(name).resolve(), None)
    elif Path(name).is_absolute():
        raise UserError.of(name, expected="a model folder", found="nothing", remedy="Check `base`")
    else:
        files = _from_hub(name, revision)
    open_checkpoint(files.folder)
    return files


def _from_hub(name: str, revision: str | None) -> BaseFiles:
    from huggingface_hub import HfApi, snapshot_download

    try:
        try:
            commit = str(HfApi().model_info(name, revision=revision).sha)
        except OSError:  # no network: the newest snapshot in the cache, if there is one
            commit = revision or "main"
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=_WANTED))
    except Exception as error:
        raise UserError.of(
            name,
            expected="a model folder or a Hub id you can read",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}",
            remedy="Check the name, your access (`hf auth login`) and the network",
        ) from error
    return BaseFiles(name, folder, folder.name)


def file_hashes(base: BaseFiles, cache: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the base's weights, config and tokenizer files, by name.

    They are remembered in `cache` and read again only where a file's size or time has changed.
    """
    known = (read_record(cache / _HASHES) or {}).get("files", {})
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(base.folder.iterdir()):
        if not path.is_file() or path.suffix not in {".safetensors", ".json", ".model", ".jinja", ".txt"}:
            continue
        stat = path.stat()
        stamp = {"bytes": stat.st_size, "modified": stat.st_mtime_ns}
        before = known.get(path.name, {})
        same = all(before.get(name) == value for name, value in stamp.items())
        files[path.name] = {**stamp, "sha256": before["sha256"] if same else hash_file(path)}
    write_record(cache / _HASHES, str(base.folder), {"files": files})
    return {name: {"bytes": file["bytes"], "sha256": file["sha256"]} for name, file in files.items()}


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model folder.

    Raises:
        UserError: If there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:
        raise UserError.of(
            f"tokenizer in {folder}",
            expected="tokenizer.json or tokenizer.model",
            found=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}",
            remedy="Give a complete model folder",
        ) from error


def context_length(folder: Path) -> int | None:
    """The base's context length in tokens, or None if its config does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text_config = config.get("text_config", config)
    length = text_config.get("max_position_embeddings") or text_config.get("n_positions")
    return int(length) if length else None


def require_fitting_base(name: str, folder: Path, tokenizer: Any, sequence_length: int) -> None:
    """Checks what training needs of a base.

    Raises:
        UserError: If its tokenizer has no EOS token, or sequences would be longer than its context.
    """
    if tokenizer.eos_token_id is None:
        raise UserError.of(
            f"tokenizer of {name}",
            expected="an end-of-sequence token",
            found="none",
            remedy="Set `eos_token` in its tokenizer_config.json",
        )
    limit = context_length(folder)
    if limit is not None and sequence_length > limit:
        raise UserError.of(
            "data.sequence_length",
            expected=f"at most {limit}, the base's context length",
            found=str(sequence_length),
            remedy="Lower it",
        )


def device() -> str:
    """The device to train on: the accelerator torch finds, else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def load_model(folder: Path, how: Loading) -> Any:
    """Loads a base for training or scoring; 4- and 8-bit ones are quantised tensor by tensor while they load.

    Returns:
        A frozen transformers model in evaluation mode.

    Raises:
        UserError: If the weights cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    where = device()
    if where not in ("cpu", "mps"):  # accelerate wants the index: a bare "cuda" is not "the device you train on"
        where = f"{where}:{torch.accelerator.current_device_index()}"
    arguments: dict[str, Any] = {"dtype": getattr(torch, how.compute_dtype), "device_map": {"": where}}
    if how.bits != 16:
        arguments["quantization_config"] = _quantization(how)
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, **arguments)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{folder}: the {how.bits}-bit model does not fit into the memory of {where}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError.of(
            str(folder),
            expected="a causal language model that transformers can load",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}",
            remedy="Check the folder's files",
        ) from error
    _keep_cpu_kernel_differentiable(model)
    model.requires_grad_(False)
    return model.eval()


def _quantization(how: Loading) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if how.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=how.quant_type,
        bnb_4bit_use_double_quant=how.double,
        bnb_4bit_compute_dtype=getattr(torch, how.compute_dtype),
    )


def _keep_cpu_kernel_differentiable(model: Any) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    Its `Linear4bit` repacks them at the first forward in evaluation mode, and training afterwards goes through a
    kernel without autograd: gradients are wrong, with no more than a warning. There is no public switch.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def assert_not_repacked(model: Any) -> None:
    """Asserts that no 4-bit weight went through the repacking that breaks training on the CPU."""
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        assert not getattr(state, "packing_format_for_cpu", False), f"{name} was repacked for inference"


def branch_view(model: Any) -> Any:
    """A model whose modules are new but whose tensors are the given model's own.

    What a trainer does to it (adapters, hooks, a patched forward, flags, config) is gone when it is dropped, and the
    base serves the next branch as if it had just been loaded. Costs no memory for weights.
    """
    import torch

    shared: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module.__dict__.values(), *module._parameters.values(), *module._buffers.values()):
            state = getattr(value, "quant_state", None)
            for item in (value, state):
                if isinstance(item, torch.Tensor) or type(item).__name__ == "QuantState":
                    shared[id(item)] = item
    view = copy.deepcopy(model, shared)
    view.requires_grad_(False)
    return view


@contextmanager
def adapted(model: Any, adapter: Path | None) -> Iterator[Any]:
    """The model itself, or a view of it with an adapter from disk, for as long as the context lasts."""
    if adapter is None:
        yield model
        return
    from peft import PeftModel

    yield PeftModel.from_pretrained(branch_view(model), str(adapter)).eval()


def count_linear_modules(model: Any) -> dict[str, int]:
    """How many linear layers are 4-bit, 8-bit and not quantised (the output head is among the last)."""
    import bitsandbytes as bnb
    import torch

    counts = {"4bit": 0, "8bit": 0, "unquantised": 0}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            counts["4bit"] += 1
        elif isinstance(module, bnb.nn.Linear8bitLt):
            counts["8bit"] += 1
        elif isinstance(module, torch.nn.Linear):
            counts["unquantised"] += 1
    return counts
