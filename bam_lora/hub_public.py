"""What of a run may be published: its model, card and report, without this machine's paths, scripts or tokens."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from bam_lora.errors import UserError
from bam_lora.store import MANIFEST

_LOCAL = re.compile(r"(?:/|~/|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)\S")
_IN_ARGUMENT = re.compile(r"""(?<![\w.~/\\])(?:/|~/|\.{1,2}/|[A-Za-z]:[\\/])[^'",\]}]*""")
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_USE = re.compile(r"^## Use\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_TEXTS = ("samples",)  # of models, not of us: left as they are
_PRIVATE = ("excerpt",)  # text of the training data
_SMALL_BYTES = 1_000_000


def public_files(folder: Path) -> dict[str, Path | bytes]:
    """The files of a model or adapter folder by path: those to be uploaded as they are, and those without local paths.

    Raises:
        UserError: If a link leads out of the folder.
    """
    found: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == MANIFEST or any(part.startswith(".") for part in name.split("/")):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError.of(
                str(path), expected="a file of its own folder", found=f"a link to {path.resolve()}",
                remedy="Put the file itself there if it may be published",
            )  # fmt: skip
        found[name] = _without_origin(path)
    return found


def _without_origin(path: Path) -> Path | bytes:
    """Configs may say which folder of this machine a model was loaded from."""
    if path.suffix != ".json" or path.stat().st_size > _SMALL_BYTES:
        return path
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        return path
    origins = {key: value for key, value in values.items() if key.endswith("name_or_path") and is_local(value)}
    if not origins:
        return path
    values |= {key: _last(value) for key, value in origins.items()}
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def is_local(value: object) -> bool:
    """Whether a value is a path on this machine."""
    return isinstance(value, str) and bool(_LOCAL.match(value))


def _last(path: str) -> str:
    return (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).name


def public_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """A run's report with local paths cut down to their last part, without a script's arguments or text of the data."""
    own = {key: value if key in _TEXTS else _public(value) for key, value in report.items() if key != "key"}
    recipe = own.get("recipe")
    if isinstance(recipe, dict):
        recipe.pop("script", None)
    environment = own.get("environment")
    if isinstance(environment, dict) and environment.get("command"):
        environment["command"] = _public_command(str(report["environment"]["command"]))
    return own


def _public_command(command: str) -> str:
    """A command line without paths; those with spaces in them are one argument."""
    try:
        arguments = shlex.split(command)
    except ValueError:  # not written by shlex: nothing of it is known to be harmless
        return ""
    return shlex.join(_IN_ARGUMENT.sub(lambda found: _last(found[0]), one) for one in arguments)


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_public(key): _public(item) for key, item in value.items() if key not in _PRIVATE}
    if isinstance(value, list):
        return [_public(item) for item in value]
    return _last(value) if is_local(value) else value


def without_folders(text: str, root: Path) -> str:
    """A text without the run's folder, or the home folder, wherever they are in it."""
    for folder, shown in ((root, root.name), (root.parent, "…"), (Path.home(), "~")):
        if len(folder.parts) > 1:
            text = text.replace(str(folder), shown)
    return text


def result_card(card: str, note: str | None = None) -> str:
    """The model card of what is pushed: with a word on it, and where the report is."""
    match = _FRONT_MATTER.match(card)
    front, body = (match[0], card[match.end() :]) if match else ("", card)
    title, _, rest = body.strip().partition("\n\n")
    parts = [
        title,
        note or "",
        rest,
        "## Report",
        "[report.html](report.html), and as JSON [report.json](report.json).",
    ]
    return f"{front}\n" + "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def adapter_card(card: str, base: str, repository: str, note: str) -> str:
    """A run's card for its adapter: PEFT's, with how it is loaded."""
    match = _FRONT_MATTER.match(card)
    front = {**(yaml.safe_load(match[1]) if match else {}), "library_name": "peft"}
    body = card[match.end() :] if match else card
    code = (
        "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{repository}", dtype="auto")\n```'
    )
    use = f"## Use\n\nA LoRA adapter of {base}; load both with PEFT:\n\n{code}\n\n"
    body = _USE.sub(lambda found: use, body) if _USE.search(body) else f"{body.rstrip()}\n\n{use}"
    shown = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return result_card(f"---\n{shown}---\n{body}", note)
