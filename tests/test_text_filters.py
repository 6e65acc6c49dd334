"""Filters on texts whose measures are counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from bam_lora.text_filters import (
    FilterRules,
    broken_rule,
    digit_share,
    repeated_line_share,
    repeated_words_share,
    symbol_share,
)

TEXT = "Am 3. Mai ging er an den Fluss.\nDort fand er\nnichts.\nDort fand er\n"


def test_shares() -> None:
    assert symbol_share("a, b! 12") == pytest.approx(2 / 6)
    assert digit_share("a, b! 12") == pytest.approx(2 / 6)
    assert symbol_share("में हिन्दी é") == 0  # vowel signs and accents belong to their letters
    assert repeated_line_share(TEXT) == pytest.approx(1 / 4)
    words = [f"w{index}" for index in range(12)]
    assert repeated_words_share(" ".join(words)) == 0
    assert repeated_words_share(" ".join(words + words)) == pytest.approx(3 / 15)
    for share in (symbol_share, digit_share, repeated_line_share, repeated_words_share):
        assert share("") == share(" \n") == 0


@pytest.mark.parametrize(
    ("rule", "kept", "broken"),
    [
        ("min_characters", len(TEXT), len(TEXT) + 1),
        ("max_characters", len(TEXT), len(TEXT) - 1),
        ("min_words", 15, 16),
        ("max_words", 15, 14),
        ("max_symbols", 3.01 / 51, 2.99 / 51),
        ("max_digits", 1.01 / 51, 0.0),
        ("max_repeated_lines", 0.25, 0.24),
        ("max_repeated_words", 0.0, None),
        ("pattern", r"Fl\w+\.", r"^Dort"),
        ("exclude_pattern", r"^Dort", r"(?m)^Dort"),
    ],
)
def test_each_rule_at_its_bound(rule: str, kept: Any, broken: Any) -> None:
    assert broken_rule(TEXT, FilterRules(**{rule: kept})) is None
    if broken is not None:
        assert broken_rule(TEXT, FilterRules(**{rule: broken})) == rule


def test_no_rule_keeps_all_and_the_first_broken_one_counts() -> None:
    assert not FilterRules().on
    assert FilterRules(max_digits=0.0).on
    assert broken_rule("", FilterRules()) is None
    assert broken_rule(TEXT, FilterRules(pattern="nowhere", min_words=100)) == "min_words"
    repeated = " ".join(["Am Abend ging der Fuchs in den dunklen Wald hinein."] * 5)
    assert broken_rule(repeated, FilterRules(max_repeated_words=0.3)) == "max_repeated_words"
