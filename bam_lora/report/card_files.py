"""The card of a model folder, with its picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bam_lora.report.card import model_card
from bam_lora.report.plots import write_plane


def write_card(folder: Path, report: Mapping[str, Any], recipe: dict[str, Any]) -> None:
    """Writes README.md, and the picture that it shows, into a model folder that is being made.

    Args:
        folder: Of the model.
        report: What `collect` returned.
        recipe: The resolved recipe.
    """
    picture = write_plane(folder, report)
    (folder / "README.md").write_text(model_card(report, recipe, picture=picture), encoding="utf-8", newline="\n")
