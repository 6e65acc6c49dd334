"""Sources that are cut at a token budget: read as far as is needed, once, in order or shuffled."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from conftest import GERMAN, write_jsonl

from bam_lora.data import Layout, TrainingSource, prepare
from bam_lora.errors import UserError
from bam_lora.hub_data import HubData
from bam_lora.planning import _training_sources
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.sources import Shuffle, TextSource, open_source, read_texts

BUFFER = Shuffle(buffer=16, seed=7)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of 200 numbered rows each."""
    folder = tmp_path_factory.mktemp("stream")
    for index, name in enumerate("ab"):
        write_jsonl(folder / f"{name}.jsonl", [f"row {200 * index + row} of text" for row in range(200)])
    return folder


def read(files: Path, folder: Path, count: int, skip: int = 0, shuffle: Shuffle | None = BUFFER) -> list[str]:
    source = TextSource(str(files))
    opened = open_source(source, streaming=True, cache=folder, shuffle=shuffle)
    return [text for _, text in itertools.islice(read_texts(source, opened, skip_rows=skip), count)]


def test_a_shuffled_stream_is_the_same_again_and_goes_on_where_it_stopped(files: Path, tmp_path: Path) -> None:
    first, rest = read(files, tmp_path, 60), read(files, tmp_path, 400, skip=60)
    assert read(files, tmp_path, 60) == first != read(files, tmp_path, 60, shuffle=Shuffle(16, 8))
    assert len(rest) == 340
    assert sorted([*first, *rest]) == sorted(read(files, tmp_path, 400, shuffle=None))
    assert first != read(files, tmp_path, 60, shuffle=None)


def test_only_as_much_is_read_as_the_budget_needs_and_only_once(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from transformers import AutoTokenizer

    import bam_lora.data as data
    import bam_lora.sources as sources

    read_rows: list[int] = []

    def rows() -> Any:
        for number in range(100_000):
            read_rows.append(number)
            yield {"text": f"{number} {GERMAN[number % len(GERMAN)]}"}

    monkeypatch.setattr(sources, "hub_data", lambda wanted, commit, streaming: HubData(wanted, None))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, name, **options: datasets.IterableDataset.from_generator(rows)
    )
    monkeypatch.setattr(data, "_BATCH_CHARACTERS", 2_000)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    source = TrainingSource(TextSource("org/large"), "target", tokens=2_000, shuffle=Shuffle(64, 0))
    layout = Layout(2, 64, "random", 0.0, 0)

    def make() -> dict[str, Any]:
        return prepare([source], layout, tokenizer, tmp_path / "01", key="key", say=lambda text: None)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_rows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make()
    consumed = len(read_rows)
    assert 64 < consumed < 300  # the buffer, and what 2,000 tokens need
    facts = make()
    assert len(read_rows) == consumed  # a resumed run reads nothing again
    assert sum(part["target_tokens"] for part in facts["slices"]) == 2_000
    assert facts["sources"][0]["shuffle_buffer"] == 64


def test_a_saved_data_set_is_shuffled_whole_and_left_as_it_is(tmp_path: Path) -> None:
    import datasets

    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": [f"row {row}" for row in range(100)]}).save_to_disk(saved)
    before = sorted(path.name for path in saved.iterdir())
    source = TextSource(str(saved))
    opened = open_source(source, streaming=True, cache=tmp_path / "cache", shuffle=BUFFER)
    texts = [text for _, text in read_texts(source, opened)]
    assert texts != sorted(texts, key=lambda text: int(text.split()[1]))
    assert len(set(texts)) == 100
    assert sorted(path.name for path in saved.iterdir()) == before


def recipe(**source: Any) -> Recipe:
    return recipe_from_dict({"base": "org/m", "output": "out", "data": {"target": [{"path": "org/web", **source}]}})


def test_an_extension_reads_on_in_the_same_order_at_the_same_commit() -> None:
    where = {"path": "org/web", "name": None, "split": "train", "revision": None, "text": "text"}
    facts = {**where, "role": "target", "used_tokens": 500, "next_row": 40, "commit": "abc", "shuffle_buffer": 16}
    [source] = _training_sources(recipe(tokens=900, shuffle_buffer=16), [{"sources": [facts]}])
    assert (source.tokens, source.skip_rows, source.commit) == (400, 40, "abc")
    [first] = _training_sources(recipe(tokens=500, shuffle_buffer=16), [])
    assert source.shuffle == first.shuffle
    assert first.shuffle is not None
    with pytest.raises(UserError, match="shuffle_buffer of org/web: expected 16, as the run has read it before, found"):
        _training_sources(recipe(tokens=900), [{"sources": [facts]}])


def test_a_commit_that_was_read_before_is_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    monkeypatch.setattr("bam_lora.hub_data.commit_of", lambda wanted: "newest")
    monkeypatch.setattr("bam_lora.hub_data.probe", lambda at, file: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: asked.append(options["revision"]) or [])
    for commit in (None, "abc"):
        opened = open_source(TextSource("org/web"), streaming=True, cache=tmp_path, commit=commit)
        assert opened.facts == {"commit": asked[-1]}
    assert asked == ["newest", "abc"]
