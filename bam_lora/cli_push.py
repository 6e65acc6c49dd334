"""What `bam-lora export` takes together, and its --push."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

Push_ = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="Upload it to the Hub, as ORG/NAME; NAME alone is under your account."),
]
Public_ = Annotated[
    bool | None,
    typer.Option("--public/--private", help="Who may see a repository that --push makes. Default: private."),
]
Revision_ = Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch that --push commits to. Default: main.")]


@dataclass(frozen=True)
class Exported:
    """What an export writes, as the options say."""

    output: Path | None
    rank: int | None
    scale: float
    chat_vector: str | None
    against: str | None
    weight: float
    verify: bool


def require_sense(writes: Exported, *, push: str | None, public: bool | None, revision: str | None) -> None:
    """Raises a UserError for options that do nothing, or not what was meant."""
    if writes.output is None and (push is None or writes.chat_vector is not None):
        raise _with_it("export", "--output FOLDER" + ("" if writes.chat_vector else " or --push REPO"), "neither")
    if writes.chat_vector is None:
        for option, value, default in (
            ("--against", writes.against, None),
            ("--weight", writes.weight, 1.0),
            ("--verify", writes.verify, False),
        ):
            if value != default:
                raise _with_it(option, "--chat-vector INSTRUCT with it", "none")
    elif writes.rank is not None:
        raise _with_it("--rank", "none beside --chat-vector, which writes a model", str(writes.rank))
    if writes.output is None:
        for option, value, default in (("--rank", writes.rank, None), ("--scale", writes.scale, 1.0)):
            if value != default:
                raise _with_it(option, "--output FOLDER with it: without, the run's own model is pushed", "none")
    if push is None:
        for option, given in (("--public or --private", public is not None), ("--revision", revision is not None)):
            if given:
                raise _with_it(option, "--push REPO with it", "none")


def _with_it(option: str, expected: str, found: str) -> Exception:
    from bam_lora.errors import UserError

    remedy = f"Add it, or leave {option} out"
    if expected.startswith("none"):
        remedy = "Leave it out"
    elif option == "export":
        remedy = "Say where the adapter or the model should go"
    return UserError.of(option, expected=expected, found=found, remedy=remedy)


def push_result(
    run: Path, repository: str, *, folder: Path | None, public: bool | None, revision: str | None, note: str | None
) -> None:
    """Uploads and says where it is."""
    if sys.stderr.isatty():  # read when huggingface_hub is first imported: gigabytes want a bar
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "0"
    from bam_lora.hub_push import push

    done = push(
        run, repository, folder=folder, private=None if public is None else not public, revision=revision, note=note
    )
    seen = "private: only you and those you let in see it" if done.private else "public"
    typer.echo(f"{done.url} ({seen})" + ("" if done.new else "; nothing is new"))
    if done.private:
        typer.echo(f"make it public: {done.url.partition('/tree/')[0]}/settings")
