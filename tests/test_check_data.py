"""What `bam-lora check` says of the texts, on a sample of every source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN, write_jsonl
from test_loop import recipe

from bam_lora.check import check_recipe
from bam_lora.errors import UserError


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "german.jsonl", [*GERMAN[:20], GERMAN[4], GERMAN[71], "kurz"])
    write_jsonl(tmp_path / "english.jsonl", [*ENGLISH[:24], ENGLISH[0]])
    write_jsonl(tmp_path / "german.test.jsonl", GERMAN[-3:])
    write_jsonl(tmp_path / "english.test.jsonl", ENGLISH[-3:])
    return tmp_path


def check(tiny_base: Path, files: Path, **data: Any) -> str:
    return check_recipe(recipe(tiny_base, files, data=data))


def test_copies_contamination_and_the_tokenizer_are_said(tiny_base: Path, files: Path) -> None:
    text = check(tiny_base, files)
    assert f"note        1 of the first 23 documents of {files / 'german.jsonl'} are copies of earlier ones" in text
    assert f"note        1 of the first 25 documents of {files / 'english.jsonl'} are copies" in text
    assert "screening   1 of 3 documents of evaluation set 'german' were found in the training sources" in text
    assert "1 with such text, trained on; data.contamination: drop leaves them out; row 22 holds document 3" in text
    assert "tokenizer   target: " in text
    assert "new tokens for it are worth having" in text


def test_what_the_recipe_drops_is_counted(tiny_base: Path, files: Path) -> None:
    text = check(tiny_base, files, deduplicate="exact", contamination="drop", filters={"min_words": 3})
    rows = "3 of 23 rows dropped (min_words 1, contaminated 1, duplicate 1)"
    assert f"screening   {files / 'german.jsonl'}, from its beginning: {rows}" in text
    assert "are copies" not in text
    assert "1 with such text, left out; row 22" in text


def test_filters_of_one_source_replace_those_of_all(tiny_base: Path, files: Path) -> None:
    source = {"path": str(files / "german.jsonl"), "filters": {"exclude_pattern": "Schmied"}}
    text = check(tiny_base, files, target=[source], filters={"max_words": 5})
    rows = "2 of 23 rows dropped (exclude_pattern 2)"
    assert f"{files / 'german.jsonl'}, from its beginning: {rows}" in text
    assert f"{files / 'english.jsonl'}, from its beginning: 25 of 25 rows dropped (max_words 25)" in text


def test_evaluation_text_can_be_an_error(tiny_base: Path, files: Path) -> None:
    with pytest.raises(UserError, match=r"german\.jsonl: expected no text of the evaluation or selection sets"):
        check(tiny_base, files, contamination="error")


def test_without_evaluation_sets_the_tokenizer_is_judged_by_the_data(tiny_base: Path, files: Path) -> None:
    chosen = recipe(tiny_base, files, evaluation={"target": [], "source": []})
    assert "tokenizer   source: " in check_recipe(chosen)
