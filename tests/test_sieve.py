"""Screening through `prepare` and through a run: every row read is kept or counted under one reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN, write_jsonl
from test_loop import recipe

from bam_lora.contamination import HeldOutSet, HeldOutText
from bam_lora.data import Layout, TrainingSource, prepare
from bam_lora.duplicates import Fingerprints, load
from bam_lora.errors import UserError
from bam_lora.loop import run
from bam_lora.sieve import FINGERPRINTS, Screening
from bam_lora.sources import TextSource
from bam_lora.store import read_record
from bam_lora.text_filters import FilterRules

HELD_OUT = GERMAN[40]
OTHER = ENGLISH[40]


def long_text(seed: int) -> str:
    return " ".join(f"wort{(seed * 7919 + index * 104729) % 5000}" for index in range(200))


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture
def sources(tmp_path: Path) -> list[TrainingSource]:
    """Two target files and one of replay, with a known number of rows for every reason."""
    first = [*GERMAN[:10], "", GERMAN[2], "kurz", f"Vorab. {HELD_OUT} Danach.", "12345678901234567890 Zahlen", " "]
    second = [GERMAN[3].replace(" ", "  "), *GERMAN[10:20], long_text(1), long_text(1) + " ende", HELD_OUT, ""]
    replay = [GERMAN[15], *ENGLISH[:30], ENGLISH[3], "short", OTHER, long_text(1).upper()]
    rules = FilterRules(min_characters=10, max_digits=0.5)
    made = []
    for name, role, texts in (("a", "target", first), ("b", "target", second), ("c", "replay", replay)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        made.append(TrainingSource(TextSource(str(path)), role, filters=rules))
    return made


def screening(deduplicate: str = "near", contamination: str = "drop", *earlier: Fingerprints) -> Screening:
    sets = [HeldOutSet("german", "target", (GERMAN[60], HELD_OUT)), HeldOutSet("english", "source", (OTHER,))]
    return Screening(deduplicate, contamination, HeldOutText(sets), earlier)


def make(folder: Path, sources: list[TrainingSource], tokenizer: Any, chosen: Screening | None) -> dict[str, Any]:
    layout = Layout(slices=2, sequence_length=64, slicing="random", replay_share=0.1, seed=0)
    return prepare(
        sources, layout, tokenizer, folder, key="key", say=lambda text: None,
        screening=None if chosen is None else lambda: chosen,
    )  # fmt: skip


def test_every_row_is_kept_or_counted_once(sources: list[TrainingSource], tmp_path: Path, tokenizer: Any) -> None:
    facts = make(tmp_path / "01", sources, tokenizer, screening())
    first, second, replay = facts["sources"]
    assert first["dropped"] == {"contaminated": 1, "duplicate": 1, "empty": 2, "max_digits": 1, "min_characters": 1}
    assert second["dropped"] == {"contaminated": 1, "duplicate": 1, "empty": 1, "near_duplicate": 1}
    assert replay["dropped"] == {
        "contaminated": 1, "duplicate": 2, "min_characters": 1, "near_duplicate": 1,
    }  # fmt: skip
    assert [source["rows"] for source in facts["sources"]] == [16, 15, 35]
    for source in facts["sources"]:
        assert source["rows"] == source["documents"] + sum(source["dropped"].values())
    assert [source["documents"] for source in facts["sources"]] == [10, 11, 30]
    assert [source["next_row"] for source in facts["sources"][:2]] == [16, 15]
    assert [(part["set"], part["documents"], part["found"]) for part in facts["contamination"]] == [
        ("german", 2, 1), ("english", 1, 1),
    ]  # fmt: skip
    example = first["example"]
    assert (example["row"], example["set"], example["document"]) == (13, "german", 1)
    assert example["excerpt"].startswith("Vorab.")


def test_without_screening_nothing_is_dropped_but_empty_rows(
    sources: list[TrainingSource], tmp_path: Path, tokenizer: Any
) -> None:
    plain = [TrainingSource(source.where, source.role) for source in sources]
    facts = make(tmp_path / "01", plain, tokenizer, None)
    assert [source["dropped"] for source in facts["sources"]] == [{"empty": 2}, {"empty": 1}, {}]
    assert facts["contamination"] == []
    assert not (tmp_path / "01" / FINGERPRINTS).exists()


def test_warning_counts_and_keeps(sources: list[TrainingSource], tmp_path: Path, tokenizer: Any) -> None:
    facts = make(tmp_path / "01", sources, tokenizer, screening("none", "warn"))
    assert [source["contaminated"] for source in facts["sources"]] == [1, 1, 1]
    assert all("contaminated" not in source["dropped"] for source in facts["sources"])
    assert facts["contamination"][0]["found"] == 1


def test_error_names_file_row_and_set(sources: list[TrainingSource], tmp_path: Path, tokenizer: Any) -> None:
    words = r"a\.jsonl: expected no text of the evaluation .*found such text in 1 of its documents: row 14 holds "
    words += r"document 2 of evaluation set 'german'.*“Vorab\..*data\.contamination: drop"
    with pytest.raises(UserError, match=words):
        make(tmp_path / "01", sources, tokenizer, screening("none", "error"))
    assert not (tmp_path / "01").exists()


def test_filters_that_drop_all_say_so(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GERMAN[:5])
    source = TrainingSource(TextSource(str(path)), "target", filters=FilterRules(pattern="Bulgarien"))
    with pytest.raises(
        UserError, match=r"expected text, found 5 of 5 rows dropped \(pattern 5\)\. Check.*data\.filters"
    ):
        make(tmp_path / "01", [source], tokenizer, None)


def test_an_interrupted_preparation_comes_out_the_same(
    sources: list[TrainingSource], tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bam_lora.data as data

    whole = make(tmp_path / "whole", sources, tokenizer, screening())
    tokenised = data._tokenise_into

    def dying(source: TrainingSource, *others: Any) -> dict[str, Any]:
        if source.role == "replay":
            raise KeyboardInterrupt
        return tokenised(source, *others)

    with monkeypatch.context() as patch:
        patch.setattr(data, "_tokenise_into", dying)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "01", sources, tokenizer, screening())
    again = make(tmp_path / "01", sources, tokenizer, screening())
    for name in ("sources", "slices", "contamination"):
        assert again[name] == whole[name]
    assert load(tmp_path / "01" / FINGERPRINTS).exact.tolist() == load(tmp_path / "whole" / FINGERPRINTS).exact.tolist()


def test_an_extension_knows_what_was_trained_on(sources: list[TrainingSource], tmp_path: Path, tokenizer: Any) -> None:
    limited = [TrainingSource(sources[0].where, "target", tokens=250), sources[2]]
    before = make(tmp_path / "01", limited, tokenizer, screening("exact"))
    used, row = (before["sources"][0][name] for name in ("used_documents", "next_row"))
    assert 0 < used < 10
    kept = load(tmp_path / "01" / FINGERPRINTS)
    assert len(kept.exact) == used
    # The rest of the same file, read again from where it was left, holds no copy of itself; the new file holds one.
    new = write_jsonl(tmp_path / "d.jsonl", [GERMAN[0], GERMAN[30], GERMAN[31]])
    rest = TrainingSource(sources[0].where, "target", skip_rows=row)
    extended = [rest, TrainingSource(TextSource(str(new)), "target"), sources[2]]
    after = make(tmp_path / "02", extended, tokenizer, screening("exact", "drop", kept))
    first, second, _ = after["sources"]
    assert first["rows"] == 16 - row == first["documents"] + sum(first["dropped"].values())
    assert first["dropped"]["duplicate"] == 1
    assert (second["documents"], second["dropped"]) == (2, {"duplicate": 1})
    assert before["sources"][0]["rows"] >= row


def test_a_run_counts_and_its_extension_goes_on(tiny_base: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    write_jsonl(files / "german.jsonl", [*GERMAN[:20], GERMAN[4], GERMAN[71]])
    write_jsonl(files / "english.jsonl", [*ENGLISH[:24], ENGLISH[0]])
    write_jsonl(files / "german.test.jsonl", GERMAN[-3:])
    write_jsonl(files / "english.test.jsonl", ENGLISH[-3:])
    data = {"deduplicate": "near", "contamination": "drop", "filters": {"min_words": 3}}
    small = {"bam": {"slices": 1, "branches": 1}, "evaluation": {"samples": [], "branches": False}}
    root = tmp_path / "run"
    run(recipe(tiny_base, files, data=data, **small), root)
    plan = read_record(root / "plan.json")
    assert plan is not None
    german, english = plan["data"]["sources"]
    assert german["dropped"] == {"contaminated": 1, "duplicate": 1}
    assert german["rows"] == 22 == german["documents"] + 2
    assert english["rows"] == 25
    assert plan["data"]["contamination"][0]["found"] == 1
    more = write_jsonl(files / "more.jsonl", [GERMAN[5], *GERMAN[20:30]])
    target = [{"path": str(files / "german.jsonl")}, {"path": str(more)}]
    longer = recipe(tiny_base, files, data={**data, "target": target}, **{**small, "bam": {"slices": 2, "branches": 1}})
    whole = tmp_path / "lost"
    shutil.copytree(root, whole)
    report = run(longer, root, extend=True)
    second = [source for source in report["data"]["sources"] if source["path"] == str(more)]
    assert [source["dropped"] for source in second] == [{"duplicate": 1}]
    assert [source["rows"] for source in second] == [11]
    shutil.rmtree(whole / "data" / "01")
    with pytest.raises(UserError, match=r"expected the fingerprints of what the run was trained on.*start a new run"):
        run(longer, whole, extend=True)
