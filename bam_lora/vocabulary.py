"""New tokens as a run's step 0: learned from its target text once, kept beside the ledger, and the base that has them.

The base of such a run is a function of the original base and of `RUN/vocabulary/`: the ledger holds the hashes of both
and of the grown weights, so it can be made again at any time and is the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.base import BaseFiles, load_tokenizer
from bam_lora.errors import UserError
from bam_lora.grown_base import embedding_modules, grow_base, row_count
from bam_lora.grown_tokenizer import (
    check_tokenizer,
    learned_record,
    open_backend,
    read_learned,
    token_count,
    write_tokenizer,
)
from bam_lora.ledger_history import FORMAT, file_record
from bam_lora.recipe import Lora, Recipe
from bam_lora.sources import TextSource, open_source, read_texts
from bam_lora.store import digest, inside, new_folder, read_json, verify, write_json
from bam_lora.text_filters import FilterRules, broken_rule
from bam_lora.token_learning import count_words, learn_tokens, require_bpe

VOCABULARY = "vocabulary"
TOKENS = "vocabulary.json"
_CHECKED_TEXTS = 200


@dataclass(frozen=True)
class Growth:
    """How a vocabulary is to grow; see `recipe_vocabulary.Vocabulary`."""

    tokens: int
    sample_bytes: int
    pad_to_multiple_of: int | None


def require_fresh_base(base: str, tokens: int | None, *, chained: bool) -> None:
    """Checks that new tokens come before all training.

    Raises:
        UserError: If there are to be some, and the base is a finished run.
    """
    if tokens is not None and chained:
        raise UserError.of(
            "vocabulary.tokens",
            expected="none where the base is a finished run: new tokens come before all training",
            found=f"{tokens}",
            remedy=f"Leave it out, or start from the model in {Path(base) / 'model'}",
        )


def learn_vocabulary(
    base: Path,
    sources: Sequence[tuple[TextSource, FilterRules]],
    growth: Growth,
    root: Path,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Learns new tokens and writes `root/vocabulary/`: the grown tokenizer and `vocabulary.json`.

    Args:
        base: The base's folder.
        sources: Target text, and which of it is left out.
        growth: How many tokens from how much text.
        root: The run's folder.
        say: Receives a line now and then where a source's `where` chooses few rows.

    Returns:
        What the ledger keeps of it: {"path", "files": {name: {"bytes", "sha256"}}}.

    Raises:
        UserError: If the base's tokenizer is of another kind, or the text gives no new token.
    """
    before = open_backend(base)
    require_bpe(before, str(base))
    texts = list(_sample(sources, growth.sample_bytes, say))
    learned = learn_tokens(before, count_words(before, texts), growth.tokens)
    if not learned:
        raise UserError.of(
            "vocabulary.tokens",
            expected="target text that new tokens make shorter",
            found="no two tokens that come together twice",
            remedy="Give more text, or leave it out",
        )
    with new_folder(root / VOCABULARY) as folder:
        first = write_tokenizer(base, learned, folder)
        check_tokenizer(base, folder, learned, first, texts[:_CHECKED_TEXTS])
        counts = [token_count(load_tokenizer(one), texts) for one in (base, folder)]
        sample = {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}
        content = {
            "format": FORMAT,
            "first": first,
            "rows": row_count(base, first + len(learned), growth.pad_to_multiple_of),
            "sample": {**sample, "tokens_before": counts[0], "tokens_after": counts[1]},
            "tokens": learned_record(learned),
        }
        write_json(folder / TOKENS, content)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: file_record(root, f"{VOCABULARY}/{name}") for name in names}
    return {"path": VOCABULARY, "files": {name: _stated(one) for name, one in files.items()}}


def _stated(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"bytes": record["bytes"], "sha256": record["sha256"]}


def _sample(
    sources: Sequence[tuple[TextSource, FilterRules]], sample_bytes: int, say: Callable[[str], None] | None
) -> Iterator[str]:
    """The first documents of each source, up to its share of the bytes; the last one is not cut."""
    for source, rules in sources:
        left = sample_bytes // len(sources)
        with tempfile.TemporaryDirectory() as cache:
            opened = open_source(source, streaming=True, cache=Path(cache))
            opened.say = say
            for _, text in read_texts(source, opened):
                if broken_rule(text, rules) is not None:
                    continue
                yield text
                left -= len(text.encode())
                if left <= 0:
                    break


def grown_files(original: BaseFiles, base: dict[str, Any], root: Path, folder: Path) -> BaseFiles:
    """The base with its new tokens, made if it is not there.

    Args:
        original: The base as it came; its files are those that the ledger records.
        base: The ledger's `base`; gets the hashes of the grown weights where they are made for the first time.
        root: The run's folder.
        folder: Where the grown base is, or goes.

    Returns:
        The grown base under the original's name.

    Raises:
        UserError: If what is made is not what the run started from.
    """
    vocabulary = base["vocabulary"]
    key = digest([FORMAT, *({name: one["sha256"] for name, one in sorted(part.items())}
                            for part in (base["files"], vocabulary["files"]))])  # fmt: skip
    manifest = verify(folder, key)
    if manifest is None:
        tokenizer = inside(root, vocabulary["path"])
        content = read_json(tokenizer / TOKENS)
        pieces = [one.pieces for one in read_learned(tokenizer / TOKENS)]
        grow_base(original.folder, pieces, content["first"], content["rows"], tokenizer, folder, key=key)
        manifest = verify(folder, key, quick=True)
    assert manifest is not None, folder
    weights = {name: _stated(one) for name, one in manifest["files"].items() if name.endswith(".safetensors")}
    if vocabulary.setdefault("weights", weights) != weights:
        raise UserError.of(
            f"the grown base in {folder}",
            expected="the weights that the run started from",
            found="others",
            remedy="Use the version of torch that environment.json names, or restore the folder",
        )
    return BaseFiles(original.name, folder, original.revision)


def branch_lora(recipe: Recipe, root: Path, grown: Path) -> Lora:
    """The adapter of a run's branches: the recipe's, with the rows that a grown vocabulary has them train.

    Args:
        recipe: The run's.
        root: Its folder.
        grown: Folder of the base with the new tokens, if the recipe adds some.
    """
    if recipe.vocabulary.tokens is None:
        return recipe.lora
    modules, tied = embedding_modules(grown)
    if recipe.vocabulary.train == "all":
        return recipe.lora.model_copy(update={"modules_to_save": modules, "ensure_weight_tying": tied})
    content = read_json(root / VOCABULARY / TOKENS)
    numbers = range(content["first"], content["first"] + len(content["tokens"]))
    return recipe.lora.model_copy(update={"trainable_token_indices": {name: list(numbers) for name in modules}})
