"""`where`: rows chosen by their columns, from files and the Hub, before any limit, and what is said of mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN
from hub_fixtures import PatchedHub

from bam_lora.check_data import data_lines
from bam_lora.check_rows import source_lines
from bam_lora.data import Layout, TrainingSource, prepare
from bam_lora.errors import UserError
from bam_lora.language_samples import compare_languages
from bam_lora.planning import _is, _training_sources
from bam_lora.recipe import Recipe, dump_recipe, recipe_from_dict
from bam_lora.row_filter import RowFilter, Where
from bam_lora.rundir import recipe_key
from bam_lora.scoring import SetSource, prepare_evaluation, read_set
from bam_lora.sources import TextSource, open_source, read_rows, read_texts, text_source

CODES = ["de", "en", "xx"]
ROWS = [
    {"text": text, "language": CODES[number % 3], "stars": number % 4, "checked": number % 2 == 0}
    for number, pair in enumerate(zip(GERMAN[:30], ENGLISH[:30], strict=True))
    for text in [pair[number % 3 == 1]]
]
GERMAN_ROWS = [row["text"] for row in ROWS if row["language"] == "de"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def source(path: Path | str, **where: Any) -> TextSource:
    listed = {column: wanted if isinstance(wanted, list) else [wanted] for column, wanted in where.items()}
    return TextSource(str(path), where=Where.of(listed))


def texts(wanted: TextSource, cache: Path, *, streaming: bool = True) -> list[str]:
    return [text for _, text in read_texts(wanted, open_source(wanted, streaming=streaming, cache=cache))]


def recipe(path: Path | str, more: dict[str, Any] | None = None, **chosen: Any) -> Recipe:
    data = {"target": [{"path": str(path), **chosen}], "sequence_length": 64}
    return recipe_from_dict({"base": "org/base", "output": "unused", "data": data, **(more or {})})


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ({"language": "de"}, lambda row: row["language"] == "de"),
        ({"language": ["de", "en"]}, lambda row: row["language"] != "xx"),
        ({"stars": [1, 2.0]}, lambda row: row["stars"] in (1, 2)),
        ({"checked": True, "language": "en"}, lambda row: row["checked"] and row["language"] == "en"),
    ],
)
def test_rows_are_chosen_by_value(file: Path, tmp_path: Path, where: Any, chosen: Any, streaming: bool) -> None:
    expected = [row["text"] for row in ROWS if chosen(row)]
    assert texts(source(file, **where), tmp_path, streaming=streaming) == expected


def test_true_is_not_one() -> None:
    row_filter = RowFilter("x", Where((("stars", (1,)),)))
    assert [row_filter.takes({"stars": value}) for value in (1, True, 1.0, "1", None, [1])] == [
        True, False, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_data_set_of_the_hub(hub: PatchedHub, tmp_path: Path, format: str) -> None:
    hub.add_dataset("org/mixed", {"default": {"train": ROWS}}, format=format)
    assert texts(source("org/mixed", language="de"), tmp_path) == GERMAN_ROWS
    with pytest.raises(UserError, match=r"org/mixed: expected a column 'lang', .* it looks like 'language'"):
        texts(source("org/mixed", lang="de"), tmp_path)
    held = SetSource("german", "target", source("org/mixed", language="de"), 3)
    assert read_set(held).documents == tuple(GERMAN_ROWS[:3])


def test_rows_keep_their_numbers(file: Path, tmp_path: Path) -> None:
    wanted = source(file, language="de")
    opened = open_source(wanted, streaming=True, cache=tmp_path)
    found = [(number, row["text"]) for number, row in read_rows(wanted, opened, skip_rows=4)]
    assert found == [(number, ROWS[number]["text"]) for number in range(6, 30, 3)]
    assert opened.left_out == 26 - len(found)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"langauge": "de"}, r"a column 'langauge', as its `where` says, found columns checked, .* like 'language'"),
        ({"language": "fr"}, r"rows where language is 'fr', found none in 30 rows; they have 'de', 'en', 'xx'"),
        ({"language": ["de", "fr"]}, r"expected rows where language is 'fr', found none in 30 rows; they have 'de'"),
        ({"stars": "1"}, r"where stars is '1', found none .* it is no text: write it without quotes"),
        ({"language": "DE", "stars": 1}, r"where language is 'DE', found none"),
        ({"checked": True, "stars": 1}, r"where checked is true and stars is 1, found none of the 30 rows"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_one_line(file: Path, tmp_path: Path, where: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        texts(source(file, **where), tmp_path)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_text_that_looks_like_a_number_is_said_to_be_text() -> None:
    row_filter = RowFilter("x", Where((("year", (2024,)),)))
    row_filter.takes({"year": "2024"})
    with pytest.raises(UserError, match="there it is text: write it in quotes"):
        row_filter.require_found(all_values=True)


@pytest.mark.parametrize("wrong", [{}, [], "de", {"language": []}, {"language": None}, {"language": [["de"]]}, {"": 1}])
def test_a_recipe_takes_columns_with_values(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"data\.target\.0\.where: expected a mapping from columns to a value"):
        recipe("a.jsonl", where=wrong)


def test_a_recipe_holds_lists_and_reads_them_back(tmp_path: Path) -> None:
    made = recipe("org/a", where={"language": "no", "stars": [4, 5], "checked": True})
    assert made.data.target[0].where == {"language": ["no"], "stars": [4, 5], "checked": [True]}
    from bam_lora.recipe import load_recipe

    (tmp_path / "again.yaml").write_text(dump_recipe(made), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == made


def test_the_keys_of_what_has_no_where_are_those_of_before(tmp_path: Path, tiny_base: Path, file: Path) -> None:
    values = {
        "base": "org/x", "output": "o",
        "data": {"target": [{"path": "org/a", "tokens": "1M"}], "replay": [{"path": "org/b"}], "replay_share": 0.2},
        "evaluation": {"target": [{"path": "org/c"}]}, "selection": {"source": [{"path": "org/d"}]},
    }  # fmt: skip
    before = "acb5ddcd84df619fef4daa3fcf53859602c0a0dc1543a8608292059bea70cd4e"  # without `where` among the values
    assert recipe_key(recipe_from_dict(values)) == before
    values["data"]["target"][0]["where"] = {"language": "de"}  # type: ignore[index]
    assert recipe_key(recipe_from_dict(values)) != before
    assert TextSource("a").described() == {
        "path": "a", "name": None, "split": "train", "revision": None, "text": "text", "mode": "text",
    }  # fmt: skip


def prepared(wanted: TextSource, folder: Path, tokenizer: Any, said: list[str], tokens: int | None) -> dict[str, Any]:
    layout = Layout(2, 64, "random", 0.0, 0)
    return prepare(
        [TrainingSource(wanted, "target", tokens)], layout, tokenizer, folder / "data", key="key", say=said.append
    )


def test_what_is_left_out_counts_before_the_limit(file: Path, tmp_path: Path, story_tokenizer: Any) -> None:
    sizes = [len(story_tokenizer(text)["input_ids"]) + 1 for text in GERMAN_ROWS]
    said: list[str] = []
    [facts] = prepared(source(file, language="de"), tmp_path, story_tokenizer, said, sum(sizes[:8]))["sources"]
    assert facts["used_documents"] == 8
    assert facts["where"] == {"language": ["de"]}
    assert facts["rows"] == facts["documents"] + sum(facts["dropped"].values())
    assert facts["dropped"]["where"] == facts["rows"] - facts["documents"]
    assert facts["next_row"] == 22  # after the eighth of rows 0, 3, 6, ...
    [whole] = prepared(source(file, language="de"), tmp_path / "b", story_tokenizer, said, None)["sources"]
    assert (whole["rows"], whole["documents"], whole["dropped"]["where"], whole["next_row"]) == (30, 10, 20, 30)
    assert any("20 of 30 rows dropped (where 20)" in line for line in said)


def test_a_value_that_was_not_seen_up_to_the_limit_is_said(
    file: Path, tmp_path: Path, story_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bam_lora.data._BATCH_CHARACTERS", 100)  # so that it does not come to the file's end
    said: list[str] = []
    prepared(source(file, language=["de", "fr"]), tmp_path, story_tokenizer, said, 60)
    [line] = [line for line in said if "no row" in line]
    assert re.search(r"no row of the \d+ read has 'fr' in column 'language'; they have 'de'", line)


def test_an_interrupted_preparation_knows_its_rows(
    file: Path, tmp_path: Path, story_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of other rows, left by a start with another `where`, are not taken."""
    import bam_lora.data as data

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_rows", interrupt)
        for wanted in (source(file, language="en"), source(file)):
            with pytest.raises(KeyboardInterrupt):
                prepared(wanted, tmp_path, story_tokenizer, [], None)
    said: list[str] = []
    [facts] = prepared(source(file, language="de"), tmp_path, story_tokenizer, said, None)["sources"]
    assert facts["documents"] == len(GERMAN_ROWS)
    assert any("tokenising" in line for line in said)


