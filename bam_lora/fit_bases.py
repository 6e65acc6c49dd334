"""Which of the bases that recipes know would fit a card, by the parameters that their fragments state."""

from __future__ import annotations

import re
from pathlib import Path

_PARAMETERS = re.compile(r"([\d.]+) ([BM]) parameters")
_BASE = re.compile(r"^base: *(\S+)", re.MULTILINE)
_UNITS = {"B": 1e9, "M": 1e6}


def bases_up_to(parameters: int, folder: Path | None = None) -> list[str]:
    """Names of known bases with at most so many parameters, the largest first; none where the recipes are not there.

    Args:
        parameters: The most.
        folder: The recipes; None: those of this package.
    """
    package = Path(__file__).resolve().parent
    places = [folder] if folder is not None else [package / "recipes", package.parent / "recipes"]
    found = []
    for place in places:
        for file in sorted((place / "_shared" / "bases").glob("*.yaml")):
            text = file.read_text(encoding="utf-8")
            size, base = _PARAMETERS.search(text), _BASE.search(text)
            if size is not None and base is not None and (count := float(size[1]) * _UNITS[size[2]]) <= parameters:
                found.append((-count, base[1]))
        if found:
            break
    return [name for _, name in sorted(found)]
