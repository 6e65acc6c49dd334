"""What the base's own model card says of its licence, kept with the run for the cards of what is made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bam_lora.store import digest, read_record, write_record

BASE_CARD = "base_card.json"
_KEYS = ("license", "license_name", "license_link")


def read_base_card(folder: Path) -> dict[str, str | None]:
    """The licence in the front matter of a model folder's README.md.

    Returns:
        {"license", "license_name", "license_link"}, each None where the card does not say it, or there is none.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    matter = _front_matter(text)
    return {key: _word(matter.get(key)) for key in _KEYS}


def _front_matter(text: str) -> dict[str, Any]:
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    ends = (number for number, line in enumerate(lines[1:], start=1) if line.rstrip() == "---")
    end = next(ends, None)
    try:
        matter = yaml.safe_load("\n".join(lines[1:end])) if end is not None else None
    except yaml.YAMLError:  # somebody else's card, which says nothing that can be read
        return {}
    return matter if isinstance(matter, dict) else {}


def _word(value: Any) -> str | None:
    """A text, or the only one of a list; what is no text says nothing."""
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    return one.strip() or None if isinstance(one, str) else None


def keep_base_card(root: Path, folder: Path) -> None:
    """Writes down in a run directory what the card of its original base says, unless that stands there.

    Args:
        root: The run directory.
        folder: The original base.
    """
    said = read_base_card(folder)
    key = digest(said)
    if read_record(root / BASE_CARD, key) is None:
        write_record(root / BASE_CARD, key, said)
