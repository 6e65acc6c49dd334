"""YAML whose comments survive being merged."""

from __future__ import annotations

from pathlib import Path

import pytest

from bam_lora.commented_yaml import comment_lines, look_up, merge_trees, put, read_commented, write_tree
from bam_lora.errors import UserError
from bam_lora.recipe_yaml import read_yaml

ROOT = Path(__file__).resolve().parents[1]


def test_comments_of_fragments_are_kept_and_values_are_not_changed(tmp_path: Path):
    files = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(files) > 20
    for file in files:
        written = "\n".join(write_tree(read_commented(file).tree))
        assert read_yaml(written, None).value == read_yaml(file.read_text(encoding="utf-8"), file).value, file
    (tmp_path / "a.yaml").write_text(
        "# Title: about\n#\n# Notes.\na: {b: 1, c: [1, 2]} # why\n"
        "# above d\nd:\n  e: # list\n    # first\n    - 1\n\n# f\nf: x\n"
    )
    read = read_commented(tmp_path / "a.yaml")
    assert (read.title, read.notes) == ("Title: about", "Notes.")
    put(read.tree, "a.b", "2")
    put(read.tree, "d.g", "3", "set")
    merge_trees(read.tree, read_commented(tmp_path / "a.yaml").tree)
    assert "\n".join(write_tree(read.tree)) == (
        "a: {b: 1, c: [1, 2]} # why\n# above d\nd:\n  e: # list\n    # first\n    - 1\n  g: 3 # set\n# f\nf: x"
    ).replace("    # first\n", "")
    assert look_up(read.tree, "a.b") == "1"
    assert look_up(read.tree, "a.x") is None
    (tmp_path / "b.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"b\.yaml: expected YAML"):
        read_commented(tmp_path / "b.yaml")


def test_comments_are_wrapped():
    assert all(len(line) <= 40 for line in comment_lines("word " * 50, 40))
