"""What the Hub's cache on this machine has of a repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bam_lora.hub_errors import Repository, is_offline
from bam_lora.hub_progress import say


def cached_folder(wanted: Repository, patterns: Sequence[str] | None = None) -> Path | None:
    """The folder of a commit in the cache; None if there is none, or it is known not to have all of these files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                wanted.name,
                repo_type=wanted.kind,
                revision=wanted.revision,
                allow_patterns=None if patterns is None else list(patterns),
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        return None


def cached_sizes(at: Repository) -> dict[str, int] | None:
    """Sizes of all files of a commit by path, as the cache remembers them; None if it does not."""
    import huggingface_hub

    remembered = getattr(huggingface_hub, "get_cached_repo_tree", None)  # of the newer versions
    if remembered is None:
        return None
    try:
        return {file.path: file.size for file in remembered(at.name, repo_type=at.kind, revision=at.revision)}
    except huggingface_hub.errors.CachedRepoTreeNotFoundError:
        return None


def dropped_if_broken(at: Repository, cached: Path, size: int) -> bool:
    """Whether a file in the cache was not the whole one, and is gone: by its size, as after a disk ran full."""
    if size in (0, cached.stat().st_size) or is_offline():
        return False
    say(f"{at.name}: {cached.name} in the cache is damaged and is fetched again")
    for path in (cached.resolve(), cached):  # the content, and the link that leads to it
        path.unlink(missing_ok=True)
    return True
