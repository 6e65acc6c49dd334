"""Branch-and-Merge with LoRA: teach a language model a new language on one GPU, and keep what it knew.

The public names load what they need when they are first used; importing the package itself loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bam_lora.bam_config import BamConfig as BamConfig
    from bam_lora.chat import answers_only as answers_only
    from bam_lora.errors import UserError as UserError
    from bam_lora.export import export_adapter as export_adapter
    from bam_lora.folding import fold as fold
    from bam_lora.ledger import Ledger as Ledger
    from bam_lora.loop import run as run
    from bam_lora.merged_adapter import merge_adapters as merge_adapters
    from bam_lora.recipe import Recipe as Recipe
    from bam_lora.recipe import load_recipe as load_recipe
    from bam_lora.trainer import BamTrainer as BamTrainer

__version__ = "0.1.0"

_HOME = {
    "BamConfig": "bam_lora.bam_config",
    "BamTrainer": "bam_lora.trainer",
    "Ledger": "bam_lora.ledger",
    "Recipe": "bam_lora.recipe",
    "UserError": "bam_lora.errors",
    "answers_only": "bam_lora.chat",
    "export_adapter": "bam_lora.export",
    "fold": "bam_lora.folding",
    "load_recipe": "bam_lora.recipe",
    "merge_adapters": "bam_lora.merged_adapter",
    "run": "bam_lora.loop",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bam_lora' has no attribute {name!r}; it has {', '.join(__all__)}")
    if name in ("run", "BamTrainer"):  # the loop imports libraries that speak up while they are imported
        importlib.import_module("bam_lora.quiet").quiet()
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
