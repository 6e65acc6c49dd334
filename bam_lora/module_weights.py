"""Branch weights by pattern: other weights for the weights whose name a regular expression finds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bam_lora.errors import UserError
from bam_lora.merge_weights import resolve_weights


def resolve_by_module(
    by_module: Mapping[str, str | Sequence[float]], branches: int, tokens: Sequence[float], scale: float
) -> dict[str, list[float]]:
    """`resolve_weights` for every pattern, in their order.

    Raises:
        UserError: If the weights of one do not fit or give nothing.
    """
    return {pattern: resolve_weights(wanted, branches, tokens, scale) for pattern, wanted in by_module.items()}


def weights_by_name(names: Iterable[str], by_module: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """The weights of every name that a pattern finds (`re.search`), by the first that does; others are left out."""
    found = {}
    for name in names:
        for pattern, weights in by_module.items():
            if re.search(pattern, name):
                found[name] = weights
                break
    return found


def require_patterns(folder: Path, target_modules: str | Sequence[str], patterns: Iterable[str]) -> None:
    """Checks, before anything is trained, that every pattern finds a weight that gets an adapter.

    Args:
        folder: The base's folder.
        target_modules: `lora.target_modules`.
        patterns: Regular expressions for the names of the model's parameters.

    Raises:
        UserError: Naming the first pattern that finds none.
    """
    wanted = list(patterns)
    if not wanted:
        return
    names = _adapted(folder, target_modules)
    for pattern in wanted:
        if not any(re.search(pattern, name) for name in names):
            raise UserError.of(
                f"bam.merge.weights_by_module {pattern!r}",
                expected=f"a pattern that finds a weight with an adapter, such as {names[0]}" if names else "adapters",
                found="no match",
                remedy="Change the pattern, or leave it out",
            )


def _adapted(folder: Path, target_modules: str | Sequence[str]) -> list[str]:
    """Names of the weights that get an adapter, from the model without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    head = model.get_output_embeddings()
    modules = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
    if not isinstance(target_modules, str):
        modules = [name for name in modules if any(f".{name}".endswith(f".{target}") for target in target_modules)]
    return [f"{name}.weight" for name in modules]
