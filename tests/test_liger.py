"""Liger's real kernels, where liger-kernel and triton are installed: on a CPU, in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bam_lora.kernels import LIGER_MODELS

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not (find_spec("liger_kernel") and find_spec("triton")), reason="liger-kernel and triton are not installed"
)


def interpreted(*arguments: str) -> Any:
    command = [sys.executable, str(HERE / "liger_interpreted.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_close(kinds: list[str]) -> None:
    found = interpreted("kinds", *kinds)
    assert len(found) == 2 * len(kinds)
    for name, one in found.items():
        half = name.endswith("float16")
        assert one["loss"] < (1e-3 if half else 1e-6), name
        assert one["gradients"] < (0.05 if half else 1e-5), name
        assert one["later_models_as_before"], name


def test_a_step_is_the_same() -> None:
    assert_close(["llama"])


@pytest.mark.slow
def test_a_step_is_the_same_for_every_kind() -> None:
    assert_close(sorted({*LIGER_MODELS} - {"llama"}))


@pytest.mark.slow
def test_a_branch_is_nearly_the_same_and_resumes_to_the_same_bytes(tiny_base: Path, tmp_path: Path) -> None:
    found = interpreted("branch", str(tiny_base), str(tmp_path))
    assert found["liger"]["losses"] == pytest.approx(found["plain"]["losses"], rel=1e-5)
    assert found["liger"]["adapter"] != found["plain"]["adapter"]  # they are really others
    assert found["liger"] == found["checkpointing"] == found["cut"]
    assert found["dora"]["losses"] == pytest.approx(found["plain dora"]["losses"], rel=1e-5)
    assert found["plain"] == found["plain again"]
