"""The lower bounds of the dependencies, the versions they are tested with and what the documents say of them agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import datasets
import pytest
import torch
import trl
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from bam_lora.base import Loading
from bam_lora.library_versions import first_rows
from bam_lora.plan import BranchPlan
from bam_lora.sft_branch import SftBranch
from bam_lora.trainer_branch import TrainerBranch, TrainerParts

ROOT = Path(__file__).resolve().parents[1]


def pins(name: str) -> dict[str, Version]:
    """The exact versions of a constraints file by package."""
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            package, version = line.split("==")
            found[canonicalize_name(package)] = Version(version)
    return found


def required() -> list[Requirement]:
    """What a user installs: the dependencies and the extras that are not for developers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return [Requirement(text) for text in (*project["dependencies"], *extras["eval"], *extras["plots"])]


def test_every_lower_bound_is_the_version_that_the_oldest_tests_run_with():
    oldest = pins("constraints-oldest.txt")
    bounds = {}
    for one in required():
        (bound,) = [part.version for part in one.specifier if part.operator == ">="]
        bounds[canonicalize_name(one.name)] = Version(bound)
    assert len(bounds) > 15
    assert {name: oldest.get(name) for name in bounds} == bounds


def test_the_usual_versions_lie_in_the_ranges():
    usual = pins("constraints.txt")
    outside = [str(one) for one in required() if not one.specifier.contains(usual[canonicalize_name(one.name)])]
    assert outside == []


def test_the_table_of_versions_says_what_is_pinned():
    page = (ROOT / "docs" / "platforms.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
    files = [pins("constraints-oldest.txt"), pins("constraints.txt")]
    assert {name: tuple(map(Version, both)) for name, *both in rows} == {
        canonicalize_name(one.name): tuple(file[canonicalize_name(one.name)] for file in files)
        for one in required()
        if one.name not in ("lm-eval", "resvg-py")
    }


@pytest.mark.parametrize("count", [2, 3, 10])
def test_the_first_rows_are_all_where_there_are_fewer(count: int) -> None:
    """datasets 5.0 raises IndexError for them, unless they are streamed."""
    rows = datasets.Dataset.from_dict({"n": [0, 1, 2]})
    for one in (rows, rows.to_iterable_dataset()):
        assert [row["n"] for row in first_rows(one, count)] == [0, 1, 2][:count]


PLAN = BranchPlan(
    iteration=1, branch=1, slice=1, data="", rows=(0, 4), target_tokens=64, replay_tokens=0, tokens=64, sequences=4,
    steps=2, seed=5, key="",
)  # fmt: skip


@pytest.mark.parametrize("front", ["recipe", "script"])
def test_an_adapter_begins_with_its_seed_whatever_was_drawn_before(
    front: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL 1.10 draws it before it seeds; here a trainer that never seeds stands in its place."""
    monkeypatch.setattr(trl, "SFTTrainer", lambda *args, **others: torch.rand(8))
    if front == "recipe":
        make = SftBranch(
            Loading(16), None, datasets.Dataset.from_dict({"input_ids": [[1]]}), {"r": 2}, {}, PLAN.steps, PLAN.seed, 16
        )
    else:
        arguments = trl.SFTConfig(str(tmp_path), use_cpu=True, report_to="none")
        parts = TrainerParts(trl.SFTTrainer, arguments, None, None)
        make = TrainerBranch(parts, None, PLAN, 1, tmp_path)
    before = torch.get_rng_state()
    drawn = [make(None, tmp_path / "out", []), make(None, tmp_path / "out", [])]
    assert torch.equal(*drawn)
    torch.manual_seed(PLAN.seed)
    assert torch.equal(torch.rand(8), drawn[0])
    torch.set_rng_state(before)
