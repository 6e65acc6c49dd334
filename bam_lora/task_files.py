"""Task files of the user's own, in the harness's format, read without running anything that they bring along.

A task file can name Python functions (`!function`), metrics and data sets whose code is fetched and run, and text
templates that reach into Python. The first two are refused; templates are run in Jinja's sandbox (`tasks`).
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bam_lora.errors import UserError, first_line
from bam_lora.store import hash_file

_BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # readers of files that come with the package datasets
_REMOTE = {
    "trust_remote_code": "data that need no code of their own",
    "hf_evaluate": "a metric that the harness has itself",
}
_PICKLED = "pandas"  # a reader of datasets, too, but of files that can run code when they are opened
_CODE = ("class", "custom_dataset", "unsafe_code")


@dataclass(frozen=True)
class LocalTask:
    """A task file as the harness takes it: its own values over those it includes, paths absolute.

    `content` is what its scores are a function of: the values, and the hashes of data files in place of their paths.
    """

    name: str
    config: dict[str, Any]
    content: list[Any]


def read_task_file(path: Path) -> LocalTask:
    """Reads a task file, and hashes the data files that it names.

    Raises:
        UserError: If it is missing, is not one task in YAML, names data files that are not there, or would run code.
    """
    config = _read(path, ())
    name = config.get("task")
    if not isinstance(name, str) or not name or not name.isprintable() or "task_list" in config or "group" in config:
        found = "several" if isinstance(name, list) or "task_list" in config or "group" in config else repr(name)
        raise _error(path, "one task, its name under `task`", found, "Write a file for each task")
    _require_harmless(path, config)
    kwargs = config.get("dataset_kwargs") or {}
    files = sorted(_files(path, kwargs.get("data_files")))
    if config.get("dataset_path") in _BUILDERS and not files:
        remedy = "Name them under dataset_kwargs.data_files, relative to the task file"
        raise _error(path, f"files for dataset_path: {config['dataset_path']}", "none", remedy)
    plain = {**config, "dataset_kwargs": {key: value for key, value in kwargs.items() if key != "data_files"}}
    splits = kwargs.get("data_files")
    names = sorted(splits) if isinstance(splits, dict) else []
    content = [plain, names, [hash_file(Path(file)) for file in files]]
    if Path(folder := str(config.get("dataset_path"))).is_absolute():
        plain["dataset_path"] = "a folder"
        content.append(_contents(Path(folder)))
    return LocalTask(name, config, content)


def _contents(folder: Path) -> dict[str, str]:
    """Hashes of the files of a data set's folder by path; hidden ones, which `datasets` passes over, left out."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hash_file(path) for name, path in found.items() if not name.startswith(".") and "/." not in name}


def _error(path: Path, expected: str, found: str, remedy: str) -> UserError:
    return UserError.of(f"task file {path}", expected=expected, found=found, remedy=remedy)


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a file over those of the files that it includes, its data files absolute."""
    if path.resolve() in chain:
        raise _error(path, "includes that end somewhere", "a circle", "Drop one `include`")
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = yaml.load(text, Loader=_loader(path))  # a safe loader: noqa: S506
    except yaml.YAMLError as error:
        found = " ".join(str(error).split())
        raise _error(path, "YAML of plain values", found, "Correct it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _error(path, "a task in YAML", first_line(error), "Check the path") from None
    if not isinstance(value, dict):
        raise _error(path, "a mapping of keys", type(value).__name__, "Start with `task: name`")
    included = value.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str):
            raise _error(path, "names of files under `include`", repr(name), "Name files")
        merged |= _read(path.parent / name, (*chain, path.resolve()))
    merged |= value
    kwargs = value.get("dataset_kwargs")
    if isinstance(kwargs, dict) and "data_files" in kwargs:
        merged["dataset_kwargs"] = {**kwargs, "data_files": _absolute(path.parent, kwargs["data_files"])}
    if isinstance(place := value.get("dataset_path"), str) and (path.parent / place).is_dir():
        merged["dataset_path"] = str((path.parent / place).resolve())
    return merged


def _loader(path: Path) -> type[yaml.SafeLoader]:
    class Loader(yaml.SafeLoader):
        """Plain values only, and an error of ours for the tag that runs code."""

    def refuse(loader: yaml.SafeLoader, node: yaml.Node) -> None:
        line = node.start_mark.line + 1
        found = f"!function {getattr(node, 'value', '')} in line {line}".strip()
        remedy = "Prepare the data beforehand, and use a template such as {{question}} in the file"
        raise _error(path, "a task without Python code of its own", found, remedy)

    Loader.add_constructor("!function", refuse)
    return Loader


def _absolute(folder: Path, files: Any) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(folder, one) for split, one in files.items()}
    if isinstance(files, list):
        return [_absolute(folder, one) for one in files]
    return (
        str((folder / Path(files).expanduser()).absolute()) if isinstance(files, str) and "://" not in files else files
    )


def _files(path: Path, files: Any) -> Iterator[str]:
    """The data files, each a file that is there; patterns spelled out."""
    if isinstance(files, dict | list):
        for one in files.values() if isinstance(files, dict) else files:
            yield from _files(path, one)
    elif files is not None:
        found = [file for file in glob.glob(str(files)) if Path(file).is_file()] if isinstance(files, str) else []
        if not found:
            raise _error(path, "data files that are there", repr(files), "Check dataset_kwargs.data_files")
        yield from found


def _require_harmless(path: Path, config: Mapping[str, Any]) -> None:
    for key, value in _walk(config):
        if key in _REMOTE and value:
            raise _error(path, _REMOTE[key], f"{key}: true", "Code from elsewhere is not run; leave it out")
        if key in _CODE and value:
            raise _error(path, "a task without code of its own", f"{key}", "Leave it out")
    if config.get("dataset_path") == _PICKLED:
        remedy = "Save the data as Parquet or JSON, and name that"
        raise _error(path, "data that run no code when they are opened", "pickled data (dataset_path: pandas)", remedy)


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)
