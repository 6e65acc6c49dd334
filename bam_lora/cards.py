"""A GPU as a person names it, by its memory or by its name, for plans on a machine that has none of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bam_lora.errors import UserError

_GIB = 2**30
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(gb|gib|mb|mib)?", re.IGNORECASE)
_NAME_AND_SIZE = re.compile(r"(.*?[a-z0-9])[\s,-]+([0-9.]+\s*(?:gb|gib|mb|mib))", re.IGNORECASE)
_MAKERS = re.compile(r"^(NVIDIA|TESLA|GEFORCE|RTX|GTX)")
_FORMS = re.compile(r"(SXM\d?|PCIE)$")  # as torch writes them: Tesla V100-SXM2-32GB
# Cards before Ampere and their memory in GiB, of the smallest where there are several; the T4 keeps some for ECC.
_OLDER = {
    "P100": 16, "P40": 24, "TITANXP": 12, "1060": 6, "1070": 8, "1070TI": 8, "1080": 8, "1080TI": 11,
    "V100": 16, "TITANV": 12,
    "T4": 14.7, "1650": 4, "1650SUPER": 4, "1660": 6, "1660TI": 6, "1660SUPER": 6, "2060": 6, "2060SUPER": 8,
    "2070": 8, "2070SUPER": 8, "2080": 8, "2080SUPER": 8, "2080TI": 11, "TITANRTX": 24,
    "QUADRORTX5000": 16, "QUADRORTX6000": 24, "QUADRORTX8000": 48,
}  # fmt: skip
_GENERATIONS = {5: "Maxwell", 6: "Pascal", 7: "Volta"}
_TURING = "Turing"
_OVERFLOWING = "gemma"  # activations of this family leave the range of float16
_WITH_BFLOAT16 = 8  # compute capability of Ampere


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        memory_bytes: What it has.
        name: In words; "" if only the memory is known.
        bfloat16: Whether it computes in bfloat16 itself: from Ampere (RTX 30, A100) on.
    """

    memory_bytes: int
    name: str = ""
    bfloat16: bool = True

    @property
    def size(self) -> str:
        """Its memory as `parse_card` takes it: 12GB, 11.8GB."""
        return f"{round(self.memory_bytes / _GIB, 1):g}GB"

    @property
    def given(self) -> str:
        """What `parse_card` makes the same of: the memory, and of a card before Ampere its name."""
        return self.size if self.bfloat16 else f"{self.name} {self.size}"


def parse_card(text: str) -> Card:
    """A card by its memory (`12GB`, `12`, `8192MB`), or an old one by its name (`T4`, `V100 32GB`, `Turing 6GB`).

    A card's GB are GiB, whatever it says on the box.

    Raises:
        UserError: If it is neither.
    """
    name, size = text.strip(), ""
    if _bare(name) not in _OLDER and (both := _NAME_AND_SIZE.fullmatch(name)):
        name, size = both[1], both[2]
    known = _OLDER.get(_bare(name))
    generation = name.capitalize() in (*_GENERATIONS.values(), _TURING)
    if known is not None or (generation and size):
        shown = name.capitalize() if generation else name
        return Card(_bytes(size) if size else round((known or 0) * _GIB), shown, bfloat16=False)
    return Card(_bytes(text.strip()))


def generation_before_ampere(capability: tuple[int, int]) -> str | None:
    """The generation of a card without bfloat16, as `parse_card` knows it; None from Ampere on.

    Args:
        capability: Its compute capability, such as (7, 5).
    """
    if capability[0] >= _WITH_BFLOAT16:
        return None
    return _TURING if capability >= (7, 5) else _GENERATIONS.get(capability[0], "Maxwell")


def instead_of_bfloat16(base: str) -> str:
    """What to compute in on a card without bfloat16: float16, but for bases that overflow in it.

    Args:
        base: Its name or, better, its kind (`model_type`).
    """
    return "float32" if _OVERFLOWING in base.lower() else "float16"


def _bare(name: str) -> str:
    """A name without its maker, blanks and dashes: `NVIDIA GeForce RTX 2080 Ti` is 2080TI."""
    bare = re.sub(r"[\s_-]", "", name).upper()
    while (shorter := _FORMS.sub("", _MAKERS.sub("", bare))) != bare:
        bare = shorter
    return bare


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text)
    if found is None or float(found[1]) == 0:
        raise UserError.of(
            "--gpu-memory",
            expected="a size such as 12GB, or the name of a card before Ampere such as T4 or V100 32GB",
            found=repr(text),
            remedy="Say what the card has",
        )
    unit = 2**20 if (found[2] or "gb").lower().startswith("m") else _GIB
    return round(float(found[1]) * unit)
