"""Python, packages, the text encoding and the environment's variables, for `bam-lora doctor`."""

from __future__ import annotations

import locale
import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata

from bam_lora.doctor_finding import NOTE, OK, PROBLEM, Finding

DISTRIBUTION = "bam-lora"
# Variables that change what a run does, and are easily forgotten in a shell's start-up file.
_VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "HIP_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "BAM_LORA_VERBOSE",
)
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = ("1", "on", "yes", "true")
_SECRET = re.compile(r"//[^/@\s]*@")


def python() -> Iterator[Finding]:
    """The interpreter against `requires-python`."""
    from packaging.specifiers import SpecifierSet

    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    try:
        wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    except metadata.PackageNotFoundError:
        yield Finding("python", OK, found)
        return
    if platform.python_version() in SpecifierSet(wanted, prereleases=True):
        yield Finding("python", OK, found)
    else:
        yield Finding("python", PROBLEM, f"{found}; wanted {wanted}", "Make an environment with a newer Python")


def packages() -> Iterator[Finding]:
    """Every package that bam-lora requires, against its range, as the installed metadata has it."""
    from packaging.requirements import Requirement

    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", NOTE, f"{DISTRIBUTION} itself is not installed, so its ranges cannot be looked up")
        return
    wanted = [Requirement(text) for text in declared]
    # Those of extras have a marker that names them: what is optional may be missing.
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    good = []
    for one in sorted(wanted, key=lambda one: one.name):
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            yield Finding(one.name, PROBLEM, f"not installed; wanted {one.specifier}", f'pip install "{one}"')
            continue
        if one.specifier.contains(version, prereleases=True):
            good.append(f"{one.name} {version}")
        else:
            yield Finding(one.name, PROBLEM, f"{version}; wanted {one.specifier}", f'pip install "{one}"')
    if good:
        yield Finding("packages", OK, ", ".join(good))


def text_encoding() -> Iterator[Finding]:
    """Whether terminal and files are UTF-8: the texts are in any script."""
    terminal = (getattr(sys.stdout, "encoding", None) or "none").lower().replace("-", "")
    files = locale.getpreferredencoding(False).lower().replace("-", "")
    if terminal == files == "utf8":
        yield Finding("text", OK, "UTF-8")
        return
    remedy = "Set PYTHONUTF8=1" + ("" if sys.platform == "win32" else ", or LANG=C.UTF-8")
    yield Finding("text", NOTE, f"the terminal is {terminal}, files are {files}: letters may be lost on screen", remedy)


def environment_variables() -> Iterator[Finding]:
    """Variables that are set and change what a run does; never the value of a token."""
    values = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if values.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":  # as the command itself sets it
        del values["OMP_WAIT_POLICY"]
    if not values:
        yield Finding("environment", OK, "no variable that changes anything is set")
        return
    shown = ", ".join(f"{name}={_printable(value)}" for name, value in values.items())
    yield Finding("environment", OK, shown)
    offline = [name for name in _OFFLINE if values.get(name, "").lower() in _TRUE]
    if offline:
        yield Finding(
            "environment",
            NOTE,
            f"{', '.join(offline)}: nothing is downloaded, only what is in the cache can be used",
            f"unset {' '.join(offline)}, if that is not meant",
        )
    threads = values.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > (os.cpu_count() or 1):
        yield Finding(
            "environment",
            NOTE,
            f"OMP_NUM_THREADS={threads} on {os.cpu_count()} processors: threads wait for each other",
            "unset OMP_NUM_THREADS",
        )


def _printable(value: str) -> str:
    """A value on one line, without a name and password in an address."""
    return _SECRET.sub("//***@", "".join(char if char.isprintable() else "?" for char in value))[:100]
