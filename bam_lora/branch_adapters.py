"""What a branch trains besides LoRA's factors begins exactly as the base has it, in fp32, and apart from the base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from bam_lora.adapter_entries import PREFIX
from bam_lora.errors import UserError


def settle_adapter(model: Any, base: Any) -> str | None:
    """Makes all that a PEFT model trains fp32 of its own, where it begins put right.

    TRL casts the adapter of a quantised base to bf16: small updates would be lost there, and a resumed adapter is
    fp32. What is not zero at the start (whole modules, token rows) has then been rounded and is copied again.

    Args:
        model: The adapted model, a view of the base.
        base: The base itself, which must not see any of the training.

    Returns:
        The type, such as "bfloat16", of the base's weights that are trained whole or by rows, or None.

    Raises:
        UserError: If they are of different types.
    """
    from peft.utils.other import TrainableTokensWrapper
    from torch import nn

    originals = dict(base.named_parameters())
    shared = {id(parameter) for parameter in originals.values()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert id(parameter) not in shared, "a branch trains a tensor of its base in place"
            parameter.data = parameter.data.float()
    types = set()
    for name, parameter in model.named_parameters():
        plain = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        if parameter.requires_grad and plain in originals:  # a bias
            parameter.data.copy_(originals[plain])
            types.add(_type_of(originals[plain]))
    for _, layer in _dora_layers(model):
        next(iter(layer.lora_magnitude_vector.values())).weight.data.copy_(_norms_o(layer))
    for module in model.modules():
        for trained, original in _beginnings(module):
            assert isinstance(trained, nn.Parameter), type(trained)
            trained.data.copy_(original)
            types.add(_type_of(original))
        if isinstance(module, TrainableTokensWrapper) and isinstance(module.original_module, nn.Linear):
            # A tied output head: TRL's loss asks it for `weight`, which the wrapper answers with the trained rows, and
            # for `bias`, of which it does not know. Past nn.Module, which would list a bias as the wrapper's own.
            vars(module)["bias"] = module.original_module.bias
    if len(types) > 1:
        raise UserError.of(
            "weights that are trained whole",
            expected="one type of all of them in the loaded base",
            found=" and ".join(sorted(types)),
            remedy="Train fewer kinds of modules whole, or load the base in float32",
        )
    return next(iter(types), None)


def _type_of(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dora_layers(model: Any) -> list[tuple[str, Any]]:
    """(name of its module, layer) of every layer with DoRA."""
    from peft.tuners.lora.layer import LoraLayer

    named = ((name.removeprefix(PREFIX), module) for name, module in model.named_modules())
    return [(name, module) for name, module in named if isinstance(module, LoraLayer) and module.lora_magnitude_vector]


def _norms_o(layer: Any) -> Any:
    """The norms of the rows of base plus delta, which DoRA divides by, in float64, as the layer holds it."""
    from peft.utils.integrations import dequantize_module_weight

    (adapter,) = layer.lora_magnitude_vector
    weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
    W_oi = weight.T if layer.fan_in_fan_out else weight
    B_or, A_ri = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
    directed = W_oi + layer.scaling[adapter] * (B_or @ A_ri)
    return (directed.cpu() if directed.device.type == "mps" else directed).double().norm(dim=1)  # no float64 there


def dora_scales(model: Any) -> dict[str, Any]:
    """{weight: (o,) in fp32: what DoRA multiplies each of its rows by}, on the CPU; empty for other adapters.

    The base that is folded into is not the one that was trained on, which may be quantised: its norms are others.
    """
    result = {}
    for name, layer in _dora_layers(model):
        (magnitude,) = layer.lora_magnitude_vector.values()
        result[f"{name}.weight"] = (magnitude.weight.detach().cpu().double() / _norms_o(layer).cpu()).float()
    return result


def _beginnings(module: Any) -> list[tuple[Any, Any]]:
    """(what is trained, the base's values that it begins as) of a module that PEFT has wrapped."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        originals = dict(module.original_module.named_parameters())
        copies = module.modules_to_save.values()
        return [(value, originals[name]) for copy in copies for name, value in copy.named_parameters()]
    if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
        weight = module.get_base_layer().weight
        return [(rows, weight[module.token_indices[key]]) for key, rows in module.trainable_tokens_delta.items()]
    return []


@contextlib.contextmanager
def no_input_casting(trainer: Any) -> Iterator[None]:
    """Keeps PEFT from casting every layer's input to the adapter's fp32 where autocast casts it straight back.

    PEFT leaves it be where it sees autocast, but asks about CUDA's only; on a CPU the two casts cost a tenth of a step.
    A cast to fp32 and back changes no bit; but dropout between the two does, so with dropout they stay. PEFT's own
    `disable_input_dtype_casting` fails on layers of token rows.
    """
    switch = "cast_input_dtype_enabled"
    dropout = any(config.lora_dropout for config in trainer.model.peft_config.values())
    active = (trainer.args.bf16 or trainer.args.fp16) and not dropout
    layers = [module for module in trainer.model.modules() if active and getattr(module, switch, False)]
    for layer in layers:
        setattr(layer, switch, False)
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer, switch, True)
