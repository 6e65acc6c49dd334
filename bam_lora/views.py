"""Many models on one set of quantised tensors: a view for every branch, and for every adapter that is scored.

Also what makes a loaded model fit for that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def keep_cpu_kernel_differentiable(model: Any) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    Its `Linear4bit` repacks them at the first forward in evaluation mode, and training afterwards goes through a
    kernel without autograd: gradients are wrong, with no more than a warning. There is no public switch.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def settle_8bit_state(model: Any) -> None:
    """Has 8-bit layers move their codes and scales to where every view shares them.

    `Linear8bitLt` does so at its first forward, by emptying its weight: the next view would find nothing there.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt) and module.weight.CB is not None:
            module.init_8bit_state()


def assert_not_repacked(model: Any) -> None:
    """Asserts that no 4-bit weight went through the repacking that breaks training on the CPU."""
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        assert not getattr(state, "packing_format_for_cpu", False), f"{name} was repacked for inference"


def branch_view(model: Any) -> Any:
    """A model whose modules are new but whose tensors are the given model's own.

    What a trainer does to it (adapters, hooks, a patched forward, flags, config) is gone when it is dropped, and the
    base serves the next branch as if it had just been loaded. Costs no memory for weights but the biases, which are
    copied: PEFT trains and loads them in place.
    """
    import torch

    own = {id(one) for name, one in model.named_parameters() if "bias" in name and one.is_floating_point()}
    shared: dict[int, Any] = {}
    for module in model.modules():
        for value in (*module.__dict__.values(), *module._parameters.values(), *module._buffers.values()):
            for item in (value, getattr(value, "quant_state", None), *_codes(value)):
                if id(item) not in own and (isinstance(item, torch.Tensor) or type(item).__name__ == "QuantState"):
                    shared[id(item)] = item
    view = copy.deepcopy(model, shared)
    view.requires_grad_(False)
    return view


def with_weights(model: Any, values: Mapping[str, Any], same: Mapping[str, str]) -> Any:
    """A view of a model with other values in some of its weights.

    Args:
        model: The model; it is left as it was.
        values: {parameter's name: its tensor}, of weights that are not quantised.
        same: {parameter's name: the one in `values` that it shares}.
    """
    import torch

    view = branch_view(model)
    for name, value in values.items():
        old = view.get_parameter(name)
        new = torch.nn.Parameter(value.to(old.device, old.dtype), requires_grad=False)
        for one in (name, *(twin for twin, other in same.items() if other == name)):
            module, _, leaf = one.rpartition(".")
            setattr(view.get_submodule(module), leaf, new)
    return view


def _codes(value: Any) -> tuple[Any, Any]:
    """Codes and scales of an 8-bit layer's state."""
    return getattr(value, "CB", None), getattr(value, "SCB", None)


@contextmanager
def adapted(model: Any, adapter: Path | None) -> Iterator[Any]:
    """The model itself, or a view of it with an adapter from disk, for as long as the context lasts."""
    if adapter is None:
        yield model
        return
    from peft import PeftModel

    yield PeftModel.from_pretrained(branch_view(model), str(adapter)).eval()


def count_linear_modules(model: Any) -> dict[str, int]:
    """How many linear layers are 4-bit, 8-bit and not quantised (the output head is among the last)."""
    import bitsandbytes as bnb
    import torch

    counts = {"4bit": 0, "8bit": 0, "unquantised": 0}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            counts["4bit"] += 1
        elif isinstance(module, bnb.nn.Linear8bitLt):
            counts["8bit"] += 1
        elif isinstance(module, torch.nn.Linear):
            counts["unquantised"] += 1
    return counts
