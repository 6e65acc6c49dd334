"""The folder of a folded model: its shards, what goes along with them, its index and config last."""

from __future__ import annotations

import copy
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bam_lora.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint
from bam_lora.fold_blocks import BLOCK_ELEMENTS
from bam_lora.fold_companions import Companions
from bam_lora.fold_layout import OutputShard
from bam_lora.fold_resume import Parts, filling, parts_of
from bam_lora.fold_shard import ShardFolder, Written
from bam_lora.store import digest, require_space, seal, write_json

ARTEFACT = "folded model"


@dataclass(frozen=True)
class Job:
    """What is written; `config`: values of config.json that change, `options`: what bytes depend on beside `key`.

    `vocabulary`: the rows of a resized embedding, else None.
    """

    checkpoint: Checkpoint
    shards: Sequence[OutputShard]
    config: Mapping[str, Any]
    key: str
    dtype: str | None
    options: dict[str, Any]
    companions: Companions
    vocabulary: int | None = None

    def parts_key(self) -> str:
        """What the bytes of a shard are a function of, as far as it can be known without reading the base.

        A base changed in place shows in the times of its files; other versions may round the last bit otherwise.
        """
        stats = {name: header.path.stat() for name, header in self.checkpoint.shards.items()}
        return digest(
            {
                "key": self.key,
                "dtype": self.dtype,
                "options": self.options,
                "sources": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
                "headers": [shard.header.hex() for shard in self.shards],
                "versions": [torch.__version__, BLOCK_ELEMENTS],
            }
        )


def write_model_folder(
    job: Job,
    folder: ShardFolder,
    output: Path,
    *,
    check: Callable[[Path], dict[str, Any]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Writes what the job says at `output`, going on from the shards that an interrupted call has finished.

    Args:
        job: What to write.
        folder: Computes the shards.
        output: Where it will stand.
        check: Looks at the folder before it gets its config, and raises if it is wrong.
        progress: See `fold_into`.

    Returns:
        The facts that `fold_into` returns, but for the seconds.

    Raises:
        UserError: If a result is not finite, another process writes the same output, or the disk is too small.
    """
    total = sum(shard.file_bytes() for shard in job.shards)
    extra = job.companions.size_bytes
    with parts_of(output, job.parts_key()) as parts:
        finished = {shard.name: record for shard in job.shards if (record := parts.finished(shard.name)) is not None}
        parts.begin(keep=list(finished))
        require_space(output.parent, total + extra - sum(r["bytes"] for r in finished.values()), "the folded model")
        with filling(parts):
            written = _write_shards(job, folder, parts, finished, progress)
            for name, source in job.companions.files.items():
                (parts.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, parts.folder / name)
            if [shard.name for shard in job.shards] != [SINGLE]:
                write_json(parts.folder / INDEX, _index(job))
            facts = {**_facts(job, written.values(), total), "shards": len(job.shards), "resumed_shards": len(finished)}
            facts["verified"] = None if check is None else check(parts.folder)
            write_json(parts.folder / CONFIG, _config(job.checkpoint.config, job.dtype, job.config))
            kept = {name: facts[name] for name in ("bytes", "tensors", "changed", "weight_norm", "delta_norm")}
            hashes = {name: one.sha256 for name, one in written.items()}
            seal(parts.folder, job.key, {"artefact": ARTEFACT, **kept}, hashes=hashes)
    return facts


def _write_shards(
    job: Job,
    folder: ShardFolder,
    parts: Parts,
    finished: Mapping[str, dict[str, Any]],
    progress: Callable[[int], None] | None,
) -> dict[str, Written]:
    """Writes the shards that are not finished; all of them by name."""
    result = {}
    for name, record in finished.items():
        result[name] = Written(record["file_sha256"], record["weight_squares"], record["delta_squares"])
        if progress is not None:
            progress(record["bytes"])

    def finish(shard: OutputShard, written: Written) -> None:
        sums = {"weight_squares": written.weight_squares, "delta_squares": written.delta_squares}
        parts.finish(shard.name, written.sha256, sums)
        result[shard.name] = written

    folder.write_all([shard for shard in job.shards if shard.name not in finished], parts.unfinished, finish)
    parts.wait()
    return {shard.name: result[shard.name] for shard in job.shards}  # sums do not depend on which was first


def _facts(job: Job, written: Iterable[Written], total_bytes: int) -> dict[str, Any]:
    weights, deltas = defaultdict[str, float](float), defaultdict[str, float](float)
    for one in written:
        for sums, squares in ((weights, one.weight_squares), (deltas, one.delta_squares)):
            for name, square in squares.items():
                sums[name] += square
    return {
        "bytes": total_bytes,
        "tensors": sum(len(shard.tensors) for shard in job.shards),
        "changed": len(weights),
        "weight_norm": math.sqrt(math.fsum(weights.values())),
        "weight_norms": {name: math.sqrt(square) for name, square in sorted(weights.items())},
        "delta_norm": math.sqrt(math.fsum(deltas.values())),
        "delta_norms": {name: math.sqrt(square) for name, square in sorted(deltas.items())},
        "tokenizer": job.companions.tokenizer,
        "vocabulary": job.vocabulary,
    }


def _index(job: Job) -> dict[str, Any]:
    """The base's index, as it is where no file's layout changes; else with the new names and size."""
    index = copy.deepcopy(job.checkpoint.index or {})
    kept = job.checkpoint.shards
    if all(shard.name in kept and shard.header == kept[shard.name].raw for shard in job.shards):
        return index
    total = sum(shard.data_bytes() for shard in job.shards)
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}  # null in some files
    where = {one.name: shard.name for shard in job.shards for one in shard.tensors}
    index["weight_map"] = {name: where.pop(name) for name in index.get("weight_map", {})} | where
    return index


def _config(config: dict[str, Any], dtype: str | None, changed: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the result: not quantised, of the type it was written in, and with what the fold has changed."""
    result = {name: value for name, value in copy.deepcopy(config).items() if name != "quantization_config"}
    parts = [result, *(value for value in result.values() if isinstance(value, dict))]
    texts = [part for part in (result, result.get("text_config")) if isinstance(part, dict)]
    for name, value in changed.items():  # other parts, such as an audio encoder, have vocabularies of their own
        for part in [part for part in texts if name in part] or [result]:
            part[name] = value
    if dtype is None:
        return result
    if "dtype" not in result and "torch_dtype" not in result:
        result["dtype"] = dtype
    for part in parts:
        part.update({name: dtype for name in ("dtype", "torch_dtype") if name in part})
    return result
