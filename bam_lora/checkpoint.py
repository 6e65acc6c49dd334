"""A Hugging Face model folder as the fold sees it: its shards, its config, the files that go along.

Also what all writers of model and adapter folders check about where they write to.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError, first_line
from bam_lora.hub import CONFIG as CONFIG
from bam_lora.hub import INDEX as INDEX
from bam_lora.hub import SINGLE as SINGLE
from bam_lora.hub import fetch_files, fetch_model
from bam_lora.hub_errors import Repository
from bam_lora.safetensors_stream import Header, TensorRecord, read_header
from bam_lora.store import MANIFEST, read_json, read_record

TOKENIZER = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
)
GENERATION = "generation_config.json"
# What belongs to a model beside its weights and config. Not README: it describes the base, not the result.
COMPANIONS = (
    *TOKENIZER,
    GENERATION,
    "*processor_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_QUANTISED_NAMES = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|absmax|weight_scale(_inv)?|weight_packed|SCB|quant_state\..*|weight\.(absmax|quant_.*|nested_.*))$"
)
_CAST = ("F8_E4M3", "F8_E5M2")  # weights as they are, without scales, if nothing says that they are quantised
_FULL_PRECISION = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Checkpoint:
    """A base whose headers were read and found whole; `shards` are by file name."""

    folder: Path
    config: dict[str, Any]
    index: dict[str, Any] | None
    shards: dict[str, Header]

    def tensors(self) -> dict[str, TensorRecord]:
        """Every tensor of every shard."""
        return {name: record for header in self.shards.values() for name, record in header.tensors.items()}

    def companions(self) -> list[str]:
        """Files that go along with the weights, relative to the folder."""
        return files_like(self.folder, COMPANIONS)


def files_like(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The files of a folder that match one of the patterns, relative to it, sorted."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def open_checkpoint(folder: Path | Checkpoint, headers: Mapping[str, Header] | None = None) -> Checkpoint:
    """Reads the config, the index and every shard's header of a full-precision model folder.

    Args:
        folder: The folder; an open checkpoint is taken as it is.
        headers: Headers by file name of shards that are elsewhere.

    Raises:
        UserError: If it is no such folder, is damaged, quantised, or its index or a link leads out of it.
    """
    if isinstance(folder, Checkpoint):
        return folder
    if not (folder / CONFIG).is_file():
        raise UserError.of(
            str(folder), expected=f"a model folder with {CONFIG}", found="none", remedy="Check the path of the base"
        )
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise UserError.of(str(folder / CONFIG), expected="an object", found="none", remedy="Restore the file")
    if not isinstance(config.get("text_config"), dict | None):
        raise _no_object(folder / CONFIG, "text_config", config["text_config"])
    elsewhere = headers or {}
    index, files = _shard_files(folder, elsewhere)
    shards = {name: elsewhere.get(name) or read_header(path) for name, path in sorted(files.items())}
    _check_index(folder, index, shards)
    checkpoint = Checkpoint(folder, config, index, shards)
    for name in (CONFIG, *([] if index is None else [INDEX]), *checkpoint.companions()):
        check_link(folder, name)
    _refuse_quantised(checkpoint)
    return checkpoint


def _shard_files(folder: Path, elsewhere: Mapping[str, Header]) -> tuple[dict[str, Any] | None, dict[str, Path]]:
    if (
        SINGLE in elsewhere or (folder / SINGLE).is_file()
    ):  # transformers prefers it, too, where there is an index as well
        return None, {SINGLE: folder / SINGLE}
    if not (folder / INDEX).is_file():
        legacy = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        raise UserError.of(
            str(folder),
            expected=f"{SINGLE} or {INDEX}",
            found=legacy[0] if legacy else "neither",
            remedy="Load the model with transformers and save it again" if legacy else "Check the path of the base",
        )
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError.of(
            str(folder / INDEX), expected="a weight_map of names to files", found="none", remedy="Restore the file"
        )
    assert isinstance(index, dict)
    if not isinstance(index.get("metadata"), dict | None):
        raise _no_object(folder / INDEX, "metadata", index["metadata"])
    files = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in (".", ".."):
            raise UserError.of(
                str(folder / INDEX),
                expected="files of its own folder",
                found=repr(file),
                remedy="Do not use this model",
            )
        files[file] = folder / file
    return index, files


def _no_object(path: Path, key: str, found: object) -> UserError:
    return UserError.of(f"{key} in {path}", expected="an object", found=repr(found)[:80], remedy="Restore the file")


def check_link(folder: Path, name: str) -> None:
    """A text that goes along may link to the Hub's cache only: others could bring a private file into the result.

    Weights may be links, as people keep them on another disk: what is no tensor file is refused by its header.

    Raises:
        UserError: If the file of that name is another link that leads out of the folder.
    """
    target = (folder / name).resolve()
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not cached and not target.is_relative_to(folder.resolve()):
        raise UserError.of(
            str(folder / name),
            expected="a file of its own folder",
            found=f"a link to {target}",
            remedy="Put the file itself there if you trust it",
        )


def _check_index(folder: Path, index: Mapping[str, Any] | None, shards: Mapping[str, Header]) -> None:
    """The index and the headers must tell the same story about which tensor is where."""
    where: dict[str, str] = {}
    for file, header in shards.items():
        for name in header.tensors:
            if name in where:
                raise UserError.of(
                    f"tensor {name!r} in {folder}",
                    expected="it once",
                    found=f"it in {where[name]} and {file}",
                    remedy="Download the model again",
                )
            where[name] = file
    for name, file in (index or {}).get("weight_map", {}).items():
        if where.get(name) != file:
            raise UserError.of(
                f"tensor {name!r} in {folder}",
                expected=f"it in {file}, as {INDEX} says",
                found=where.get(name, "it nowhere"),
                remedy="Download the model again",
            )


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    for name, record in checkpoint.tensors().items():
        cast = record.dtype in _CAST and "quantization_config" not in checkpoint.config
        narrow = name.endswith(".weight") and record.dtype not in _FULL_PRECISION and not cast
        if narrow or _QUANTISED_NAMES.search(name):
            stated = checkpoint.config.get("quantization_config")
            method = stated.get("quant_method") if isinstance(stated, dict) else None
            raise UserError.of(
                f"base {checkpoint.folder}",
                expected="full-precision weights",
                found=f"a quantised model ({method or 'unknown method'}; tensor {name!r} is {record.dtype})",
                remedy="Use the original 16-bit model that it was made from, not the -bnb-4bit, GPTQ, AWQ or FP8 copy",
            )


def normal_name(name: str) -> str:
    """The last part of a model's name or path without case and the suffixes of 4-bit copies of the same weights."""
    path = Path(name.rstrip("/"))
    cached = next((part for part in reversed(path.parts) if part.startswith("models--")), None)
    last = (cached.rsplit("--", 1)[-1] if cached else path.name).lower()
    return re.sub(r"(-unsloth)?-bnb-4bit$", "", last)


