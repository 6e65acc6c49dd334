"""The decoder layers of a branch's model compiled by torch, one after another, and attention left out of it.

Layers are alike, so the code of the first serves all. They are compiled in place: no module gets another name, and an
adapter is saved as it always is. Attention over packed rows goes by the lengths of the documents, which change with
every batch: compiled with it, a layer would be compiled anew for each until torch gives up.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from os import environ
from typing import Any

from bam_lora.attention import BY_DOCUMENT
from bam_lora.errors import UserError, first_line

# Kinds whose compiled layers were held against the same layers as they are (docs/log.md).
COMPILED_MODELS = frozenset(
    {
        "apertus", "arcee", "gemma", "gemma3_text", "glm4", "granite", "llama", "ministral", "mistral", "olmo2",
        "olmo3", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2",
    }
)  # fmt: skip


def compiler_lacks(device: str) -> str | None:
    """What torch wants for compiling, and is not there."""
    if device.startswith("cuda"):
        return "no triton" if find_spec("triton") is None else None
    compiler = environ.get("CXX", "g++")
    return f"no {compiler}" if shutil.which(compiler) is None else None


@contextmanager
def compiled_layers(model: Any) -> Iterator[None]:
    """Has the decoder layers of a model compiled when they are first used.

    Args:
        model: A branch's model, under its adapter's wrapper; its layers stay compiled.

    Raises:
        UserError: If the compiler fails.
    """
    import torch
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError

    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    assert layers, type(model).__name__
    for layer in layers:
        # At once for any number of tokens: else a resumed branch, which may begin with a shorter row, has other code.
        layer.compile(dynamic=True)
    try:
        with _attention_apart(model.config._attn_implementation):
            yield
    except (TorchDynamoException, CppCompileError) as error:
        raise UserError.of(
            "training.kernels: compile",
            expected="layers that torch can compile",
            found=f"{type(error).__name__}: {first_line(error)}",
            remedy="Leave it at auto",
        ) from error
    finally:
        torch.compiler.reset()  # it counts how often it compiled a layer, of all models of the process


@contextmanager
def _attention_apart(name: str) -> Iterator[None]:
    """Leaves a kind of attention that goes by documents out of what is compiled."""
    import torch
    from transformers import AttentionInterface

    if name not in BY_DOCUMENT:
        yield
        return
    own = AttentionInterface()[name]
    AttentionInterface.register(name, torch.compiler.disable(own))
    try:
        yield
    finally:
        AttentionInterface.register(name, own)
