"""Held-out text in training text: whole, in part, inside a longer page, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bam_lora.contamination import HeldOutSet, HeldOutText
from bam_lora.word_hashes import hash_words


def words(name: str, count: int) -> str:
    return " ".join(f"{name}{index}" for index in range(count))


LONG, OTHER, SHORT = words("a", 40), words("b", 60), "Guten Morgen, Berlin!"
SETS = [HeldOutSet("german", "target", (LONG, SHORT)), HeldOutSet("english", "source", (OTHER,), "selection")]


def matches(texts: list[str]) -> list[tuple[int, int]]:
    found = HeldOutText(SETS).match(hash_words(texts))
    return list(zip(found.training.tolist(), found.held_out.tolist(), strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LONG, [(0, 0)]),
        (LONG.upper().replace(" ", ",\n"), [(0, 0)]),  # normalised
        (f"{words('x', 500)} {LONG} {words('y', 500)}", [(0, 0)]),  # inside a longer page
        (words("a", 20), [(0, 0)]),  # a passage of it alone
        (f"{LONG} {OTHER}", [(0, 0), (0, 2)]),
        ("guten morgen BERLIN", [(0, 1)]),  # fewer words than a 13-gram has
        (f"{SHORT} {words('x', 30)}", []),
        (f"{words('a', 20)} {words('x', 60)}", []),  # 8 of 28 13-grams
        (f"{words('a', 26)} {words('x', 60)}", [(0, 0)]),  # 14 of 28: half
        (f"{words('a', 25)} {words('x', 60)}", []),  # 13 of 28
        (words("a", 12), []),
        ("", []),
        ("...", []),
    ],
)
def test_what_counts_as_found(text: str, expected: list[tuple[int, int]]) -> None:
    assert matches([text]) == expected
    assert matches([words("z", 50), text]) == [(training + 1, held_out) for training, held_out in expected]


def test_a_passage_said_twice_counts_once() -> None:
    assert matches([" ".join([words("a", 14)] * 10 + [words("x", 200)])]) == []


def test_description_adds_up() -> None:
    held_out = HeldOutText(SETS)
    batch = held_out.match(hash_words([f"{words('b', 19)} {words('x', 90)}", LONG]))
    found = np.zeros(held_out.documents, np.bool_)
    found[batch.held_out] = True
    german, english = held_out.describe(found, batch.seen)
    assert german == {
        "set": "german", "kind": "evaluation", "role": "target", "documents": 2, "found": 1, "ngram_share": 1.0,
    }  # fmt: skip
    assert (english["documents"], english["found"], english["kind"]) == (1, 0, "selection")
    assert english["ngram_share"] == pytest.approx(7 / 48)
    assert [held_out.place(index) for index in range(3)] == [(0, 0), (0, 1), (1, 0)]


def test_without_held_out_text_nothing_is_found() -> None:
    empty = HeldOutText([])
    found = empty.match(hash_words([LONG, ""]))
    assert (len(found.training), len(found.seen), empty.describe(np.zeros(0, np.bool_), found.seen)) == (0, 0, [])
    brief = HeldOutText([HeldOutSet("short", "target", (SHORT,))])
    assert brief.match(hash_words([SHORT])).training.tolist() == [0]
    assert brief.describe(np.ones(1, np.bool_), found.seen)[0]["ngram_share"] is None


def test_keys_follow_the_text() -> None:
    assert HeldOutText(SETS).key == HeldOutText(SETS).key != HeldOutText(SETS[:1]).key


def test_real_text_at_its_size(bench_data: Path) -> None:
    """12 MB of German against the held-out German: planted documents are found, and hardly any other."""
    texts = {}
    for name in ("train", "valid"):
        with (bench_data / "data" / f"de_docs.{name}.jsonl").open(encoding="utf-8") as file:
            texts[name] = [json.loads(line)["text"] for line in file]
    held_out = HeldOutText([HeldOutSet("german", "target", tuple(texts["valid"]))])
    pages = [f"{text}\n{held}" for text, held in zip(texts["train"], texts["valid"], strict=False)]
    found = held_out.match(hash_words(pages))
    assert set(range(len(pages))) <= set(found.held_out.tolist())
    rest = held_out.match(hash_words(texts["train"]))
    assert len(set(rest.held_out.tolist())) <= 0.05 * len(texts["valid"])
