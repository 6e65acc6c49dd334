"""New tokens for a text: byte-pair merges learned on from where a tokenizer's own end.

The text is counted as the tokenizer splits it, then the commonest pair of neighbouring tokens becomes a token, again
and again (Sennrich et al., arXiv 1508.07909). Every new merge comes after the old ones, so old text is split as before
but for what new merges join further, and a text never takes more tokens than it did. Pure Python on counts of words.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bam_lora.errors import UserError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Sentencepiece marks spaces in words that are whole lines; no token of its models crosses one.
_SPACE = "▁"
_MARKED_WORDS = re.compile(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+")
_CHUNK_CHARACTERS = 1 << 16
_LEAST_SAVED = 2  # a pair seen once is no regularity


@dataclass(frozen=True)
class NewToken:
    """A token to be added.

    Attributes:
        token: As the tokenizer's vocabulary writes it.
        pair: The two tokens that a merge joins, or None for a character that was split into bytes.
        pieces: Its pieces in the old tokenizer, as token numbers.
        saved: Tokens it saves in the sample, beside those that the tokens before it save.
    """

    token: str
    pair: tuple[str, str] | None
    pieces: tuple[int, ...]
    saved: int


def require_bpe(tokenizer: Any, name: str) -> None:
    """Checks that a tokenizer can learn merges.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, or None if there is none.
        name: What the message calls it.

    Raises:
        UserError: If it is not a byte-pair tokenizer that ends on bytes.
    """
    if tokenizer is None:
        found = "no tokenizer.json"
    else:
        model = tokenizer.model
        found = type(model).__name__
        if found == "BPE":
            if not (model.continuing_subword_prefix or model.end_of_word_suffix):
                return
            found = "BPE with marks for parts of words"
    raise UserError.of(
        f"the tokenizer of {name}",
        expected="a byte-pair (BPE) tokenizer in tokenizer.json, to learn new tokens",
        found=found,
        remedy="Leave out `vocabulary`",
    )


def count_words(tokenizer: Any, texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, as the tokenizer's normalizer and pre-tokenizer cut the texts into words."""
    words: Counter[str] = Counter()
    for text in texts:
        for chunk in _chunks(text):
            if tokenizer.normalizer is not None:
                chunk = tokenizer.normalizer.normalize_str(chunk)
            found = [chunk]
            if tokenizer.pre_tokenizer is not None:
                found = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(chunk)]
            for word in found:
                words.update(_MARKED_WORDS.findall(word) if _SPACE in word else (word,))
    del words[""]
    return words


def _chunks(text: str) -> Iterator[str]:
    """A long text in parts, cut where a line ends: offsets in very long ones cost time."""
    start = 0
    while len(text) - start > _CHUNK_CHARACTERS:
        end = text.rfind("\n", start, start + _CHUNK_CHARACTERS)
        end = start + _CHUNK_CHARACTERS if end <= start else end
        yield text[start:end]
        start = end
    yield text[start:]


def learn_tokens(tokenizer: Any, words: Counter[str], count: int) -> list[NewToken]:
    """The tokens that shorten a text the most, one after the other.

    Args:
        tokenizer: A `tokenizers.Tokenizer` that `require_bpe` accepts.
        words: From `count_words`.
        count: The most tokens to learn; there are fewer where nothing occurs twice any more.

    Returns:
        The tokens in the order of their merges. The same words give the same tokens, in whatever order they come.
    """
    learner = _Learner(tokenizer, words)
    learned: list[NewToken] = []
    while len(learned) < count and (token := learner.next_token()) is not None:
        learned.append(token)
    return learned


@dataclass(frozen=True)
class _Symbol:
    """A token, or a character that the tokenizer splits into bytes and that may become one."""

    text: str
    pieces: tuple[int, ...]
    joins: bool = True


