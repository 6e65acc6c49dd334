"""A package that patches a Llama where liger-kernel does, with plain arithmetic, and counts who goes through it."""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

NAMES = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")


def install(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Puts it in the place of liger-kernel, and returns what it counts."""
    calls: Counter[str] = Counter()
    own = {name: getattr(modeling_llama, name) for name in NAMES}
    norm, entropy = own["LlamaRMSNorm"], torch.nn.functional.cross_entropy

    def rotate(*args: Any, **given: Any) -> Any:
        calls["rope"] += 1
        return own["apply_rotary_pos_emb"](*args, **given)

    def normed(self: Any, hidden_states: Any) -> Any:
        calls["norm"] += 1
        return norm.forward(self, hidden_states)

    class LigerRMSNorm(norm):  # type: ignore[misc]
        pass

    class LigerSwiGLUMLP(own["LlamaMLP"]):  # type: ignore[misc]
        pass

    def liger_cross_entropy(*args: Any, **given: Any) -> Any:
        calls["entropy"] += 1
        return entropy(*args, **given)

    for one in (rotate, normed, LigerRMSNorm, LigerSwiGLUMLP, liger_cross_entropy):
        one.__module__ = "liger_kernel.stand_in"

    def apply(model: Any, cross_entropy: bool = True, fused_linear_cross_entropy: bool = True) -> None:
        calls["models"] += 1
        assert not fused_linear_cross_entropy
        if model.config.model_type != "llama":
            return  # as liger does, but for a line in its log
        for name, new in zip(NAMES, (rotate, LigerRMSNorm, LigerSwiGLUMLP), strict=True):
            setattr(modeling_llama, name, new)
        if cross_entropy:
            torch.nn.functional.cross_entropy = liger_cross_entropy
        for layer in model.model.layers:
            layer.input_layernorm.__dict__["forward"] = normed.__get__(layer.input_layernorm)

    package, inner = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    inner._apply_liger_kernel_to_instance = apply  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    return calls


def untouched() -> bool:
    """Whether transformers and torch are as they were."""
    names = [getattr(modeling_llama, name) for name in NAMES]
    return not any("liger" in one.__module__ for one in (*names, torch.nn.functional.cross_entropy))
