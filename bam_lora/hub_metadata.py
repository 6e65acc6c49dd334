"""What a base is, without its weights: config, tokenizer, and every tensor's name, type and shape.

Of a model on the Hub only the headers of its safetensors files are fetched, by ranges: kilobytes instead of gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.checkpoint import Checkpoint, open_checkpoint
from bam_lora.errors import UserError
from bam_lora.hub import fetch_model
from bam_lora.hub_errors import Repository, explained
from bam_lora.ledger import LEDGER_FILE
from bam_lora.safetensors_stream import Header, damaged, place_tensors

_THREADS = 8


@dataclass(frozen=True)
class BaseMetadata:
    """A base of which the weights need not be here.

    `folder` has config, tokenizer and generation config; `commit` is None for a folder; `checkpoint` is as if the
    weights were there, but reading numbers from it fails.
    """

    name: str
    folder: Path
    commit: str | None
    checkpoint: Checkpoint
    missing_bytes: int  # of what a run would still have to download

    @property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type (as safetensors names it, such as BF16) and shape of every tensor, by name."""
        return {name: (record.dtype, record.shape) for name, record in self.checkpoint.tensors().items()}

    @property
    def weight_bytes(self) -> int:
        """The size of its weight files."""
        return sum(header.file_bytes for header in self.checkpoint.shards.values())


def base_metadata(name: str, revision: str | None = None) -> BaseMetadata:
    """Looks at a base: a model folder, a finished run's directory, or a Hub id.

    Args:
        name: What a recipe's `base:` says.
        revision: Branch, tag or commit, of a Hub id.

    Raises:
        UserError: If it is not there or may not be read, is damaged, quantised, without safetensors weights, or of an
            architecture that needs code from its repository.
    """
    folder, given = Path(name), Path(name) / "model"
    if (folder / LEDGER_FILE).is_file() and not (given / "config.json").is_file():
        raise UserError.of(name, expected="a finished run", found="one that is not", remedy="Finish it first")
    if (folder / LEDGER_FILE).is_file() or folder.is_dir():
        place = given if (folder / LEDGER_FILE).is_file() else folder.resolve()
        found = BaseMetadata(name, place, None, open_checkpoint(place), 0)
    elif folder.is_absolute():
        raise UserError.of(name, expected="a model folder", found="nothing", remedy="Check `base`")
    else:
        found = _on_the_hub(Repository(name, revision))
    require_known_architecture(name, found.checkpoint.config)
    return found


def _on_the_hub(wanted: Repository) -> BaseMetadata:
    snapshot = fetch_model(wanted, weights=False)
    absent = [file for file in snapshot.weights if not (snapshot.folder / file).is_file()]
    at = Repository(wanted.name, snapshot.commit)
    with explained(wanted), ThreadPoolExecutor(_THREADS) as pool:
        read = pool.map(lambda file: _remote_header(at, file, snapshot.sizes), absent)
        headers = dict(zip(absent, read, strict=True))
    checkpoint = open_checkpoint(snapshot.folder, headers)
    return BaseMetadata(
        wanted.name, snapshot.folder, snapshot.commit, checkpoint, sum(snapshot.sizes.get(file, 0) for file in absent)
    )


def _remote_header(at: Repository, file: str, sizes: Mapping[str, int]) -> Header:
    """The header of a safetensors file on the Hub, checked as one on the disk is."""
    from huggingface_hub import HfApi

    path = Path(at.name) / file  # for messages
    if file not in sizes:
        raise damaged(path, "every file that the index names", "no such file on the Hub")
    found = HfApi().parse_safetensors_file_metadata(at.name, file, revision=at.revision)
    entries = {
        name: {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": list(one.data_offsets)}
        for name, one in found.tensors.items()
    }
    data_bytes = max((one["data_offsets"][1] for one in entries.values()), default=0)
    tensors = place_tensors(path, entries, sizes[file] - data_bytes, sizes[file])
    return Header(path, b"", tensors, dict(found.metadata or {}), sizes[file])


def require_known_architecture(name: str, config: Mapping[str, Any]) -> None:
    """Refuses a model that only code from its own repository can load: such code is never run.

    Raises:
        UserError: If transformers does not know the model type.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES:
        return
    raise UserError.of(
        f"base {name}",
        expected="an architecture that transformers knows",
        found=f"model_type {json.dumps(kind)}"
        + (", which needs code from its repository (not run here)" if "auto_map" in config else ""),
        remedy="Choose another base, or a newer transformers if it has come to know this one",
    )