class _Learner:
    """Words as sequences of symbols, the counts of neighbouring pairs, and a heap of the candidates.

    A heap's entry is (-saved, text of the left, of the right, key), an old one where the count has changed since.
    """

    def __init__(self, tokenizer: Any, words: Counter[str]) -> None:
        self._symbols: list[_Symbol] = []
        self._numbers: dict[tuple[str, bool], int] = {}
        self._taken = set(tokenizer.get_vocab(with_added_tokens=True))
        # Such tokenizers take a word that is a token whole, whatever the merges make of it.
        self._whole_words = bool(tokenizer.model.ignore_merges)
        ordered = sorted(words.items())
        self._counts = [count for _, count in ordered]
        self._places = {word: place for place, (word, _) in enumerate(ordered)} if self._whole_words else {}
        self._words = [self._split(tokenizer.model, word) for word, _ in ordered]
        self._pairs: dict[tuple[int, ...], int] = defaultdict(int)
        self._where: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for place in range(len(self._words)):
            self._count(place, +1)
        self._heap: list[tuple[int, str, str, tuple[int, ...]]] = []
        self._push(self._pairs)

    def next_token(self) -> NewToken | None:
        """Takes the best candidate into the words, or None if none is left."""
        while self._heap:
            negative, left, right, key = heapq.heappop(self._heap)
            if -negative != self._saved(key) or (len(key) == 2 and left + right in self._taken):
                continue
            pieces = tuple(piece for number in key for piece in self._symbols[number].pieces)
            self._taken.add(left + right)
            new = self._number(_Symbol(left + right, pieces))
            touched: set[tuple[int, ...]] = set()
            places = set(self._where[key])
            if left + right in self._places:
                places.add(self._places[left + right])
            for place in sorted(places):
                touched |= self._rewrite(place, key, new)
            self._push(touched)
            return NewToken(left + right, (left, right) if len(key) == 2 else None, pieces, -negative)
        return None

    def _split(self, model: Any, word: str) -> list[int]:
        """The word as the old tokenizer splits it; bytes that make up a character are one symbol."""
        symbols, run = [], bytearray()
        tokens = [(token.value, token.id) for token in model.tokenize(word)]
        for value, number in tokens:
            match = _BYTE.fullmatch(value) if model.byte_fallback else None
            if match:
                run.append(int(match[1], 16))
                continue
            symbols += self._characters(run, model)
            symbols.append(self._number(_Symbol(value, (number,), joins=value != model.unk_token)))
        return symbols + self._characters(run, model)

    def _characters(self, run: bytearray, model: Any) -> list[int]:
        """Characters spelled in bytes, none of which a merge may join; empties the run."""
        text = run.decode("utf-8", errors="replace")
        run.clear()
        found = []
        for character in text:
            pieces = tuple(model.token_to_id(f"<0x{byte:02X}>") for byte in character.encode())
            found.append(self._number(_Symbol(character, pieces, joins=False)))
        return found

    def _number(self, symbol: _Symbol) -> int:
        key = (symbol.text, symbol.joins)
        if key not in self._numbers:
            self._numbers[key] = len(self._symbols)
            self._symbols.append(symbol)
        return self._numbers[key]

    def _candidates(self, symbols: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Pairs that may be joined and characters that may become a token. A pair's two ends count once in "aaa"."""
        before: tuple[int, ...] | None = None
        for place, number in enumerate(symbols):
            symbol = self._symbols[number]
            if not symbol.joins and len(symbol.pieces) > 1:
                yield (number,)
            if place + 1 == len(symbols) or not (symbol.joins and self._symbols[symbols[place + 1]].joins):
                before = None
                continue
            pair = (number, symbols[place + 1])
            if pair == before and pair[0] == pair[1]:
                before = None
                continue
            before = pair
            yield pair

    def _count(self, place: int, sign: int) -> set[tuple[int, ...]]:
        found = list(self._candidates(self._words[place]))
        for key in found:
            self._pairs[key] += sign * self._counts[place]
            if sign > 0:
                self._where[key].add(place)
            else:
                self._where[key].discard(place)
        return set(found)

    def _rewrite(self, place: int, key: tuple[int, ...], new: int) -> set[tuple[int, ...]]:
        """Puts the new symbol into one word; the candidates whose counts that changes."""
        touched = self._count(place, -1)
        symbols, old, position = [], self._words[place], 0
        while position < len(old):
            if tuple(old[position : position + len(key)]) == key:
                symbols.append(new)
                position += len(key)
            else:
                symbols.append(old[position])
                position += 1
        self._words[place] = [new] if self._places.get(self._symbols[new].text) == place else symbols
        return touched | self._count(place, +1)

    def _saved(self, key: tuple[int, ...]) -> int:
        """Tokens saved by a candidate: one for each pair, all but one for a character's bytes."""
        return self._pairs[key] * (1 if len(key) == 2 else len(self._symbols[key[0]].pieces) - 1)

    def _push(self, keys: Iterable[tuple[int, ...]]) -> None:
        for key in keys:
            saved = self._saved(key)
            if saved >= _LEAST_SAVED:
                right = self._symbols[key[1]].text if len(key) == 2 else ""
                heapq.heappush(self._heap, (-saved, self._symbols[key[0]].text, right, key))
