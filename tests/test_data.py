"""From files to packed rows: nothing lost, shares exact, the same again after an interruption."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN, write_jsonl

from bam_lora.data import Layout, TrainingSource, prepare
from bam_lora.errors import UserError
from bam_lora.packing import load_rows
from bam_lora.sources import TextSource


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


def target(path: Path | str, **options: Any) -> TrainingSource:
    where = {name: options.pop(name) for name in ("split", "text") if name in options}
    return TrainingSource(TextSource(str(path), **where), "target", **options)


def make(folder: Path, sources: list[TrainingSource], tokenizer: Any, **options: Any) -> dict[str, Any]:
    layout = {"slices": 2, "sequence_length": 64, "slicing": "random", "replay_share": 0.0, "seed": 0, **options}
    return prepare(sources, Layout(**layout), tokenizer, folder, key="key", say=lambda text: None)


def documents_of(folder: Path, facts: dict[str, Any], tokenizer: Any) -> list[str]:
    """The texts in the rows of all slices, by cutting rows at their sequence lengths."""
    last = facts["slices"][-1]["rows"][1]
    texts = []
    for row in load_rows(folder, (0, last)):
        start = 0
        for length in row["seq_lengths"]:
            texts.append(tokenizer.decode(row["input_ids"][start : start + length], skip_special_tokens=True))
            start += length
        assert start == len(row["input_ids"]) <= 64
    return texts


def test_no_token_is_lost_and_documents_end_with_eos(german_file: Path, tmp_path: Path, tokenizer: Any) -> None:
    facts = make(tmp_path / "01", [target(german_file)], tokenizer)
    expected = sorted(token for text in GERMAN for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    rows = load_rows(tmp_path / "01", (0, facts["slices"][-1]["rows"][1]))
    assert sorted(token for row in rows["input_ids"] for token in row) == expected
    assert sum(part["target_tokens"] for part in facts["slices"]) == len(expected)
    assert facts["slices"][0]["rows"][1] == facts["slices"][1]["rows"][0]


def test_replay_has_its_exact_share_in_every_slice(
    german_file: Path, english_file: Path, tmp_path: Path, tokenizer: Any
) -> None:
    sources = [target(german_file), TrainingSource(TextSource(str(english_file)), "replay")]
    facts = make(tmp_path / "01", sources, tokenizer, replay_share=0.2, slices=3)
    for part in facts["slices"]:
        assert part["replay_tokens"] == round(part["target_tokens"] / 4)
    words = {word for text in documents_of(tmp_path / "01", facts, tokenizer) for word in text.split()}
    assert {"Schlüssel", "golden"} <= words


def test_too_little_replay_is_an_error(german_file: Path, tmp_path: Path, tokenizer: Any) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", ENGLISH[:2])
    sources = [target(german_file), TrainingSource(TextSource(str(few)), "replay")]
    with pytest.raises(UserError, match=r"data\.replay: expected [\d,]+ tokens \(replay_share 0\.5 .*found \d+\. Add"):
        make(tmp_path / "01", sources, tokenizer, replay_share=0.5)


def test_token_limit_cuts_at_the_limit_and_says_where_to_go_on(
    german_file: Path, tmp_path: Path, tokenizer: Any
) -> None:
    facts = make(tmp_path / "01", [target(german_file, tokens=500)], tokenizer, slicing="contiguous")
    assert sum(part["target_tokens"] for part in facts["slices"]) == 500
    texts = "".join(documents_of(tmp_path / "01", facts, tokenizer))
    used = facts["sources"][0]["next_row"]
    rest = make(tmp_path / "02", [target(german_file, skip_rows=used)], tokenizer, slicing="contiguous")
    assert rest["sources"][0]["next_row"] == len(GERMAN)
    assert rest["sources"][0]["documents"] == len(GERMAN) - used
    assert texts.count("Am ") == used


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0)])
def test_weights_set_the_proportion(
    weights: tuple[float, float], german_file: Path, english_file: Path, tmp_path: Path, tokenizer: Any
) -> None:
    sources = [target(german_file, weight=weights[0]), target(english_file, weight=weights[1])]
    facts = make(tmp_path / "01", sources, tokenizer)
    used = [source["used_tokens"] for source in facts["sources"]]
    assert used[0] / used[1] == pytest.approx(weights[0] / weights[1], rel=0.01)


def test_seed_decides_and_a_second_call_takes_what_is_there(german_file: Path, tmp_path: Path, tokenizer: Any) -> None:
    rows = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        facts = make(tmp_path / name, [target(german_file)], tokenizer, seed=seed)
        rows[name] = load_rows(tmp_path / name, (0, facts["slices"][-1]["rows"][1]))["input_ids"][:]
    assert rows["a"] == rows["b"] != rows["c"]
    before = (tmp_path / "a" / "rows.arrow").stat().st_mtime_ns
    make(tmp_path / "a", [target(german_file)], tokenizer)
    assert (tmp_path / "a" / "rows.arrow").stat().st_mtime_ns == before


def test_a_tokenised_source_survives_an_interruption(
    german_file: Path, english_file: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bam_lora.data as data

    copy = write_jsonl(tmp_path / "german.jsonl", GERMAN)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_rows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "01", [target(copy)], tokenizer)
    assert not (tmp_path / "01").exists()
    copy.unlink()  # what was tokenised is not read again
    assert make(tmp_path / "01", [target(copy)], tokenizer)["sources"][0]["documents"] == len(GERMAN)


def test_kinds_of_files(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"body": GERMAN})
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "b.json").write_text(json.dumps([{"body": text} for text in GERMAN]))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in GERMAN)
    folder = tmp_path / "texts"
    folder.mkdir()
    for index, text in enumerate(GERMAN):
        (folder / f"{index:02}.txt").write_text(text)
    counts = set()
    for index, path in enumerate(("a.parquet", "saved", "b.json", "c.jsonl.gz", "texts", "texts/*.txt")):
        column = "text" if "texts" in path else "body"
        facts = make(tmp_path / f"out{index}", [target(tmp_path / path, text=column)], tokenizer)
        counts.add((facts["sources"][0]["documents"], facts["sources"][0]["tokens"]))
    assert len(counts) == 1
    half = make(tmp_path / "half", [target(tmp_path / "a.parquet", text="body", split="train[:50%]")], tokenizer)
    assert half["sources"][0]["documents"] == len(GERMAN) // 2


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, {}, r"nothing\.jsonl: expected a file, folder or glob.*no such file"),
        ('{"body": "x"}\n', {}, r"expected a column 'text', found columns body.*`text:`"),
        ('{"text": 3}\n', {}, r"row 1, column 'text': expected text, found int"),
        ('{"text": ""}\n{"text": null}\n', {}, r"expected text, found no rows with text"),
        ("", {}, r"expected text, found no rows with text"),
        ('{"text": "a"}\n{"text": ', {}, r"expected readable data, found .*(JSON|Expected object)"),
        ('{"text": "a"}\n', {"split": "validation"}, r"expected readable data, found .*validation"),
    ],
)
def test_bad_sources_are_one_clear_line(
    content: str | None, options: dict[str, Any], words: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "nothing.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        make(tmp_path / "01", [target(path, **options)], tokenizer)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "01").exists()


def test_names_that_look_like_patterns(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "a folder [1] ü"
    folder.mkdir()
    facts = make(tmp_path / "01", [target(write_jsonl(folder / "dë [2].jsonl", GERMAN))], tokenizer)
    assert facts["sources"][0]["documents"] == len(GERMAN)


def test_tokenizer_without_eos(german_file: Path, tmp_path: Path, tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tiny_base)
    bare.eos_token = None
    with pytest.raises(UserError, match="expected an end-of-sequence token, found none"):
        make(tmp_path / "01", [target(german_file)], bare)
