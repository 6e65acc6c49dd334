"""The Hub, as far as it is read: which commit, which files, from the cache where it can be. Loads no torch.

Nothing is taken that is not needed: of a model its config, tokenizer and safetensors weights, never pickled weights or
code. A repository is looked up once and read at that commit; inside `pinned`, at the same one for as long as the run
lives. Tokens are huggingface_hub's to find (`HF_TOKEN`, `hf auth login`); none is read or written here.
"""

from __future__ import annotations

import contextlib
import glob
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.hub_cache import cached_folder, cached_sizes, dropped_if_broken
from bam_lora.hub_errors import Repository, cache_folder, disk_full, explain, explained, is_away, is_offline
from bam_lora.hub_pins import PINS
from bam_lora.hub_progress import MUCH_BYTES, Watch, say, watching
from bam_lora.store import read_json

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Of a model's own folder; what is in folders below is of other formats, or code.
# README.md says which licence it has.
MODEL_FILES = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*",
               "merges*", "vocab*", "additional_chat_templates/*")  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OTHER_WEIGHTS = ("pytorch_model*.bin", "*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository at one commit, in the cache. `sizes` of the files it has there, in bytes, by path."""

    folder: Path
    commit: str
    sizes: dict[str, int]

    @property
    def weights(self) -> list[str]:
        """The safetensors files that its index names, or the single one."""
        return shard_names(self.folder, self.sizes)


def commit_of(wanted: Repository, marker: str | None = None) -> str:
    """The commit that a revision is now, or was when this run, or the cache, saw it last.

    Args:
        wanted: The repository.
        marker: A small file that it should have; None: a data set's card, a model's config.

    Raises:
        UserError: If it does not exist, may not be read, or can neither be asked for nor found in the cache.
    """
    pins = PINS.get()
    if pins is not None and (known := pins.get(wanted)) is not None:
        return known
    file = marker or ("README.md" if wanted.kind == "dataset" else CONFIG)
    commit = wanted.revision if wanted.revision and _COMMIT.fullmatch(wanted.revision) else _look_up(wanted, file)
    if pins is not None:
        pins.put(wanted, commit)
    return commit


def _look_up(wanted: Repository, file: str) -> str:
    """Asks for a small file: the answer has the commit, and says whether its files may be read."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    where: dict[str, Any] = {"repo_type": wanted.kind, "revision": wanted.revision}
    try:
        try:
            commit = get_hf_file_metadata(hf_hub_url(wanted.name, file, **where)).commit_hash
        except EntryNotFoundError as error:
            commit = _commit_without(file, wanted, error)
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(wanted.name, file, **where)  # which also notes in the cache what the revision is
        return str(commit)
    except UserError:
        raise
    except Exception as error:
        cached = _cached_commit(wanted, file) if is_away(error) else None
        if cached is None:
            raise explain(error, wanted) from error
        if not is_offline():
            say(f"{wanted.name}: the Hub does not answer; taking commit {cached[:12]} from the cache")
        return cached


def _commit_without(file: str, wanted: Repository, error: Any) -> str:
    """A data set may do without its card."""
    commit = error.response.headers.get("X-Repo-Commit")
    if wanted.kind == "model" or not commit:
        what = "an adapter" if file.startswith("adapter") else "a model"
        raise UserError.of(
            wanted.name, expected=f"{what} with {file}", found="none", remedy="Choose another repository"
        ) from error
    return str(commit)


def _cached_commit(wanted: Repository, file: str) -> str | None:
    """What a revision was when the cache saw it last."""
    folder = cached_folder(wanted, [file] if wanted.kind == "model" else [])
    return None if folder is None else folder.name


def fetch_model(
    wanted: Repository, patterns: Sequence[str] = MODEL_FILES, *, weights: bool = True, watch: Watch | None = None
) -> Snapshot:
    """Takes what is needed of a model from the cache, and what is not there from the Hub.

    Args:
        wanted: The model.
        patterns: File names beside the weights.
        weights: Take the weights, too.
        watch: Told how much has come; None shows it on the terminal.

    Returns:
        The files at the commit that `wanted` is now, or is pinned to.

    Raises:
        UserError: If it cannot be had, has no safetensors weights, or does not fit on the disk.
    """
    beside = [CONFIG, INDEX, *(pattern for pattern in patterns if not pattern.endswith(".safetensors"))]
    found = fetch_files(wanted, beside, marker=CONFIG)
    shards = shard_names(found.folder, found.sizes, wanted.name)
    if weights:
        at = replace(wanted, revision=found.commit)
        with explained(at):
            _take(at, {name: found.sizes.get(name, 0) for name in shards}, watch)
        if absent := next((name for name in shards if not (found.folder / name).is_file()), None):
            raise UserError.of(
                f"{absent} of {wanted.name}",
                expected="every file that its index names",
                found="none in the repository",
                remedy="It is damaged: choose another revision or copy",
            )
    return found


def fetch_files(wanted: Repository, patterns: Sequence[str], *, marker: str) -> Snapshot:
    """Takes the files that match (`*` does not go into folders); `marker` is one that is always there.

    Raises:
        UserError: If they cannot be had, or do not fit on the disk.
    """
    commit = commit_of(wanted, marker)
    at = replace(wanted, revision=commit)
    with explained(at):
        sizes = _listing(at, marker)
        fitting = {
            name: size
            for name, size in sizes.items()
            if any(fnmatch(name, one) and name.count("/") == one.count("/") for one in patterns)
        }
        return Snapshot(_take(at, fitting, None), commit, sizes)


def _listing(at: Repository, marker: str) -> dict[str, int]:
    """Sizes of all files of a commit by path, as the cache or the Hub knows them, or else of what is in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    if (remembered := cached_sizes(at)) is not None:
        return remembered
    try:
        probe(at, marker)
        tree = HfApi().list_repo_tree(at.name, repo_type=at.kind, revision=at.revision, recursive=True)
        return {file.path: file.size for file in tree if isinstance(file, RepoFile)}
    except Exception as error:
        folder = cached_folder(at, []) if is_away(error) else None
        if folder is None:
            raise
        return {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def shard_names(folder: Path, sizes: Mapping[str, int], name: str | None = None) -> list[str]:
    """The weight files that make up a model: the single one, else those of the index.

    Raises:
        UserError: If there are none, naming what there is instead.
    """
    if SINGLE in sizes:
        return [SINGLE]
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else None
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if isinstance(listed, dict) and listed:
        files = sorted({str(file) for file in listed.values()})
        outside = next((file for file in files if "/" in file or "\\" in file or file.startswith(".")), None)
        if outside is None:
            return files
        raise UserError.of(
            f"{INDEX} of {name or folder}",
            expected="files of its own folder",
            found=repr(outside),
            remedy="Do not use this model",
        )
    found = next((one for kind in _OTHER_WEIGHTS for one in sorted(sizes) if fnmatch(one, kind)), "no weights")
    pickled = found.endswith((".bin", ".pth", ".pt"))
    raise UserError.of(
        str(name or folder),
        expected=f"{SINGLE} or {INDEX}",
        found=f"{found}, which could run code when it is opened" if pickled else found,
        remedy="Choose a copy with safetensors; https://huggingface.co/spaces/safetensors/convert makes one on the Hub"
        if pickled
        else "Choose the original model in safetensors, not an adapter or a copy for another program",
    )


def _take(at: Repository, sizes: Mapping[str, int], watch: Watch | None) -> Path:
    """These files in the cache, downloaded where they are not there yet."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    found = {name: try_to_load_from_cache(at.name, name, revision=at.revision, repo_type=at.kind) for name in sizes}
    missing = {
        name: size
        for name, size in sizes.items()
        if not isinstance(path := found[name], str) or dropped_if_broken(at, Path(path), size)
    }
    if not missing and found:
        name, path = next(iter(found.items()))
        return Path(str(path)).parents[name.count("/")]
    total = sum(missing.values())
    with contextlib.suppress(EntryNotFoundError):  # what an index names need not be there
        probe(at, next(iter(missing)))
    _require_room(at, total)
    with watching(at.name, total, watch) as bar:
        return Path(
            snapshot_download(
                at.name, repo_type=at.kind, revision=at.revision,
                allow_patterns=[glob.escape(name) for name in missing], tqdm_class=bar,
            )
        )  # fmt: skip


def probe(at: Repository, file: str) -> None:
    """One question, asked once: what fails here would otherwise be tried again for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    get_hf_file_metadata(hf_hub_url(at.name, file, repo_type=at.kind, revision=at.revision))


def _require_room(at: Repository, needed_bytes: int) -> None:
    place = Path(cache_folder())
    free = shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free
    if needed_bytes + MUCH_BYTES > free and needed_bytes > 0:
        raise disk_full(at, needed_bytes + MUCH_BYTES, free)