def same_base(first: str | None, second: str | None) -> bool:
    """Whether two names may mean the same base: equal after normalisation, or one unknown."""
    return not first or not second or normal_name(first) == normal_name(second)


def local_folder(name: str | Path, patterns: Sequence[str]) -> Path:
    """A folder as it is, or a Hub id's files that match `patterns`, from the cache or downloaded.

    Raises:
        UserError: If it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if isinstance(name, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError.of(str(name), expected="a folder or a Hub id", found="neither", remedy="Check the path")
    if CONFIG in patterns:
        return fetch_model(Repository(name), patterns, weights="*.safetensors" in patterns).folder
    return fetch_files(Repository(name), patterns, marker=patterns[0]).folder  # an adapter


def claim_output(output: Path, artefact: str, *, keep: Sequence[Path]) -> Path:
    """Checks that an output folder may be (re)placed: new, empty or an earlier result, and not an input.

    Args:
        output: The folder to write.
        artefact: What its manifest calls itself; only the same may be replaced, and only without foreign files in it.
        keep: Input folders that must survive.

    Returns:
        The absolute output path, links resolved.

    Raises:
        UserError: If writing there would destroy something.
    """
    try:
        target = output.expanduser().resolve()  # a link stays one: what it leads to is replaced
    except (OSError, RuntimeError) as error:  # links in a circle, which older versions of Python call a RuntimeError
        raise UserError.of(
            f"output {output}", expected="a new folder", found=first_line(error), remedy="Choose another"
        ) from error
    for path in keep:
        if path.resolve().is_relative_to(target):
            raise UserError.of(
                f"output {output}", expected="a new folder", found=f"it holds the input {path}", remedy="Choose another"
            )
    if target.exists() and not (target.is_dir() and _replaceable(target, artefact)):
        raise UserError.of(
            f"output {output}",
            expected="a new or empty folder",
            found="a folder with other files" if target.is_dir() else "a file",
            remedy="Choose another, or remove it first",
        )
    return target


def _replaceable(folder: Path, artefact: str) -> bool:
    """Empty, or an earlier result of the same kind to which nobody has added files."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    manifest = read_record(folder / MANIFEST) or {"facts": {}, "files": {}}
    same = manifest["facts"].get("artefact") == artefact and there <= {*manifest["files"], MANIFEST}
    return same or not there


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turns what the system says while `output` is written (no permission, disk full) into one line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError.of(
            f"output {output}",
            expected="to write it",
            found=f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else ""),
            remedy="Check permissions and free disk space, or choose another folder",
        ) from error
