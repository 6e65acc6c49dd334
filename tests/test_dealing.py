"""Whatever the slicing: no token lost, none in two slices, replay at its exact share in every slice, groups apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENGLISH, GERMAN, write_jsonl
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from bam_lora import slicing
from bam_lora.data import Layout, TrainingSource, prepare
from bam_lora.dealing import deal_sources, most_of
from bam_lora.errors import UserError
from bam_lora.packing import load_rows
from bam_lora.slice_groups import ColumnValues, combine, dataset_names
from bam_lora.sources import TextSource

SLICINGS = ["random", "contiguous", "by_dataset", "by_column"]
# Documents of two target sources, each with one of three values of a column.
DOCUMENTS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2)), min_size=40, max_size=80)


def tokens_of(pieces: slicing.Pieces) -> list[tuple[int, int]]:
    """Every (store, token) that the pieces hold."""
    return [(int(p["store"]), int(p["start"]) + token) for p in pieces for token in range(int(p["length"]))]


@pytest.mark.parametrize("how", SLICINGS)
@settings(max_examples=30)
@given(
    DOCUMENTS, DOCUMENTS, st.integers(8, 64), st.integers(1, 3), st.sampled_from([0.0, 0.05, 0.3]), st.integers(0, 9)
)
def test_every_token_is_in_one_slice_and_replay_has_its_share(
    how: str, first: list[Any], second: list[Any], length: int, rounds: int, share: float, seed: int
) -> None:
    values = [[value for _, value in documents] for documents in (first, second)]
    lengths = [np.array([tokens for tokens, _ in documents]) for documents in (first, second)] + [np.full(500, 100)]
    sources = [
        TrainingSource(TextSource(f"/{name}"), role)
        for name, role in zip("abr", ("target", "target", "replay"), strict=True)
    ]
    if how == "by_dataset":
        grouping = [(["a"], np.zeros(len(first), int)), (["b"], np.zeros(len(second), int)), ([], np.zeros(500, int))]
        group_of: Any = lambda store, document: "ab"[store]  # noqa: E731
    else:
        grouping = [(["x", "y", "z"], np.array(one)) for one in values] + [([], np.zeros(500, int))]
        group_of = lambda store, document: "xyz"[values[store][document]]  # noqa: E731
    count = len({group_of(s, d) for s in range(2) for d in range(len(values[s]))}) if how.startswith("by") else 2
    layout = Layout(count * rounds, length, how, share, seed)
    try:
        dealt, used, groups = deal_sources(sources, lengths, layout, grouping)
    except UserError:
        if how != "by_column":
            raise
        reject()  # a value that only a few documents have
    every = [token for target, replay in dealt for part in (target, replay) for token in tokens_of(part)]
    assert len(every) == len(set(every)) == sum(used)
    assert used[:2] == [int(part.sum()) for part in lengths[:2]]
    assert {token for target, _ in dealt for token in tokens_of(target)} == set(
        tokens_of(slicing.documents([*lengths[:2]]))
    )
    for target, replay in dealt:
        total = int(target["length"].sum() + replay["length"].sum())
        assert abs(int(replay["length"].sum()) - share * total) <= max(1, 0.01 * total)
        assert set(replay["store"]) <= {2}
        assert max(target["length"].max(), replay["length"].max(initial=0)) <= length
    assert len(dealt) == count * rounds
    if not how.startswith("by"):
        assert groups is None
        return
    assert groups == groups[:count] * rounds
    assert len(set(groups)) == count
    for (target, _), group in zip(dealt, groups, strict=True):
        documents = slicing.document_numbers(target, lengths)
        first_of = [0, len(first)]
        found = {
            group_of(int(p["store"]), int(d) - first_of[p["store"]]) for p, d in zip(target, documents, strict=True)
        }
        assert found == {group}
    for group in set(groups):  # evenly, to within a piece
        sizes = [
            int(target["length"].sum()) for (target, _), other in zip(dealt, groups, strict=True) if other == group
        ]
        assert max(sizes) - min(sizes) <= 2 * length


def test_the_order_within_a_group_is_shuffled_by_the_seed() -> None:
    def first_documents(seed: int) -> list[int]:
        sources = [TrainingSource(TextSource(f"/{name}"), "target") for name in "ab"]
        grouping = [([name], np.zeros(30, int)) for name in "ab"]
        layout = Layout(2, 64, "by_dataset", 0.0, seed)
        dealt, _, _ = deal_sources(sources, [np.full(30, 10)] * 2, layout, grouping)
        return [int(start) for start in dealt[0][0]["start"]]

    assert first_documents(0) == first_documents(0) != first_documents(1)
    assert sorted(first_documents(0)) == list(range(0, 300, 10)) != first_documents(0)


def test_weights_and_limits_count_as_ever() -> None:
    sources = [
        TrainingSource(TextSource("/a"), "target", tokens=400, weight=1.0),
        TrainingSource(TextSource("/b"), "target", weight=3.0),
    ]
    grouping = [([name], np.zeros(100, int)) for name in "ab"]
    dealt, used, groups = deal_sources(sources, [np.full(100, 20)] * 2, Layout(4, 32, "by_dataset", 0.0, 0), grouping)
    assert used == [400, 1200]
    assert groups == ["a", "b", "a", "b"]
    assert [int(target["length"].sum()) for target, _ in dealt] == pytest.approx([200, 600, 200, 600], abs=20)


def test_a_group_that_is_used_up_has_no_turn() -> None:
    sources = [TrainingSource(TextSource(f"/{name}"), "target") for name in "ab"]
    grouping = [(["a"], np.zeros(0, int)), (["b"], np.zeros(50, int))]
    lengths = [np.zeros(0, int), np.full(50, 20)]
    _, _, groups = deal_sources(sources, lengths, Layout(3, 32, "by_dataset", 0.0, 0), grouping)
    assert groups == ["b", "b", "b"]


@pytest.mark.parametrize("slices", [1, 3])
def test_slices_that_cannot_be_shared_out_are_an_error(slices: int) -> None:
    words = rf"bam\.slices: expected a multiple of 2, the number of groups to slice by \(bg, en\), found {slices}"
    with pytest.raises(UserError, match=words):
        slicing.require_even_groups(["bg", "en"], slices)
    with pytest.raises(UserError, match=r"multiple of 9, .*\(a, b, c, d, e, f, g, h, \.\.\.\)"):
        slicing.require_even_groups(list("abcdefghi"), slices)


def test_too_little_text_of_one_group_names_it() -> None:
    sources = [TrainingSource(TextSource(f"/{name}"), "target") for name in "ab"]
    grouping = [(["a"], np.zeros(9, int)), (["b"], np.zeros(1, int))]
    words = r"data\.target, group b: expected enough text for 2 slices, found 5 tokens in 1 pieces"
    with pytest.raises(UserError, match=words):
        deal_sources(sources, [np.full(9, 9), np.array([5])], Layout(4, 32, "by_dataset", 0.0, 0), grouping)


def test_groups_of_several_sources_are_one_list() -> None:
    names, labels = combine([["de", "en"], [], ["en", "bg"]], [np.array([1, 0]), np.array([0]), np.array([0, 1, 1])])
    assert names == ["de", "en", "bg"]
    assert labels.tolist() == [1, 0, -1, 1, 2, 2]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([TextSource("/x/bg.jsonl"), TextSource("/x/en.jsonl.gz")], ["bg", "en"]),
        ([TextSource("org/web", "bul_Cyrl"), TextSource("org/web", "deu_Latn")], ["web/bul_Cyrl", "web/deu_Latn"]),
        ([TextSource("/x/de/*.txt"), TextSource("/x/en")], ["de", "en"]),
        ([TextSource("org/a.b"), TextSource("/x/a.jsonl")], ["a.b", "a"]),
        ([TextSource("/x/a.jsonl", text="t"), TextSource("/x/a.jsonl")], ["a train t", "a train text"]),
        ([TextSource("/x/a.txt"), TextSource("/y/a.txt")], ["a train text (1)", "a train text (2)"]),
    ],
)  # fmt: skip
def test_every_data_set_has_a_name_of_its_own(sources: list[TextSource], expected: list[str]) -> None:
    assert dataset_names(sources) == expected


@pytest.mark.parametrize("value", [None, "", 1.5, ["bg"]])
def test_a_row_without_a_value_is_an_error_that_names_it(value: object) -> None:
    column = ColumnValues(TextSource("/x/a.jsonl"), "language")
    column.note(0, {"text": "a", "language": "bg"})
    words = r"/x/a\.jsonl, row 8, column 'language': expected text or a whole number to slice by, found"
    with pytest.raises(UserError, match=words):
        column.note(7, {"text": "a", "language": value})
    with pytest.raises(UserError, match="found columns lang, text"):
        column.note(7, {"text": "a", "lang": "bg"})


def test_values_belong_to_the_rows_that_are_kept() -> None:
    column = ColumnValues(TextSource("/x/a.jsonl"), "language")
    for number, value in [(0, "bg"), (2, "en"), (3, "bg"), (9, 7)]:
        column.note(number, {"language": value})
    assert column.names == ["bg", "en", "7"]
    assert column.labels([2, 9]).tolist() == [1, 2]


@pytest.mark.parametrize("how", ["by_dataset", "by_column"])
def test_rows_of_a_slice_hold_text_of_its_group_alone(how: str, tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    mixed = [(text, "german") for text in GERMAN] + [(text, "english") for text in ENGLISH]
    mixed = [*mixed[::2], ("   ", "none"), *mixed[1::2]]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"text": text, "language": name}) + "\n" for text, name in mixed))
    sources = [TrainingSource(TextSource(str(path)), "target", group_column="language")]
    if how == "by_dataset":
        sources = [
            TrainingSource(TextSource(str(write_jsonl(tmp_path / f"{name}.jsonl", texts))), "target", group=name)
            for name, texts in (("german", GERMAN), ("english", ENGLISH))
        ]
    facts = prepare(sources, Layout(4, 64, how, 0.0, 0), tokenizer, tmp_path / "01", key="key", say=lambda text: None)
    assert [part["group"] for part in facts["slices"]] == ["german", "english"] * 2
    ids = {name: [] for name in ("german", "english")}  # type: dict[str, list[int]]
    for part in facts["slices"]:
        rows = load_rows(tmp_path / "01", tuple(part["rows"]))["input_ids"]
        ids[part["group"]] += [token for row in rows for token in row]
    for name, texts in (("german", GERMAN), ("english", ENGLISH)):
        expected = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        assert sorted(ids[name]) == sorted(expected)


@given(st.lists(st.floats(0.01, 20), min_size=1, max_size=5), st.integers(1, 10**9))
def test_no_more_of_a_replay_source_is_read_than_its_weight_can_use(weights: list[float], total: int) -> None:
    where = TextSource("org/data")
    sources = [TrainingSource(where, "target"), *(TrainingSource(where, "replay", weight=one) for one in weights)]
    most = [most_of(sources, index, total) for index in range(1, len(sources))]
    assert sum(slicing.quotas(most, weights, total)) == total
    assert sum(most) <= total + 2 * len(weights)
    plain = [TrainingSource(where, "replay"), TrainingSource(where, "replay")]
    assert most_of(plain, 1, total) == total