def test_an_extension_reads_on_in_the_same_rows_only() -> None:
    before = {**TextSource("org/a", where=Where((("language", ("de",)),))).described(), "role": "target",
              "used_tokens": 500, "next_row": 40}  # fmt: skip
    parts = [{"sources": [before]}]
    [on] = _training_sources(recipe("org/a", tokens=900, where={"language": "de"}), parts)
    assert (on.tokens, on.skip_rows) == (400, 40)
    for other in ({"where": {"language": "en"}}, {}):
        [fresh] = _training_sources(recipe("org/a", tokens=900, **other), parts)
        assert (fresh.tokens, fresh.skip_rows) == (900, 0)
    plain = text_source(recipe("org/a").data.target[0])
    assert _is(plain.described(), plain)


def test_evaluation_sets_of_other_rows_are_other_sets(file: Path, tmp_path: Path, story_tokenizer: Any) -> None:
    def kept(wanted: TextSource) -> tuple[str, ...]:
        sets = prepare_evaluation(
            [SetSource("german", "target", wanted, 4)], story_tokenizer, tmp_path / "sets.json", window_bytes=200,
            overlap_bytes=None, context_tokens=None,
        ).sets  # fmt: skip
        return sets[0].documents

    assert kept(source(file, language="de")) == tuple(GERMAN_ROWS[:4])
    assert kept(source(file)) == tuple(row["text"] for row in ROWS[:4])
    assert kept(source(file, language="de")) == tuple(GERMAN_ROWS[:4])


