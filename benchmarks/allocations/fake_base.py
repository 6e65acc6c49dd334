"""A base as `load_model` leaves it on a GPU, of fake tensors: quantised layer by layer, so that none is there twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pretended_gpu import real_tensors

_QUANTISATION = {"quant_type": "nf4", "compress_statistics": True}
_STORED = {**_QUANTISATION, "blocksize": 64, "bnb_quantized": True, "quant_storage": torch.uint8}


def fake_base(config: Mapping[str, Any], attention: str | None, bits: int) -> Any:
    """A frozen model on the GPU, in bfloat16 or with its linear layers in NF4, doubly quantised.

    Args:
        config: Its config.json.
        attention: As transformers names it; None: its own choice.
        bits: 16 or 4.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    with real_tensors(), torch.device("meta"):
        options = {} if attention is None else {"attn_implementation": attention}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16, **options)
    head = model.get_output_embeddings()
    made: dict[int, Any] = {}
    for name, module in list(model.named_modules()):
        if bits == 4 and isinstance(module, torch.nn.Linear) and module is not head:
            model.set_submodule(name, _quantised(module))
        else:
            _place(module, made)
    if bits == 4:
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model.config.quantization_config = how
        model.hf_quantizer = AutoHfQuantizer.from_config(how, pre_quantized=False)
        model.is_loaded_in_4bit = model.is_quantized = True
        model.quantization_method = how.quant_method
    model.hf_device_map = {"": 0}
    model.requires_grad_(False)
    return model.eval()


def _place(module: Any, made: dict[int, Any]) -> None:
    """Gives a module's own parameters and buffers a place on the GPU; what is shared stays so."""
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0")
                is_weight = isinstance(tensor, torch.nn.Parameter)
                made[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if is_weight else empty
            tensors[name] = made[id(tensor)]


def _quantised(linear: Any) -> Any:
    """A 4-bit layer. Its weight is a plain parameter with bitsandbytes' attributes: `Params4bit` takes no fake ones."""
    import bitsandbytes as bnb

    sizes = (linear.in_features, linear.out_features)
    with real_tensors():
        layer = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, device="meta", **_QUANTISATION)
    whole = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device="cuda:0")
    codes, state = bnb.functional.quantize_4bit(whole, blocksize=64, **_QUANTISATION)
    weight = torch.nn.Parameter(codes, requires_grad=False)
    vars(weight).update(_STORED, quant_state=state)
    layer._parameters["weight"], layer.quant_state = weight, state
    if linear.bias is not None:
        empty = torch.empty(linear.bias.shape, dtype=torch.bfloat16, device="cuda:0")
        layer._parameters["bias"] = torch.nn.Parameter(empty, requires_grad=False)
    return layer
