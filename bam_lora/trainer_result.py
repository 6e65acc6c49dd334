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
from bam_lora.report.plots import write_plane
from bam_lora.rundir import RunDirectory
from bam_lora.store import MANIFEST, write_text

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def result_folder(directory: RunDirectory) -> Path:
    """The finished model.

    Raises:
        UserError: If the run is not finished.
    """
    if not is_finished(directory):  # which verifies the model
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
    folder = result_folder(directory)
    text = model_card(report, report["recipe"], picture=write_plane(folder, report))
    match = _FRONT_MATTER.match(text)
    matter = {**(yaml.safe_load(match[1]) if match else {}), **{k: v for k, v in details.items() if v is not None}}
    body = text[match.end() :] if match else text
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    write_text(folder / "README.md", f"---\n{front}---\n{body}")


def upload(
    directory: RunDirectory, args: Any, message: str, *, token: str | None = None, revision: str | None = None,
    blocking: bool = True,
) -> Any:  # fmt: skip
    """Uploads the result to the Hub, to `args.hub_model_id` or a repository named after the run directory.

    Args:
        directory: A finished run.
        args: The trainer's arguments: hub_model_id, hub_token, hub_private_repo, hub_revision.
        message: The commit's message.
        token: In place of `args.hub_token`.
        revision: In place of `args.hub_revision`.
        blocking: False gives a future.

    Returns:
        The commit's address.
    """
    from huggingface_hub import HfApi

    folder = result_folder(directory)
    api = HfApi(token=token or args.hub_token)
    wanted = args.hub_model_id or directory.root.name
    repository = api.create_repo(wanted, private=args.hub_private_repo, exist_ok=True).repo_id
    settings = {"commit_message": message, "revision": revision or args.hub_revision, "ignore_patterns": [MANIFEST]}
    done = api.upload_folder(repo_id=repository, folder_path=str(folder), run_as_future=not blocking, **settings)
    return str(done) if blocking else done


class ResultMethods:
    """What a trainer does with the result of its run; see `BamTrainer`."""

    args: Any

    @property
    def directory(self) -> RunDirectory:
        """The run directory: `args.output_dir`."""
        return RunDirectory(Path(self.args.output_dir).expanduser().resolve())

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Copies the result, a Hugging Face model folder, to `output_dir`; None leaves it in the run's `model/`.

        Raises:
            UserError: If the run is not finished.
        """
        copy_result(self.directory, output_dir or self.directory.model)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        **details: Any,
    ) -> None:
        """Writes the result's model card anew, with this and other front matter, such as license, in `details`."""
        named = {"model_name": model_name, "datasets": dataset_name, "tags": tags}
        listed = {name: [value] if isinstance(value, str) and name != "model_name" else value
                  for name, value in named.items()}  # fmt: skip
        write_card(self.directory, {**listed, **details})

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **card: Any,
    ) -> Any:
        """Uploads the result to `args.hub_model_id` (or a name like the run directory's); gives the address.

        Args:
            commit_message: Of the commit.
            blocking: False gives a future of the address.
            token: None: `args.hub_token`.
            revision: None: `args.hub_revision`.
            card: As for `create_model_card`.
        """
        if card:
            self.create_model_card(**card)
        own = {name: value for name, value in (("token", token), ("revision", revision)) if value is not None}
        return upload(self.directory, self.args, commit_message, blocking=blocking, **own)

    @property
    def hub_model_id(self) -> str:
        """The repository that `push_to_hub` uploads to."""
        return str(self.args.hub_model_id or self.directory.root.name)

    @property
    def accelerator(self) -> Any:
        """The process's state, by which scripts print, as in `trainer.accelerator.print(...)`."""
        return self.args.distributed_state

    def end(self) -> None:
        """Nothing: trackers are ended with each branch. Scripts of TRL's call it last."""
