"""The base: where its full-precision files are, and a quantised copy of it to train on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bam_lora.attention import AUTO, Recorded, attention_of, register_attention, require_attention
from bam_lora.checkpoint import Checkpoint, open_checkpoint
from bam_lora.documents_apart import settle_hybrid
from bam_lora.errors import UserError, first_line
from bam_lora.gpu_memory import OutOfMemory, room_for, set_allocator
from bam_lora.hub import fetch_model
from bam_lora.hub_errors import Repository
from bam_lora.hub_progress import Watch
from bam_lora.machine import bound_kernel_caches, large_blocks_apart
from bam_lora.store import hash_files, read_record, write_record
from bam_lora.views import keep_cpu_kernel_differentiable, settle_8bit_state

_HASHES = "base_files.json"
_SMALLER = "Close what else uses the memory, hold the base in 4 bits (quantization.bits), or take a smaller base"


@dataclass(frozen=True)
class BaseFiles:
    """A base on disk: its name as the user gave it, the folder, the commit if it came from the Hub."""

    name: str
    folder: Path
    revision: str | None


@dataclass(frozen=True)
class Loading:
    """How a base is held in memory: bits 4, 8 or 16 (16: not quantised, in `compute_dtype`); `attention` by what."""

    bits: int
    quant_type: str = "nf4"
    double: bool = True
    compute_dtype: str = "bfloat16"
    attention: str | None = field(default=None, kw_only=True)
    before: Recorded | None = field(default=None, kw_only=True, compare=False)

    def facts(self) -> dict[str, Any]:
        """What of it goes into hashes: attention only where it was asked for by name."""
        left_out = {"before"} | ({"attention"} if self.attention in (None, AUTO) else set())
        return {key: value for key, value in vars(self).items() if key not in left_out}


def find_base(name: str, revision: str | None = None, watch: Watch | None = None) -> BaseFiles:
    """Finds a base: a local folder, or a Hub repository (its safetensors, config and tokenizer only).

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        watch: Told how far a download is; None draws a bar on a terminal.

    Raises:
        UserError: If it is not there, is damaged, is itself quantised, or has no safetensors weights.
    """
    if Path(name).is_dir():
        files = BaseFiles(name, Path(name).resolve(), None)
    elif Path(name).is_absolute():
        raise UserError.of(name, expected="a model folder", found="nothing", remedy="Check `base`")
    else:
        snapshot = fetch_model(Repository(name, revision), watch=watch)
        files = BaseFiles(name, snapshot.folder, snapshot.commit)
    open_checkpoint(files.folder)
    return files


def require_same_files(
    base: BaseFiles, found: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, Any]]
) -> None:
    """Checks that a run's original base is still what the run started from.

    Args:
        base: The base.
        found: Its `file_hashes`.
        expected: What the ledger holds of them.

    Raises:
        UserError: Naming the files that differ.
    """
    # Ledgers of earlier versions may name safetensors beside the model's own, which nothing is read from.
    unread = {name for name in expected if name.endswith(".safetensors") and name not in found}
    changed = sorted(n for n in {*found, *expected} - unread if found.get(n) != expected.get(n))
    if changed:
        raise UserError.of(
            f"base {base.name}",
            expected="the files this run started from",
            found=f"others: {', '.join(changed)}",
            remedy="Restore them; what a run adds belongs to the original weights",
        )


def weight_bytes(folder: Path) -> int:
    """The size of a model's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def file_hashes(base: BaseFiles, cache: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the base's weights, config and tokenizer files, by name.

    Of safetensors only those that the model is read from: the Hub's cache is shared, and another program may put a
    second format of the same weights beside them at any time. They are remembered in `cache` and read again only where
    a file's size or time has changed.
    """
    known = (read_record(cache / _HASHES) or {}).get("files", {})
    files: dict[str, dict[str, Any]] = {}
    try:
        shards = {*open_checkpoint(base.folder).shards}
    except UserError:  # a base that is not whole any more: what differs is found and named all the same
        shards = {path.name for path in base.folder.glob("*.safetensors")}
    for path in sorted(base.folder.iterdir()):
        if not path.is_file() or not (path.name in shards or path.suffix in {".json", ".model", ".jinja", ".txt"}):
            continue
        stat, before = path.stat(), known.get(path.name, {})
        stamp = {"bytes": stat.st_size, "modified": stat.st_mtime_ns}
        files[path.name] = {**stamp, "sha256": before["sha256"] if stamp.items() <= before.items() else None}
    unknown = [base.folder / name for name, file in files.items() if file["sha256"] is None]
    for path, found in zip(unknown, hash_files(unknown), strict=True):
        files[path.name]["sha256"] = found
    if files != known:
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
        found = f"{type(error).__name__}: {first_line(error)}"
        raise UserError.of(
            f"tokenizer in {folder}", expected="tokenizer.json or tokenizer.model", found=found,
            remedy="Give a complete model folder",
        ) from error  # fmt: skip


def context_length(folder: Path) -> int | None:
    """The base's context length in tokens, or None if its config does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text_config = config.get("text_config", config)
    length = text_config.get("max_position_embeddings") or text_config.get("n_positions")
    return int(length) if length else None


