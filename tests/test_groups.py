"""Which runs are one recipe at several seeds, and what they are called."""

from __future__ import annotations

import pytest

from bam_lora.report.groups import group_names, grouped


def test_groups_ignore_seed_output_and_keep() -> None:
    recipes = [
        {"seed": 0, "output": "a", "keep": {"bases": "last"}, "lora": {"r": 8}},
        {"seed": 0, "output": "b", "lora": {"r": 9}},
        {"seed": 1, "output": "c", "keep": {"bases": "all"}, "lora": {"r": 8}},
    ]
    assert grouped(recipes) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("members", "names"),
    [
        ([["bam"], ["single"]], ["bam", "single"]),
        ([["0/bam", "1/bam"], ["0/single", "1/single"]], ["bam", "single"]),
        ([["bam-s0", "bam-s1"], ["single"]], ["bam-s", "single"]),
        ([["bam-0", "bam-1"], ["bam"]], ["bam-0 and 1 more", "bam"]),
        ([["x", "y", "z"], ["single"]], ["x and 2 more", "single"]),
    ],
)
def test_names_of_groups(members: list[list[str]], names: list[str]) -> None:
    assert group_names(members) == names
