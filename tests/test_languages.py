"""FineWeb-2's languages: found by every kind of name and code, suggested where misspelled, listed where several."""

from __future__ import annotations

import pytest

from bam_lora.errors import UserError
from bam_lora.languages import TABLE, all_languages, choose_language, find_languages, near_names, readable_count


def configs(text: str) -> list[str]:
    return [one.config for one in find_languages(text)]


def test_the_list_is_whole():
    found = all_languages()
    assert len(found) == 1868  # as FineWeb-2's paper counts its language-script pairs
    assert len({one.config for one in found}) == len(found)
    assert [one.config for one in found] == sorted(one.config for one in found)
    assert all(one.name and one.words > 0 for one in found)
    assert "eng_Latn" not in {one.config for one in found}
    assert max(found, key=lambda one: one.words).config == "rus_Cyrl"
    assert TABLE.stat().st_size < 80_000


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("bul_Cyrl", "bul_Cyrl"),
        ("BUL_cyrl", "bul_Cyrl"),
        ("bul", "bul_Cyrl"),
        ("bg", "bul_Cyrl"),
        ("bg-BG", "bul_Cyrl"),
        ("Bulgarian", "bul_Cyrl"),
        ("  bulgarian ", "bul_Cyrl"),
        ("български", "bul_Cyrl"),
        ("sr-Latn", "srp_Latn"),
        ("sr-Cyrl-RS", "srp_Cyrl"),
        ("zh-Hant", "cmn_Hani"),
        ("zh_Hans_CN", "cmn_Hani"),
        ("iw", "heb_Hebr"),
        ("tl", "fil_Latn"),
        ("srp-Cyrl", "srp_Cyrl"),
        ("Deutsch", "deu_Latn"),
        ("Greek", "ell_Grek"),
        ("Ελληνικά", "ell_Grek"),
        ("maori", "mri_Latn"),
        ("Māori", "mri_Latn"),
        ("Farsi", "fas_Arab"),
        ("ไทย", "tha_Thai"),
        ("Norwegian Nynorsk", "nno_Latn"),
        ("Mandarin", "cmn_Hani"),
        ("Cantonese", "yue_Hani"),
        ("pt-BR", "por_Latn"),
        ("Saterfriesisch", "stq_Latn"),
    ],
)
def test_names_and_codes(text: str, config: str):
    assert configs(text) == [config]


@pytest.mark.parametrize(
    ("text", "first", "count"),
    [("Serbian", "srp_Cyrl", 2), ("Chinese", "cmn_Hani", 6), ("Norwegian", "nob_Latn", 2), ("uzb", "uzn_Latn", 3)],
)
def test_what_means_several_is_listed_with_most_words_first(text: str, first: str, count: int):
    found = find_languages(text)
    assert (found[0].config, len(found)) == (first, count)
    assert [one.words for one in found] == sorted((one.words for one in found), reverse=True)


def test_english_with_a_region_is_english():
    with pytest.raises(UserError, match="en-GB: expected a language to learn, found the one that the bases know best"):
        choose_language("en-GB")


def test_choosing_takes_a_language_with_a_recipe_or_almost_all_the_words_and_lists_the_rest():
    assert choose_language("Hindi").config == "hin_Deva"  # the Latin script has less than a hundredth
    assert choose_language("Estonian").config == "ekk_Latn"
    assert choose_language("Arabic", {"arb_Arab"}).config == "arb_Arab"
    with pytest.raises(UserError, match=r"srp_Cyrl \(Serbian, Cyrillic script\), srp_Latn .*Give one of these codes"):
        choose_language("Serbian")
    with pytest.raises(UserError, match=r"nob_Latn .*nno_Latn"):
        choose_language("norsk")


@pytest.mark.parametrize(
    ("text", "meant"), [("bulgarain", "Bulgarian"), ("Ukranian", "Ukrainian"), ("vietnamse", "Vietnamese")]
)
def test_misspelled_names_are_suggested(text: str, meant: str):
    assert near_names(text)[0] == meant
    with pytest.raises(UserError, match=rf"found no such one\. Did you mean {meant}"):
        choose_language(text)


def test_nothing_like_it_says_what_to_write():
    with pytest.raises(UserError, match=r"one of the 1,868 .*Give its English name, or its code"):
        choose_language("qqqq")
    assert find_languages("") == find_languages("!?") == []


@pytest.mark.parametrize("text", ["English", "en", "eng_Latn"])
def test_english_is_not_there_to_be_learned(text: str):
    with pytest.raises(UserError, match="FineWeb-2 leaves out"):
        choose_language(text)


def test_a_code_that_the_list_lacks_is_taken_unverified():
    (found,) = find_languages("xyz_latn")
    assert (found.config, found.verified, found.words) == ("xyz_Latn", False, 0)
    assert choose_language("bul_Latn").verified is False


def test_slugs_are_file_names_and_differ_by_script():
    def slug(config: str) -> str:
        return find_languages(config)[0].slug

    assert (slug("bul_Cyrl"), slug("ell_Grek"), slug("vro_Latn")) == ("bulgarian", "modern-greek", "voro")
    assert (slug("srp_Cyrl"), slug("srp_Latn")) == ("serbian", "serbian-latin")
    assert all(one.slug.strip("-") for one in all_languages()[::40])


def test_marks_of_the_list():
    by_config = {one.config: one for one in all_languages()}
    assert by_config["bul_Cyrl"].has_test
    assert not by_config["bul_Cyrl"].mostly_bible
    assert by_config["aai_Latn"].mostly_bible
    assert not by_config["abi_Latn"].has_test


@pytest.mark.parametrize(
    ("number", "text"),
    [(16_000_000_000, "16 billion"), (2_900_000_000, "2.9 billion"), (430_000, "430 thousand"), (94, "94")],
)
def test_counts_in_words(number: int, text: str):
    assert readable_count(number) == text
