"""A finished run on the Hub: its model (or an export of it), the model card, the report; and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError, first_line, some
from bam_lora.hub_errors import (
    Repository,
    bad_token,
    endpoint,
    explained,
    is_away,
    is_offline,
    known_trouble,
    status_of,
)
from bam_lora.hub_progress import say
from bam_lora.hub_public import adapter_card, public_files, public_report, result_card, without_folders
from bam_lora.memory import readable_bytes
from bam_lora.report.card import PLANE
from bam_lora.store import read_record

_TOKENS = "https://huggingface.co/settings/tokens"
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_ADAPTER = "adapter_config.json"
_CONFIGS = (_ADAPTER, "config.json", "generation_config.json")
_REPORT = "report.json"


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now: its address and commit, whether that is a new one, and who may see it."""

    url: str
    commit: str
    new: bool
    private: bool


def push(
    run: Path,
    repository: str,
    *,
    folder: Path | None = None,
    private: bool | None = None,
    revision: str | None = None,
    note: str | None = None,
) -> Pushed:
    """Uploads the result of a run; what the repository has already is not sent again.

    Args:
        run: A finished run's directory.
        repository: `org/name`, or `name` for the account of the token. Created if it is not there.
        folder: An export of the run to upload in place of its model.
        private: Who may see it; None makes a new repository private and leaves another as it is.
        revision: Branch to commit to, made if it is not there; None: main.
        note: A sentence on the export for the card.

    Raises:
        UserError: If the run is not finished, no token may write (said before the upload), or the upload fails.
    """
    from huggingface_hub import HfApi

    from bam_lora.rundir import RunDirectory
    from bam_lora.trainer_result import result_folder

    root = run.expanduser().resolve()
    model = result_folder(RunDirectory(root))
    api = HfApi()
    wanted = Repository(_writer(api, repository), revision)
    with explained(wanted, _failed):
        files = _published(root, model, folder or model, wanted.name, note)
        before = _repository(api, wanted, private)
        if revision is not None:
            api.create_branch(wanted.name, branch=revision, exist_ok=True)
        head = api.model_info(wanted.name, revision=revision)
        commit = _commit(api, wanted, files, [one.rfilename for one in head.siblings or []])
    url = f"{endpoint()}/{wanted.name}" + (f"/tree/{revision}" if revision else "")
    return Pushed(url, commit, commit != head.sha, before)


def _published(root: Path, model: Path, folder: Path, name: str, note: str | None) -> dict[str, Path | bytes]:
    """Everything that is uploaded, by path in the repository."""
    from bam_lora.report import render_html

    files = public_files(folder)
    record = read_record(root / "report.json", "report")
    assert record is not None, root  # is_finished has looked
    report = public_report(record)
    own = folder / "README.md"  # an adapter's; a model with a chat vector has the run's
    card = (own if own.is_file() else model / "README.md").read_text(encoding="utf-8")
    if PLANE.search(card) and not any(name.startswith("figures/") for name in files):
        card = PLANE.sub("", card)
    if (folder / _ADAPTER).is_file():
        config = files[_ADAPTER]
        base = json.loads(config if isinstance(config, bytes) else config.read_bytes())["base_model_name_or_path"]
        card = adapter_card(card, base, name, note or "The run as one LoRA adapter.")
    else:
        card = result_card(card, note)
    texts = {
        "README.md": card,
        "report.html": render_html([report], None),
        _REPORT: json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    return {**files, **{path: without_folders(text, root).encode() for path, text in texts.items()}}


def _writer(api: Any, repository: str) -> str:
    """The repository's whole name, once it is known that there is a token that may write."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    what = f"--push {repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError.of(
            what, expected="org/name, or name", found=first_line(error).rstrip("."), remedy="Choose another name"
        ) from error
    if is_offline():
        raise UserError.of(
            what, expected="the Hub", found="HF_HUB_OFFLINE, which forbids it", remedy="Unset HF_HUB_OFFLINE"
        )
    if get_token() is None:
        raise UserError.of(
            what,
            expected="a token that may write",
            found="none",
            remedy=f"Make one with the role “write” at {_TOKENS}, log in with `hf auth login`, then try again",
        )
    try:
        who = api.whoami()
    except Exception as error:
        if status_of(error) == 401:
            raise bad_token(what) from error
        raise _failed(error, Repository(repository)) from error
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise _may_not_write(what, f"one of {who['name']} that may only read")
    return repository if "/" in repository else f"{who['name']}/{repository}"


def _may_not_write(what: str, found: str) -> UserError:
    return UserError.of(
        what,
        expected="a token that may write there",
        found=found,
        remedy=f"Make one with the role “write” at {_TOKENS} and log in with it (`hf auth login`), or choose a name "
        "under your own account",
    )


def _repository(api: Any, wanted: Repository, private: bool | None) -> bool:
    """Finds or makes the repository; whether it is private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = bool(api.model_info(wanted.name).private)
    except RepositoryNotFoundError:
        hidden = private is not False
        api.create_repo(wanted.name, private=hidden)
        return hidden
    if private is not None and private != found:
        now, other = ("private", "public") if found else ("public", "private")
        raise UserError.of(
            f"--push {wanted.name}",
            expected=f"a {other} repository",
            found=f"one that is {now} already",
            remedy=f"Leave out --{other}, choose another name, or change it at {wanted.page}/settings",
        )
    return found


def _commit(api: Any, wanted: Repository, files: Mapping[str, Path | bytes], there: list[str]) -> str:
    """One commit of all files; of an earlier push the weights that are not among them go, and what says how they load.

    Raises:
        UserError: If weights are there that were not pushed from here.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    weights = [name for name in there if name.endswith(_WEIGHTS)]
    if weights and _REPORT not in there:
        raise UserError.of(
            f"--push {wanted.name}",
            expected="a new repository, or one that this command has filled",
            found=f"another model's weights ({some(weights)}), which it would replace",
            remedy="Choose another name, or delete them on the Hub first",
        )
    # An adapter's config beside a model would make transformers look for the adapter.
    stale = [name for name in there if (name in weights or name in _CONFIGS) and name not in files]
    size = sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in files.values())
    say(
        f"pushing {len(files)} files, {readable_bytes(size)}, to {wanted.name}; what is there already is not sent again"
    )
    operations = [CommitOperationDelete(path_in_repo=name) for name in stale]
    operations += [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=one if isinstance(one, bytes) else str(one))
        for name, one in files.items()
    ]
    with _quietly():
        made = api.create_commit(
            wanted.name, operations, commit_message="Model, card and report of bam_lora", revision=wanted.revision
        )
    return str(made.oid)


@contextmanager
def _quietly() -> Iterator[None]:
    """Nothing to commit is said by us."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _failed(error: BaseException, wanted: Repository) -> UserError:
    what = f"--push {wanted.name}"
    status = status_of(error)
    if status == 403:
        return _may_not_write(what, "one that may not")
    again = "then give the same command again: files that have arrived are not sent again"
    if is_away(error) and status is None:
        return UserError.of(
            what,
            expected=f"{endpoint()}",
            found=f"no connection ({first_line(error.__cause__ or error)})",
            remedy=f"Check the network and the proxy, {again}",
        )
    return known_trouble(error, wanted) or UserError.of(
        what,
        expected="to upload it",
        found=f"{type(error).__name__}: {first_line(error.__cause__ or error)}",
        remedy=f"Put that right, {again}",
    )
