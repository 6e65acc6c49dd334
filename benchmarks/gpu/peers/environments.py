"""The Python that a way is run with: this project's, or that of a peer in an environment of its own, made here.

Each peer pins versions of transformers and TRL that are not ours, so they cannot share an environment. What is pinned
here is the library and all that decides its speed, as pip resolved it on 21 November 2026 for torch 2.13.0; what is
left is found in a result's "versions". Needs a package index and, with CUDA's libraries, about 8 GB a peer (3 GB
and 4 GB with torch for CPUs).

Tried on Python 3.11 without a GPU, with torch 2.13.0 for CPUs:
- unsloth 2026.10.7 installs, but its import ends with "NotImplementedError: Unsloth cannot find any torch accelerator?
  You need a GPU.", and before that, where the index gives a torchvision for CUDA beside a torch for CPUs, with
  "ImportError: Unsloth: torchvision==0.28.0 claims to match torch==2.13.0+cpu, but its compiled operators do not load".
- axolotl 0.19.0 installs, is imported, and trains (a few steps in fp32, without its kernels; with these, which it turns
  on by itself, the first step ends with "AttributeError: module 'torch._C' has no attribute
  '_cuda_getCurrentRawStream'").
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

OURS = ("trl-defaults", "trl-best", "trl-best-fp32", "ours")
PINS = {
    "unsloth": (
        # 2026.10.9, the newest, asks for a certifi that the index did not have.
        "unsloth==2026.10.7", "unsloth_zoo==2026.10.7", "torch==2.13.0", "transformers==5.17.0", "trl==1.15.0",
        "peft==0.21.2", "accelerate==1.15.0", "datasets==4.8.5", "bitsandbytes==0.50.2", "xformers==0.0.35",
        "cut-cross-entropy==25.1.1", "torchao==0.18.0", "torchvision==0.28.0",
    ),
    "axolotl": (
        # What pip finds for Python 3.11; 0.21.0 wants a newer one.
        "axolotl==0.19.0", "torch==2.13.0", "transformers==5.16.1", "trl==1.9.0", "peft==0.20.0", "accelerate==1.13.0",
        "datasets==4.8.4", "bitsandbytes==0.50.2", "xformers==0.0.35", "liger-kernel==0.8.1", "torchao==0.17.0",
    ),
}  # fmt: skip
IMPORTS = {"unsloth": "import unsloth", "axolotl": "import axolotl.train, axolotl.cli.config"}
_INSTALL_SECONDS = 3600
_IMPORT_SECONDS = 600
_REASON_CHARACTERS = 400


def python_for(way: str, work: Path, wheels: Path | None = None) -> Path | str:
    """The Python to run job.py with, installed on the first call (minutes), or in one line why there is none.

    Args:
        way: One of `peer_settings.WAYS`.
        work: Where environments are kept, each in `envs/WAY`, with what pip said in `envs/WAY.log`.
        wheels: Folders WAY/ of wheels for a machine without a package index: they are put before this environment's own
            libraries. None: an environment of the peer's own, from the index.

    Returns:
        A path; or, as text, why the peer could not be installed or imported here.
    """
    if way in OURS:
        return Path(sys.executable)
    folder = work / "envs" / way
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        failed = _install(way, folder) if wheels is None else _unpack(wheels / way, folder)
        if failed:
            return f"{way} could not be installed: {failed}"
        ready.touch()
    command, log = [str(python), "-c", IMPORTS[way]], folder.with_name(f"{way}.import.log")
    failed = _run(command, log, _IMPORT_SECONDS, alone=wheels is None)
    return f"{way} could not be imported: {failed}" if failed else python


def _install(way: str, folder: Path) -> str | None:
    """Makes the environment; returns None, or why it could not be."""
    print(f"installing {way} in {folder} (minutes)", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{way}.log")
    # Without a network it shall say so at once.
    patience = ["--retries", "1", "--timeout", "15"]
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", *patience]
    made = _run([sys.executable, "-m", "venv", str(folder)], log, _INSTALL_SECONDS)
    return made or _run([*pip, *PINS[way]], log, _INSTALL_SECONDS)


def _unpack(wheels: Path, folder: Path) -> str | None:
    """Makes a Python that finds what is in some wheels first, then what this one finds; returns None, or why not."""
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        return f"{wheels}: expected wheels, found none"
    shutil.rmtree(folder, ignore_errors=True)
    site, python = folder / "site", folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--no-deps"]
    failed = _run([*pip, "--target", str(site), *found], folder.with_name(f"{folder.name}.log"), _INSTALL_SECONDS)
    path, real = shlex.quote(str(site)), shlex.quote(sys.executable)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}} exec {real} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return failed


def _run(command: list[str], log: Path, seconds: int, *, alone: bool = True) -> str | None:
    """Runs a command, `alone` without the caller's libraries; returns None, or the line that says why it failed."""
    environ = {name: value for name, value in os.environ.items() if not alone or name != "PYTHONPATH"}
    with log.open("w") as file:
        try:
            done = subprocess.run(command, stdout=file, stderr=file, env=environ, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"not done after {seconds} s"
        except OSError as error:
            return f"{type(error).__name__}: {error}"
    return None if done.returncode == 0 else _reason(log.read_text(errors="replace"), done.returncode)


def _reason(said: str, status: int) -> str:
    """pip's last error, or the last line of a traceback."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or [f"exit status {status}, without a word"])[-1][:_REASON_CHARACTERS]