def require_fitting_base(name: str, folder: Path, tokenizer: Any, sequence_length: int | None) -> None:
    """Checks what training needs of a base; None: sequences have no fixed length.

    Raises:
        UserError: If its tokenizer has no EOS token, sequences would be longer than its context, or texts packed into
            one would run into each other.
    """
    if sequence_length is not None:  # packed
        require_attention(json.loads((folder / "config.json").read_text(encoding="utf-8")), name)
    if tokenizer.eos_token_id is None:
        raise UserError.of(
            f"tokenizer of {name}",
            expected="an end-of-sequence token",
            found="none",
            remedy="Set `eos_token` in its tokenizer_config.json",
        )
    limit = context_length(folder)
    if limit is not None and sequence_length is not None and sequence_length > limit:
        raise UserError.of(
            "data.sequence_length",
            expected=f"at most {limit}, the base's context length",
            found=str(sequence_length),
            remedy="Lower it",
        )


def require_targets(folder: Path | Checkpoint, target_modules: str | list[str]) -> None:
    """Checks that every module named to get an adapter is a linear layer of the base, and one that can be folded.

    Raises:
        UserError: If a name matches nothing, or the embeddings or the output head.
    """
    if isinstance(target_modules, str):
        return
    tensors = open_checkpoint(folder).tensors()
    modules = [n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and len(t.shape) == 2]
    for target in target_modules:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not found or any(part in target.split(".") for part in ("lm_head", "embed_tokens")):
            last = {name.rpartition(".")[2] for name in modules} - {"lm_head", "embed_tokens"}
            raise UserError.of(
                "lora.target_modules",
                expected=f"all-linear, or names of linear layers such as {', '.join(sorted(last))}",
                found=repr(target),
                remedy="Change the list",
            )


def device() -> str:
    """The device to train on: the accelerator torch finds, else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def load_model(folder: Path, how: Loading, *, architecture: Any = None, **given: Any) -> Any:
    """Loads a base for training or scoring; 4- and 8-bit ones are quantised tensor by tensor while they load.

    Args:
        folder: A model folder.
        how: How it is held.
        architecture: A class to load it with; None goes by the config.
        given: Keyword arguments of `from_pretrained` that win over what `how` says.

    Returns:
        A frozen transformers model in evaluation mode.

    Raises:
        UserError: If the weights cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    set_allocator()
    where = device()
    if where not in ("cpu", "mps"):  # accelerate wants the index: a bare "cuda" is not "the device you train on"
        where = f"{where}:{torch.accelerator.current_device_index()}"
    arguments: dict[str, Any] = {"dtype": getattr(torch, how.compute_dtype), "device_map": {"": where}}
    if how.bits != 16 and given.get("quantization_config") is None:
        arguments["quantization_config"] = _quantization(how)
    if (attention := attention_of(how, folder, where)) is not None:
        arguments["attn_implementation"] = attention
    arguments.update(given)
    register_attention(arguments.get("attn_implementation"))
    try:
        with room_for(f"loading {folder} in {how.bits} bits", _SMALLER), _heap_of(where):
            model, loaded = (architecture or AutoModelForCausalLM).from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True, **arguments
            )
    except OutOfMemory:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError.of(
            str(folder),
            expected="a causal language model that transformers can load",
            found=f"{type(error).__name__}: {first_line(error)}",
            remedy="Check the folder's files",
        ) from error
    _require_all_loaded(folder, loaded)
    return settle_loaded(model)


def _heap_of(where: str) -> AbstractContextManager[None]:
    return large_blocks_apart() if where == "cpu" else nullcontext()


def settle_loaded(model: Any) -> Any:
    """A loaded model, frozen, in evaluation mode, and fit to be trained on and shared."""
    bound_kernel_caches()
    keep_cpu_kernel_differentiable(model)
    settle_8bit_state(model)
    settle_hybrid(model)
    model.requires_grad_(False)
    return model.eval()


def _require_all_loaded(folder: Path, loaded: dict[str, Any]) -> None:
    """Refuses a base with tensors that transformers would otherwise fill with random numbers."""
    for kind, found in (("missing_keys", "none"), ("mismatched_keys", "another shape")):
        if loaded.get(kind):
            name = str(sorted(map(str, loaded[kind]))[0])
            raise UserError.of(
                f"{folder}, tensor {name!r}",
                expected="the weights that the config asks for",
                found=found,
                remedy="Give the whole model",
            )


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
