"""Writes languages.tsv: `python -m bam_lora.make_languages DISTRIBUTION.csv NAMES.csv`.

Two public files say which languages there are: `fineweb2-language-distribution.csv` of the GitHub repository
huggingface/fineweb-2, of which the columns `subset`, `split`, `name`, `words` and `bible_ratio` are read, and
datatrove's `assets/tokenizer_assignment.csv`, for ISO 639-1. Other names come from Unicode's CLDR through the package
`langcodes` with its data, which is needed for this only.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

from bam_lora.languages import TABLE
from bam_lora.store import write_text

_HEAD = (
    "# HuggingFaceFW/fineweb-2: configuration, ISO 639-1, English name, other names, words in train, marks:",
    "# t: has a split `test`; b: more than half of it is from Bible translations.",
    "# Configurations and words: fineweb2-language-distribution.csv of GitHub's huggingface/fineweb-2, rounded to two",
    "# digits. English names: ISO 639-3. Other names: Unicode CLDR, (c) 1991-2025 Unicode, Inc., Unicode License v3,",
    "# through langcodes. Written by make_languages.py.",
)
# Names people use that neither ISO 639-3 nor CLDR has, or has for a group that FineWeb-2 splits.
_ALSO = {
    "cmn_Hani": "Mandarin",
    "ckb_Arab": "Sorani",
    "fas_Arab": "Farsi",
    "fil_Latn": "Tagalog",
    "kmr_Latn": "Kurmanji",
    "nld_Latn": "Flemish",
    "nno_Latn": "Norwegian|no|norsk",
    "nob_Latn": "Norwegian|no|norsk",
    "spa_Latn": "Castilian",
    "yue_Hani": "Cantonese",
}


def make_table(distribution: Path, names: Path) -> str:
    """The list's text.

    Args:
        distribution: FineWeb-2's table of sizes.
        names: datatrove's table of codes.
    """
    with names.open(encoding="utf-8", newline="") as file:
        known = {f"{row['code_3']}_{row['script']}": row for row in csv.DictReader(file)}
    lines = list(_HEAD)
    for config, name, words, marks in _sizes(distribution):
        row = known[config]
        others = [*_ALSO.get(config, "").split("|"), *_cldr_names(row["code_3"], row["script"], row["code_1"])]
        kept = dict.fromkeys(
            other for other in others if other and other not in (name, row["code_3"]) and "[" not in other
        )
        lines.append("\t".join((config, row["code_1"], name, "|".join(kept), str(_rounded(words)), marks)))
    return "\n".join(lines) + "\n"


def _sizes(distribution: Path) -> Iterator[tuple[str, str, int, str]]:
    """Configurations with text that was kept, their names, the words of their training split, and marks."""
    with distribution.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["subset"].endswith("_removed")]
    tested = {row["subset"] for row in rows if row["split"] == "test"}
    for row in rows:
        if row["split"] == "train" and row["words"] != "-":
            bible = row["bible_ratio"].replace("-", "0")
            marks = ("t" if row["subset"] in tested else "") + ("b" if float(bible) > 0.5 else "")
            yield row["subset"], row["name"], int(row["words"]), marks


def _cldr_names(code: str, script: str, short: str) -> Iterator[str]:
    """English names, that of its group, and its own in this script."""
    import langcodes

    plain = langcodes.Language.get(code)
    own = langcodes.Language.make(language=plain.language, script=script)
    if plain.language in (code, short):  # not where one code is mapped to another language's
        yield plain.display_name()
        yield plain.autonym()
        if own.autonym() != own.display_name():
            yield own.autonym().split("（")[0].split(" (")[0]
    if short:
        yield langcodes.Language.get(short).to_alpha3()  # uzb, of which uzn and uzs are the parts
        yield langcodes.Language.get(short).display_name()
        yield langcodes.Language.get(short).autonym()


def _rounded(words: int) -> int:
    """Two digits of it: how much there is, not a count to rely on."""
    return int(float(f"{words:.2g}"))


def main(arguments: list[str] | None = None) -> None:
    """Writes the table beside this file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("distribution", type=Path)
    parser.add_argument("names", type=Path)
    given = parser.parse_args(arguments)
    write_text(TABLE, make_table(given.distribution, given.names))


if __name__ == "__main__":
    main()
