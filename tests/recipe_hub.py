"""The recipes on a local Hub: tiny models of the stated architectures, rows of the stated columns."""

from __future__ import annotations

import contextlib
import functools
import gc
import gzip
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_fixtures import PatchedHub, patch_libraries, running
from small_models import SMALL

from bam_lora.recipe import Recipe
from bam_lora.recipe_catalogue import DataSet, read_catalogue, used_sources

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
SHARED = RECIPES / "_shared"
BASES = sorted((SHARED / "bases").glob("*.yaml"))
GOALS = sorted((SHARED / "goals").glob("*.yaml"))
LANGUAGES = sorted(path.parent for path in RECIPES.glob("*/data.yaml"))
FRAGMENTS = ("data.yaml", "instruct-data.yaml")
TASKS = sorted(RECIPES.glob("*/tasks.yaml"))
FULL = sorted(path for path in RECIPES.glob("[!_]*/*.yaml") if path not in TASKS and path.name not in FRAGMENTS)
SCRIPTS = sorted(RECIPES.glob("*/adapt.py"))

_HELD_OUT = 200  # rows that a split such as train[-200:] takes away
_ROWS = 12
_WORDS = ("Вода", "земя", "Haus", "Baum", "river", "stone", "ветер", "Φως")


@functools.cache
def catalogue() -> dict[str, DataSet]:
    return read_catalogue(SHARED / "datasets")


def comment(path: Path) -> str:
    """The comment at the head of a file, its lines joined."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines)


def architecture(base: Path) -> str:
    """What the head of a base's fragment says it is."""
    found = re.search(r"Architecture (\w+);", comment(base))
    assert found, base
    return found[1]


def hub_id(base: Path) -> str:
    """The model that a base's fragment names."""
    line = next(line for line in base.read_text(encoding="utf-8").splitlines() if line.startswith("base: "))
    return line.removeprefix("base: ")


def fragment_of(language: Path, goal: Path) -> Path | None:
    """The language's fragment that goes with a goal; None if it has none."""
    path = language / ("instruct-data.yaml" if goal.stem == "instruct" else "data.yaml")
    return path if path.is_file() else None


# Models


def save_base(folder: Path, model_type: str, tokenizer: Path) -> Path:
    """A model of two layers of an architecture, in bf16, with the tokenizer of another tiny one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    own = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **own})
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


# Data


def value(kind: Any, name: str, number: int, beside: Mapping[str, Any]) -> Any:
    """A value of a column's type; `beside` is what its struct or row has so far."""
    if isinstance(kind, Mapping):
        made: dict[str, Any] = {}
        for inner, inner_kind in kind.items():
            made[inner] = value(inner_kind, inner, number, beside)
        return made
    if isinstance(kind, list):
        return [value(kind[0], name, number, {"turn": turn}) | turn_of(kind[0], turn) for turn in range(2)]
    if kind == "string":
        count = 12 if name == "text" and "turn" not in beside else 3
        return f"{name} {number}: " + " ".join(_WORDS[(number * 7 + i * 3) % len(_WORDS)] for i in range(count))
    import datetime

    plain = {"int64": number, "int32": number, "float64": number / 8, "float32": number / 8, "bool": number % 2 == 0}
    return plain[kind] if kind in plain else datetime.datetime(2019, 4, 1 + number % 28)


def turn_of(kind: Any, turn: int) -> dict[str, Any]:
    """Who speaks, in the words of the list's own columns: questions and answers by turns."""
    if "role" in kind:
        return {"role": ("user", "assistant")[turn]}
    return {"from": ("human", "gpt")[turn]} if "from" in kind else {}


def rows_of(data: DataSet, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield value(data.columns, "row", number, {})


def arrow_type(kind: Any) -> Any:
    import pyarrow as pa

    if isinstance(kind, Mapping):
        return pa.struct([(name, arrow_type(inner)) for name, inner in kind.items()])
    if isinstance(kind, list):
        return pa.list_(arrow_type(kind[0]))
    return pa.timestamp("s") if kind == "timestamp[s]" else pa.type_for_alias(kind)


def encoded(data: DataSet, path: str, count: int) -> bytes:
    """Rows in the format that the name of the file says."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = list(rows_of(data, count))
    if path.endswith(".parquet"):
        buffer = io.BytesIO()
        schema = pa.schema([(name, arrow_type(kind)) for name, kind in data.columns.items()])
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
        return buffer.getvalue()
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()
    return gzip.compress(lines) if path.endswith(".gz") else lines


def data_files(data: DataSet, configs: Mapping[str, set[str]], held_out: bool, rows: int) -> dict[str, bytes]:
    """The files of these configurations, where the catalogue says that they lie, and the card that declares them."""
    files: dict[str, bytes] = {}
    declared = []
    for config in configs:
        paths = []
        for split in data.splits(None if config == "default" else config):
            path = data.files.format(config=config, split=split)
            count = rows + (_HELD_OUT if held_out and split == "train" else 0)
            files[path] = encoded(data, path, count)
            paths.append({"split": split, "path": path})
        declared.append({"config_name": config, "data_files": paths})
    front = yaml.safe_dump({"configs": declared}, sort_keys=False)
    files["README.md"] = f"---\n{front}---\nMade by a test.\n".encode()
    return files


def serve(hub: PatchedHub, recipes: Iterable[Recipe], rows: int = _ROWS) -> None:
    """Puts the data sets of these recipes on the hub, so many rows of each split, gated ones as gated."""
    known = catalogue()
    used: dict[str, dict[str, set[str]]] = {}
    ranged = set()
    for recipe in recipes:
        every = [*recipe.data.target, *recipe.data.replay, *recipe.evaluation.target, *recipe.evaluation.source]
        ranged |= {one.path for one in every if "[" in one.split}
        for name, configs in used_sources(recipe).items():
            used.setdefault(name, {}).update(configs)
    for name, configs in used.items():
        files = data_files(known[name], configs, name in ranged, rows)
        hub._add("dataset", name, files, known[name].gated, False, "data")


@contextlib.contextmanager
def recipes_hub(folder: Path, tokenizer: Path, recipes: Iterable[Recipe], rows: int = _ROWS) -> Iterator[PatchedHub]:
    """A hub, asked by this process, with every base and the data sets of these recipes, and a login that may read them.

    `folder` gets the libraries' caches and the bases, one of each architecture; what is gated is so here as well.
    """
    with running(PatchedHub()) as hub, pytest.MonkeyPatch.context() as patch:
        hub.home = folder / "hf-home"
        patch_libraries(patch, hub.url, hub.home)
        patch.setattr("bam_lora.scoring.SAMPLE_TOKENS", 3)
        collect = gc.collect  # a whole one goes through all libraries each time, for models of a few kB
        patch.setattr("gc.collect", lambda generation=0: collect(0))
        patch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # of 5.x: 5 s a stream
        kinds = {kind: save_base(folder / kind, kind, tokenizer) for kind in map(architecture, BASES)}
        gated = {hub_id(base) for base in BASES if "gated: ask" in comment(base)}
        for base in BASES:
            hub.add_model(hub_id(base), kinds[architecture(base)], gated=hub_id(base) in gated)
        serve(hub, recipes, rows)
        hub.log_in(hub.add_token("hf_of_who_has_access", user="somebody", access=(*gated, *catalogue())))
        yield hub