def test_check_says_how_many_rows_pass(file: Path, story_tokenizer: Any) -> None:
    text = "\n".join(source_lines(recipe(file, where={"language": ["de", "fr"]}), story_tokenizer))
    assert "10 of the 30 rows looked at pass: language is 'de' or 'fr'" in text
    assert (
        f"note        {file}: no row of the 30 read has 'fr' in column 'language'; they have 'de', 'en', 'xx'" in text
    )
    assert "row 1, " in text
    with pytest.raises(UserError, match=r"where stars is 9, found none in 30 rows; they have 0, 1, 2, 3"):
        source_lines(recipe(file, where={"stars": 9}), story_tokenizer)
    scored = {"evaluation": {"target": [{"path": str(file), "where": {"language": "de"}, "documents": 5}]}}
    assert "learning" in "\n".join(source_lines(recipe(file, scored), story_tokenizer))


class Clock:
    """Seconds that pass as rows are read."""

    def __init__(self, seconds_per_look: float) -> None:
        self.now, self.step = 0.0, seconds_per_look

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


def lines_of(rows: int, chosen: int, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> list[str]:
    """What is said while so many rows are read, of which every `chosen`-th is one."""
    said: list[str] = []
    monkeypatch.setattr("bam_lora.row_filter.time", Clock(seconds))
    monkeypatch.setattr("bam_lora.row_filter._QUIET_ROWS", 1000)
    row_filter = RowFilter("big", Where((("n", (1,)),)), said.append)
    for number in range(rows):
        row_filter.takes({"n": int((number + 1) % chosen == 0)})
    return said


def test_a_stream_with_few_such_rows_is_told_of_and_ever_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    said = lines_of(9000, 500, monkeypatch)
    assert [line.split(" of them")[0] for line in said] == [
        f"  big: {rows:,} rows read, {rows // 500:,}" for rows in (1000, 2000, 4000, 8000)
    ]
    assert all("where n is 1; reading on" in line for line in said)
    assert lines_of(9000, 50, monkeypatch) == []  # enough of them: the progress of what is made of them tells
    slow = lines_of(200, 10_000, monkeypatch, seconds=1.0)  # a row a second
    assert [line.split(" rows")[0] for line in slow] == ["  big: 60", "  big: 120"]


def test_a_run_says_what_it_reads_through(
    file: Path, tmp_path: Path, story_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bam_lora.row_filter._QUIET_ROWS", 10)
    monkeypatch.setattr("bam_lora.row_filter._FEW", 0.5)
    said: list[str] = []
    prepared(source(file, language="de"), tmp_path, story_tokenizer, said, None)
    lines = [line for line in said if "reading on" in line]
    assert [line.split(": ")[1].split(" rows")[0] for line in lines] == ["10", "20"]
    told: list[str] = []
    read_set(SetSource("german", "target", source(file, language="de"), 20), say=told.append)
    assert told == lines


@pytest.mark.parametrize("limit", ["rows", "time"])
def test_check_looks_no_further_than_a_sample(
    file: Path, story_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Of rows that come late nothing is found, and that is said with what was; of an evaluation set only the first."""
    monkeypatch.setattr("bam_lora.sources._MOST_ROWS", 8 if limit == "rows" else 100_000)
    monkeypatch.setattr("bam_lora.sources._MOST_SECONDS", 60.0 if limit == "rows" else 8.0)
    monkeypatch.setattr("bam_lora.row_filter.time", Clock(0.0 if limit == "rows" else 1.0))
    late = recipe(file, where={"stars": 3, "language": "de", "checked": True})  # no row has all three
    words = r"where .*, found none of the first [89] rows \(no more are looked at here\) that has all of it at once"
    with pytest.raises(UserError, match=words):
        source_lines(late, story_tokenizer)
    wanted = {"path": str(file), "where": {"language": "de"}, "documents": 9, "set": "held"}
    scored = recipe(file, {"evaluation": {"target": [wanted]}}, where={"language": "en"})
    [line] = [line for line in data_lines(scored, story_tokenizer) if line.startswith("note        evaluation")]
    assert re.search(r"set held: of 9 documents [1-5] were found soon, where language is 'de'; a run reads on", line)


@pytest.mark.parametrize("limit", ["rows", "time"])
def test_a_run_judges_its_tokenizer_without_rows_that_come_late(
    file: Path, story_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """The run itself reads on to them; a column that is not there is an error all the same."""
    monkeypatch.setattr("bam_lora.sources._MOST_ROWS", 8 if limit == "rows" else 100_000)
    monkeypatch.setattr("bam_lora.sources._MOST_SECONDS", 60.0 if limit == "rows" else 8.0)
    monkeypatch.setattr("bam_lora.row_filter.time", Clock(0.0 if limit == "rows" else 1.0))
    late = {"path": str(file), "where": {"text": ROWS[20]["text"]}}

    def compared(replay: dict[str, Any]) -> dict[str, Any]:
        wanted = recipe(file)
        data = wanted.data.model_copy(update={"replay": recipe(**replay).data.target})
        return compare_languages(wanted.model_copy(update={"data": data}), story_tokenizer, [])

    assert compared(late)["source"] is None
    assert compared({"path": str(file), "where": {"language": "en"}})["source"] is not None
    with pytest.raises(UserError, match="expected a column 'langauge'"):
        compared({"path": str(file), "where": {"langauge": "de"}})


def test_conversations_are_chosen_too(tmp_path: Path, story_tokenizer: Any) -> None:
    import copy

    from bam_lora.default_template import settle_template

    tokenizer = copy.deepcopy(story_tokenizer)
    settle_template(tokenizer)
    rows = [
        {"inputs": f"Frage {number}?", "targets": f"Antwort {number}.", "language_code": ["deu", "fin"][number % 2]}
        for number in range(20)
    ]
    path = tmp_path / "aya.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    wanted = TextSource(str(path), mode="chat", where=Where((("language_code", ("fin",)),)))
    layout = Layout(2, 64, "random", 0.0, 0)
    [facts] = prepare(
        [TrainingSource(wanted, "target")], layout, tokenizer, tmp_path / "data", key="key", say=lambda _: None
    )["sources"]
    assert (facts["conversations"], facts["dropped"]["where"]) == (10, 10)
