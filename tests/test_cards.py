"""Cards as people name them."""

from __future__ import annotations

import pytest

from bam_lora.cards import Card, generation_before_ampere, parse_card
from bam_lora.errors import UserError

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "gib"), [("12GB", 12), ("12", 12), (" 24 gib", 24), ("11.5 GiB", 11.5), ("8192MB", 8), ("8000MB", 7.8125)]
)
def test_memory_is_read_as_people_write_it(text: str, gib: float) -> None:
    assert parse_card(text) == Card(round(gib * GIB))


@pytest.mark.parametrize(
    ("text", "gib"),
    [("T4", 14.7), ("tesla t4", 14.7), ("V100", 16), ("V100 32GB", 32), ("Tesla V100-SXM2-32GB", 32), ("2080 Ti", 11),
     ("RTX 2080 Ti", 11), ("NVIDIA GeForce GTX 1660 Super", 6), ("RTX 2060, 12 GB", 12), ("turing 6GB", 6),
     ("Quadro RTX 8000", 48), ("1080", 8)],
)  # fmt: skip
def test_cards_before_ampere_have_names(text: str, gib: float) -> None:
    found = parse_card(text)
    assert (found.memory_bytes, found.bfloat16) == (round(gib * GIB), False)
    assert parse_card(found.given) == found


@pytest.mark.parametrize("text", ["", "much", "0", "-3GB", "T5", "Turing", "RTX 3060", "much 12GB"])
def test_all_else_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--gpu-memory: expected a size such as 12GB, or the name of a card before"):
        parse_card(text)


def test_generations_by_compute_capability() -> None:
    known = {(5, 2): "Maxwell", (6, 1): "Pascal", (7, 0): "Volta", (7, 5): "Turing", (8, 0): None, (12, 0): None}
    for capability, name in known.items():
        assert generation_before_ampere(capability) == name
        if name is not None:
            assert parse_card(f"{name} 4GB") == Card(4 * GIB, name, bfloat16=False)
