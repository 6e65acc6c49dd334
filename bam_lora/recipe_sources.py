"""The parts of a recipe that say where text comes from."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from bam_lora.recipe_values import RowsWhere, TextPattern, Tokens

Mode = Literal["text", "chat"]
_COLUMN = "Column that holds the text; in `mode: chat`, the messages, where it is called none of the usual names."


class Section(BaseModel):
    """What all parts of a recipe have in common: unknown keys are errors, values are not bent into shape."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Filters(Section):
    """Documents that break one of these rules are left out of the training. All rules are off by default."""

    min_characters: int | None = Field(default=None, ge=1, description="Fewest characters of a document.")
    max_characters: int | None = Field(default=None, ge=1, description="Most characters of a document.")
    min_words: int | None = Field(default=None, ge=1, description="Fewest words, parted by white space (Gopher: 50).")
    max_words: int | None = Field(default=None, ge=1, description="Most words (Gopher: 100000).")
    max_symbols: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Largest share of characters, white space aside, that are neither letter nor digit; "
        "of German and English prose 99 in 100 documents stay below 0.09.",
    )
    max_digits: float | None = Field(
        default=None, ge=0, lt=1, description="Largest share of characters, white space aside, that are digits."
    )
    max_repeated_lines: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Largest share of lines that have stood in the document before (Gopher: 0.3).",
    )
    max_repeated_words: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Largest share of runs of ten words that have stood in the document before.",
    )
    pattern: TextPattern = Field(default=None, description="A regular expression that must be found in a document.")
    exclude_pattern: TextPattern = Field(
        default=None, description="A regular expression that must not be found in it, such as `(?i)lorem ipsum`."
    )


class Source(Section):
    """Where training text comes from."""

    path: str = Field(
        min_length=1,
        description="Hub id, folder, or JSON, JSONL, Parquet or text files (also a pattern with `*`); "
        "a relative one is relative to the recipe that names it.",
    )
    name: str | None = Field(default=None, description="Configuration of a Hub dataset, such as `bul_Cyrl`.")
    split: str = Field(default="train", min_length=1, description="Split of the dataset.")
    revision: str | None = Field(default=None, description="Commit, tag or branch on the Hub; none: the newest.")
    text: str = Field(default="text", min_length=1, description=_COLUMN)
    mode: Mode | None = Field(
        default=None, description="`chat`: its rows are conversations; `text`: documents; none: as the recipe's `mode`."
    )
    where: RowsWhere = Field(
        default=None,
        description="Use only rows whose columns have these values, such as `{language_code: fin}` or "
        "`{source: [wiki, news]}`; several columns must all fit. Counted before `tokens`. None: all rows.",
    )
    tokens: Tokens = Field(
        default=None,
        description="Use at most so many tokens of it: `500k`, `200M`, `1.5B`; none: as many as there are.",
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="Its share of the tokens relative to the others in its list; none: as its size gives.",
    )
    shuffle_buffer: int | None = Field(
        default=None,
        ge=2,
        description="Read it shuffled by `seed`, for data in an order (by date, site or language) of which only the "
        "first part is used: a stream's files in shuffled order, and its rows through a buffer of so many, 10_000 "
        "say; what is not streamed is shuffled whole. None: from its beginning.",
    )
    filters: Filters | None = Field(default=None, description="Rules of its own; none: those of `data.filters`.")


class EvaluationSource(Section):
    """Text that the models are scored on, as one named set."""

    path: str = Field(min_length=1, description="As for `data.target`.")
    name: str | None = Field(default=None, description="Configuration of a Hub dataset.")
    split: str = Field(default="train", min_length=1, description="Split of the dataset.")
    revision: str | None = Field(default=None, description="Commit, tag or branch on the Hub; none: the newest.")
    text: str = Field(default="text", min_length=1, description=_COLUMN)
    mode: Mode | None = Field(
        default=None, description="`chat`: its rows are conversations; `text`: documents; none: as the recipe's `mode`."
    )
    where: RowsWhere = Field(default=None, description="Score only rows whose columns have these values, as above.")
    documents: int | None = Field(default=None, ge=1, description="Score only the first so many documents; none: all.")
    set: str = Field(
        default=None,
        validate_default=True,
        description="Name of the set in the report, each once; none: the file's name without its ending, "
        "or the name of the dataset.",
    )

    @field_validator("set", mode="before")
    @classmethod
    def _name_set(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        path = PurePath(str(info.data.get("path", "")))
        # A pattern such as data/*.jsonl has no name of its own; its folder has.
        plain = [part for part in (path.stem, *reversed(path.parent.parts)) if "*" not in part and part.strip("/.~")]
        return plain[0] if plain else str(path)
