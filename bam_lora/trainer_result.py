"""The result of a `BamTrainer`'s run: loaded, copied, described, published."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError
from bam_lora.loop import is_finished
from bam_lora.report import collect, model_card
from bam_lora.rundir import RunDirectory
from bam_lora.store import MANIFEST, verify, write_text

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def result_folder(directory: RunDirectory) -> Path:
    """The finished model.

    Raises:
        UserError: If the run is not finished.
    """
    if not is_finished(directory) or verify(directory.model) is None:
        raise UserError.of(
            str(directory.root), expected="a finished run", found="one that is not", remedy="Call train()"
        )
    return directory.model


def copy_result(directory: RunDirectory, output: str | Path) -> None:
    """Copies the finished model to a folder; files of the same names are replaced, as `save_model` does elsewhere.

    Raises:
        UserError: If there is no result, or the path is no folder.
    """
    source, target = result_folder(directory), Path(output).expanduser().resolve()
    if target == source:
        return
    if target.exists() and not target.is_dir():
        raise UserError.of(str(target), expected="a folder", found="a file", remedy="Choose another")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".tmp-") as place:  # whole before it takes another's place
        staged = Path(place) / "model"
        shutil.copytree(source, staged, ignore=shutil.ignore_patterns(MANIFEST))
        files = sorted(
            (path for path in staged.rglob("*") if path.is_file()), key=lambda path: path.name == "config.json"
        )
        for path in files:
            place_of = target / path.relative_to(staged)
            place_of.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place_of)


def write_card(directory: RunDirectory, details: Mapping[str, Any]) -> None:
    """Writes the model card anew, with further front matter such as license or tags."""
    import yaml

    report = collect(directory.root)
    text = model_card(report, report["recipe"])
    match = _FRONT_MATTER.match(text)
    matter = {**(yaml.safe_load(match[1]) if match else {}), **{k: v for k, v in details.items() if v is not None}}
    body = text[match.end() :] if match else text
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    write_text(result_folder(directory) / "README.md", f"---\n{front}---\n{body}")


def upload(directory: RunDirectory, args: Any, message: str, **details: Any) -> str:
    """Uploads the result to the Hub, to `args.hub_model_id` or a repository named after the run directory.

    Args:
        directory: A finished run.
        args: The trainer's arguments: hub_model_id, hub_token, hub_private_repo, hub_revision.
        message: The commit's message.
        details: Further keyword arguments of `HfApi.upload_folder`.

    Returns:
        The commit's address.
    """
    from huggingface_hub import HfApi

    folder = result_folder(directory)
    api = HfApi(token=args.hub_token)
    wanted = args.hub_model_id or directory.root.name
    repository = api.create_repo(wanted, private=args.hub_private_repo, exist_ok=True).repo_id
    settings = {"commit_message": message, "revision": args.hub_revision, "ignore_patterns": [MANIFEST], **details}
    return str(api.upload_folder(repo_id=repository, folder_path=str(folder), **settings))
