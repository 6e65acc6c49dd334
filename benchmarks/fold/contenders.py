"""Who folds, and how it is called: copying, bam-lora, and the peers, some in environments of their own.

Each peer is called in the way its own documentation has it, with what it is fastest with on a CPU:
- PEFT: the bf16 model loaded, both adapters, `add_weighted_adapter(combination_type="cat")`, merged, saved.
- mergekit: a linear merge of `model+adapter` entries in bf16. It merges each adapter into a whole copy of the model
  first, in a cache that starts empty here.
- axolotl: `axolotl merge-lora`, which takes one adapter: it is given both stacked, made beforehand and not counted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from inputs import WEIGHTS, Inputs
from measuring import Failed, last_lines, measure

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEERS = ("peft", "mergekit", "axolotl")
_OWN_ENVIRONMENT = {"mergekit": ("mergekit", "peft", "transformers"), "axolotl": ("axolotl", "peft", "transformers")}
_INSTALL_SECONDS = 3600
# No look-ups, no telemetry: nobody's time should hang on the network.
_QUIET = {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """One way to get the folded model; `command` writes what it needs and returns program and arguments."""

    name: str
    python: str
    command: Callable[[Inputs, Path], list[str]]  # (inputs, empty folder) -> it
    result: str = "model"  # where the model is in that folder
    isolated: bool = False  # an environment without this project's path
    versions: dict[str, str] = field(default_factory=dict)

    def environ(self, threads: int) -> dict[str, str]:
        """Its environment variables."""
        result = {**os.environ, **_QUIET, "OMP_NUM_THREADS": str(threads)}
        if self.isolated:
            result.pop("PYTHONPATH", None)
        else:
            result["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return result

    def run(self, inputs: Inputs, folder: Path, threads: int) -> dict[str, Any]:
        """Runs it once, in a folder that is emptied first, and measures it; raises Failed."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = folder.with_name(f"{folder.name}.log")
        command = self.command(inputs, folder)
        os.sync()  # what others have left to write is not counted
        taken = measure(command, log, environ=self.environ(threads), written=folder / self.result)
        if not list((folder / self.result).glob("*.safetensors")):
            raise Failed(f"it ended well but wrote no model: {last_lines(log)}")
        return taken


def copying() -> Contender:
    """`cp -r`: what the disk allows."""
    return Contender(
        "cp -r", sys.executable, lambda inputs, folder: ["cp", "-r", str(inputs.base), str(folder / "model")]
    )


def ours() -> Contender:
    """`bam-lora fold`."""

    def command(inputs: Inputs, folder: Path) -> list[str]:
        chosen = [part for adapter in inputs.adapters for part in ("--adapter", str(adapter))]
        weights = [part for weight in WEIGHTS for part in ("--weight", str(weight))]
        return [sys.executable, "-m", "bam_lora", "fold", "--base", str(inputs.base), *chosen, *weights,
                "--output", str(folder / "model")]  # fmt: skip

    return Contender("bam-lora", sys.executable, command)


def peft() -> Contender:
    """PEFT, in this project's environment."""

    def command(inputs: Inputs, folder: Path) -> list[str]:
        given = [*map(str, (inputs.base, *inputs.adapters)), *map(str, WEIGHTS)]
        return [sys.executable, str(HERE / "peft_merge.py"), *given, str(folder / "model")]

    return Contender("peft", sys.executable, command)


def mergekit(python: str, versions: dict[str, str]) -> Contender:
    """mergekit's linear merge of models with LoRA."""

    def command(inputs: Inputs, folder: Path) -> list[str]:
        models = [
            {"model": f"{inputs.base.resolve()}+{adapter.resolve()}", "parameters": {"weight": weight}}
            for adapter, weight in zip(inputs.adapters, WEIGHTS, strict=True)
        ]
        config = folder / "merge.yaml"
        config.write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "bfloat16"}))
        program = str(Path(python).with_name("mergekit-yaml"))
        return [program, str(config), str(folder / "model"), "--lora-merge-cache", str(folder / "cache")]

    return Contender("mergekit", python, command, isolated=True, versions=versions)


def axolotl(python: str, versions: dict[str, str]) -> Contender:
    """Axolotl's memory-efficient merge, its default; of the values below all but the folders are only to please it."""

    def command(inputs: Inputs, folder: Path) -> list[str]:
        values = {
            "base_model": str(inputs.base.resolve()), "lora_model_dir": str(inputs.stacked.resolve()),
            "output_dir": str(folder), "adapter": "lora", "datasets": [{"path": "unused.jsonl", "type": "completion"}],
            "sequence_len": 512, "micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1,
            "learning_rate": 1e-4, "lora_r": 128, "lora_alpha": 128, "lora_target_linear": True, "bf16": False,
        }  # fmt: skip
        config = folder / "axolotl.yaml"
        config.write_text(yaml.safe_dump(values))
        return [str(Path(python).with_name("axolotl")), "merge-lora", str(config)]

    return Contender("axolotl", python, command, result="merged", isolated=True, versions=versions)


def peers(names: Sequence[str], work: Path) -> tuple[list[Contender], dict[str, str]]:
    """The peers asked for, installed where they need an environment, and why others are not there."""
    found, absent = [], {}
    for name in names:
        if name == "peft":
            found.append(peft())
            continue
        try:
            python = install(name, work / "envs" / name)
            found.append({"mergekit": mergekit, "axolotl": axolotl}[name](python, installed_versions(name, python)))
        except Failed as error:
            absent[name] = f"not installed: {error}"
    return found, absent


def install(name: str, folder: Path) -> str:
    """Makes an environment with a peer in it, or finds it made, and returns its Python; raises Failed."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return str(python)
    print(f"installing {name} in {folder} (minutes)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{name}.log")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    release = torch.__version__.partition("+")[0]  # the same for all, so that the products are
    with log.open("w") as file:
        for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, f"torch=={release}"], [*pip, name]):
            try:
                subprocess.run(command, check=True, stdout=file, stderr=file, timeout=_INSTALL_SECONDS)
            except (subprocess.SubprocessError, OSError) as error:
                file.flush()
                wrong = [line for line in log.read_text().splitlines() if line.startswith("ERROR")]
                raise Failed(" | ".join(wrong) or f"{type(error).__name__}: {last_lines(log)}") from None
    ready.touch()
    return str(python)


def installed_versions(name: str, python: str) -> dict[str, str]:
    """Versions of a peer and of what it stands on."""
    packages = ("torch", *_OWN_ENVIRONMENT[name])
    code = (
        f"import json; from importlib.metadata import version as v; print(json.dumps({{p: v(p) for p in {packages}}}))"
    )
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code], text=True))
    return found
