"""Data sets from the Hub: at one commit, and from the cache where the Hub may not or cannot be asked."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from bam_lora.errors import UserError, first_line, some
from bam_lora.hub import commit_of, probe
from bam_lora.hub_cache import cached_folder, cached_sizes
from bam_lora.hub_errors import Repository, explain, is_away, is_offline, known_trouble, not_in_cache
from bam_lora.hub_progress import say
from bam_lora.store import link_or_copy

_CARD = "README.md"
_PART = re.compile(r"^(.*?)(\d+)-of-(\d{1,5})")


@dataclass(frozen=True)
class HubData:
    """A data set at a commit: what `datasets.load_dataset` is called with, and the folder if that is in the cache."""

    at: Repository
    folder: Path | None

    def load(self, arguments: Mapping[str, Any], name: str | None, cache: Path) -> Any:
        """Opens it.

        Args:
            arguments: Of `datasets.load_dataset`: split, streaming and so on.
            name: The configuration.
            cache: A folder that stays as long as its rows are read.
        """
        import datasets

        if self.folder is None:
            return datasets.load_dataset(self.at.name, name=name, revision=self.at.revision, **arguments)
        folder = self._laid_out(self.folder, cache / "hub")
        builder = datasets.load_dataset_builder(str(folder), name=name, cache_dir=str(cache))
        files = [file for each in (builder.config.data_files or {}).values() for file in each]
        paths = [Path(file).relative_to(folder) for file in files]
        missing = [path.as_posix() for path in paths if not (self.folder / path).is_file()]
        if cached_sizes(self.at) is None:  # fetched by another program, or kept by an older huggingface_hub
            missing += _missing_parts(paths)
            if not missing:
                say(f"{self.at.name}: the cache does not tell what belongs to it; taking the {len(paths)} files there")
        if missing:  # an interrupted download must not pass for a smaller data set
            raise not_in_cache(self.at, some(missing))
        return datasets.load_dataset(str(folder), name=name, **arguments)

    def _laid_out(self, cached: Path, folder: Path) -> Path:
        """All files of the commit by name; those that are not in the cache are empty.

        `datasets` finds a configuration's files by patterns, and refuses all where another one's are not there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        sizes = cached_sizes(self.at) or {}
        if _CARD in sizes and not (cached / _CARD).is_file():  # which says what the configurations are
            raise not_in_cache(self.at, _CARD)
        here = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
        for name in {*here, *sizes}:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                raise _outside(self.at, name)
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                continue
            if (cached / name).is_file():
                _link((cached / name).resolve(), target)
            else:
                target.touch()
        return folder


def _missing_parts(paths: Iterable[Path]) -> list[str]:
    """Of files that are numbered `00000-of-00002` those that are not there."""
    found: dict[tuple[str, str], set[int]] = {}
    for path in paths:
        for before, number, of in _PART.findall(path.as_posix()):
            found.setdefault((before, of), set()).add(int(number))
    return [
        f"{before}{number:0{len(of)}}-of-{of}"
        for (before, of), numbers in found.items()
        for number in sorted(set(range(int(of))) - numbers)
    ]


def _outside(at: Repository, name: str) -> UserError:
    """The list of files is the Hub's, or a mirror's."""
    return UserError.of(
        at.name, expected="files of its own folder", found=repr(name), remedy="Do not use this data set, or its mirror"
    )


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source)
    except OSError:  # not allowed on this system
        link_or_copy(source, target)


def hub_data(wanted: Repository, commit: str | None, *, streaming: bool) -> HubData:
    """Finds a data set on the Hub, or in the cache.

    Args:
        wanted: The data set.
        commit: The one to read at; None: that of the revision.
        streaming: Its rows are read as they come, and nothing is kept.

    Raises:
        UserError: If it is not there, may not be read, or is neither there nor in the cache.
    """
    at = replace(wanted, revision=commit or commit_of(wanted))
    try:
        _ask(at, streaming=streaming)
        return HubData(at, None)
    except Exception as error:
        if not is_away(error):
            raise explain(error, at) from error
        folder = cached_folder(at, [])
        if folder is None:
            raise explain(error, at) from error
        if not is_offline():
            say(f"{at.name}: the Hub does not answer; reading it from the cache")
        return HubData(at, folder)


def _ask(at: Repository, *, streaming: bool) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    with contextlib.suppress(EntryNotFoundError):
        probe(at, _CARD)
    if (
        not streaming
    ):  # what it consists of goes into the cache, so that offline one can tell whether all of it is there
        snapshot_download(at.name, repo_type=at.kind, revision=at.revision, allow_patterns=[_CARD])


def unreadable(wanted: Repository, error: Exception) -> UserError:
    """The line for what goes wrong while a data set on the Hub is opened or read."""
    if "Dataset scripts are no longer supported" in str(error):
        return UserError.of(
            wanted.name,
            expected="a data set of Parquet, JSON or text files",
            found="one that needs its own code, which is not run",
            remedy="Many have a converted copy: try `revision: refs/convert/parquet`",
        )
    return (
        known_trouble(error, wanted)
        or _misnamed(wanted.name, str(error))
        or UserError.of(
            wanted.name,
            expected="readable data",
            found=f"{type(error).__name__}: {first_line(error.__cause__ or error)}",
            remedy="Check the Hub id, `name`, `split`, your access and the network",
        )
    )


def _misnamed(data: str, text: str) -> UserError | None:
    """The line for a configuration or a split that a data set does not have, from what `datasets` says of it."""
    for pattern, kind, key in (
        (r"BuilderConfig '(.*?)' not found", "configuration", "name"),
        (r"(?:Bad|Unknown) split:? \"?([^\s\".]+)", "split", "split"),
    ):
        if (wrong := re.search(pattern, text)) is None:
            continue
        there = re.findall(r"'([^']+)'", text[wrong.end() :])
        near = difflib.get_close_matches(wrong[1], there, n=1)
        return UserError.of(
            data,
            expected=f"a {kind} {wrong[1]!r}",
            found=some(near + [name for name in there if name not in near]) or "none of that name",
            remedy=f"Name one of them in this source's `{key}:`" + (f"; it looks like {near[0]!r}" if near else ""),
        )
    return None
