"""The shape of a base as far as memory goes by it: which weights are quantised, how wide what flows through is.

It is read from the model as transformers builds it of the config alone, on the meta device: nothing is downloaded or
allocated, and names and sizes are those that are trained, not those of the files.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.attention import FLASH_HEAD_DIM, packs, require_attention
from bam_lora.documents_apart import is_hybrid
from bam_lora.errors import UserError, first_line
from bam_lora.parameter_names import with_floats

_BYTES = {"float32": 4, "float64": 8, "float8_e4m3fn": 1}


@dataclass(frozen=True)
class Linear:
    """A linear layer, or a stack of `count` experts in one parameter: `rows` outputs, `columns` inputs each."""

    name: str
    rows: int
    columns: int
    count: int = 1

    @property
    def numbers(self) -> int:
        """Numbers in its weight."""
        return self.count * self.rows * self.columns


@dataclass(frozen=True)
class BaseShape:
    """What memory depends on.

    Attributes:
        kind: Its `model_type`.
        linears: Layers that 4 and 8 bits quantise.
        fused: Experts held in one parameter each, which bitsandbytes leaves as they are.
        expert_unit: Numbers that an adapter of rank 1 on `all-linear` trains in experts and their routers.
        embeddings: Numbers in the input embedding and, where it is not tied to it, the output head.
        others: Numbers in all else: norms, biases, convolutions.
        layers: Decoder layers.
        hidden: Width of the residual stream.
        heads: Of the queries.
        kv_heads: Of keys and values.
        head_dim: Width of a head.
        intermediate: Width between the halves of an MLP, over all experts a token goes through.
        experts_per_token: 0 without experts.
        vocabulary: Rows of the embedding.
        tied: Whether the output head is the embedding.
        norms: Norms of the residual stream in a decoder layer.
        head_norms: Whether queries and keys are normalised, too.
        context: Tokens in its context, or None.
        stored_dtype_bytes: Bytes of a number in its files.
        flash: Whether flash attention has a kernel for it.
        packed: Whether `packed` has.
        hybrid: Whether some layers carry a state from token to token (`documents_apart`).
    """

    kind: str
    linears: tuple[Linear, ...]
    fused: tuple[Linear, ...]
    expert_unit: int
    embeddings: int
    others: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts_per_token: int
    vocabulary: int
    tied: bool
    norms: int
    head_norms: bool
    context: int | None
    stored_dtype_bytes: int
    flash: bool
    packed: bool
    hybrid: bool

    @property
    def quantised(self) -> int:
        """Numbers that 4 and 8 bits quantise."""
        return sum(one.numbers for one in self.linears)

    @property
    def experts(self) -> int:
        """Numbers in fused experts."""
        return sum(one.numbers for one in self.fused)

    @property
    def parameters(self) -> int:
        """All numbers."""
        return self.quantised + self.experts + self.embeddings + self.others

    @property
    def stored_bytes(self) -> int:
        """About the size of its weight files."""
        return self.parameters * self.stored_dtype_bytes

    @property
    def largest_linear(self) -> int:
        """Numbers in the largest quantised layer."""
        return max((one.numbers for one in self.linears), default=0)


def shape_of_folder(folder: Path) -> BaseShape:
    """The shape of the model in a folder, by its config.json."""
    return shape_of_config(json.loads((folder / "config.json").read_text(encoding="utf-8")), str(folder))


def shape_of_config(config: Mapping[str, Any], name: str) -> BaseShape:
    """The shape of a base.

    Args:
        config: What its config.json holds.
        name: What errors call it.

    Raises:
        UserError: If transformers knows no causal language model of this kind, or it has no attention.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        require_attention(config, name)
        settings = CONFIG_MAPPING[config["model_type"]].from_dict(with_floats(dict(config)))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except UserError:
        raise
    except Exception as error:  # configs come from anywhere, and every architecture fails in its own way
        raise UserError.of(
            f"config of {name}",
            expected="a causal language model that transformers knows",
            found=f"{type(error).__name__}: {first_line(error)}",
            remedy="Check the base, or install a newer transformers",
        ) from error
    return _shape_of_model(model, _BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2))


def _shape_of_model(model: Any, stored_dtype_bytes: int) -> BaseShape:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linears = tuple(
        Linear(name, *((module.out_features, module.in_features) if isinstance(module, nn.Linear) else
                       (module.nf, module.nx)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    )  # fmt: skip
    known = {f"{one.name}.weight" for one in linears}
    owners = [id(module.weight) for module in (embedding, head) if module is not None]
    fused: list[Linear] = []
    embeddings = others = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in owners:
            embeddings += parameter.numel()
        elif parameter.dim() == 3 and "expert" in name:
            fused.append(Linear(name, parameter.shape[1], parameter.shape[2], parameter.shape[0]))
        elif name not in known:
            others += parameter.numel()
    config = model.config.get_text_config()
    heads = _number(config, "num_attention_heads")
    hidden = _number(config, "hidden_size")
    layers = _number(config, "num_hidden_layers")
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    norms, head_norms = _norms(model, hidden, layers)
    chosen = int(getattr(config, "num_experts_per_tok", None) or 0) if fused else 0
    context = getattr(config, "max_position_embeddings", None)
    return BaseShape(
        kind=str(config.model_type),
        linears=linears,
        fused=tuple(fused),
        expert_unit=_expert_unit(model, linears) if fused else 0,
        embeddings=embeddings,
        others=others,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=head_dim,
        intermediate=_intermediate(config, linears, fused, hidden, layers, chosen),
        experts_per_token=chosen,
        vocabulary=embedding.weight.shape[0],
        tied=head is not None and head.weight is embedding.weight,
        norms=norms,
        head_norms=head_norms,
        context=int(context) if context else None,
        stored_dtype_bytes=stored_dtype_bytes,
        flash=bool(getattr(type(model), "_supports_flash_attn", False)) and head_dim <= FLASH_HEAD_DIM,
        packed=packs(model.config),
        hybrid=is_hybrid(model),
    )


def _expert_unit(model: Any, linears: tuple[Linear, ...]) -> int:
    """Asks PEFT, which adapts the experts of some families and not of others; the model is of no use afterwards."""
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns that its own conversion adds
        adapted = get_peft_model(model, LoraConfig(r=1, target_modules="all-linear"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    return int(trained) - sum(one.rows + one.columns for one in linears)


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)  # the config's attribute map answers to GPT-2's own names, too
    if not isinstance(value, int) or value < 1:
        raise UserError.of(
            f"config of a {config.model_type} model",
            expected=f"{name}, which memory is estimated from",
            found=repr(value),
            remedy="Without an estimate there is no check; bam-lora run RECIPE does without one",
        )
    return value


def _norms(model: Any, hidden: int, layers: int) -> tuple[int, bool]:
    """Norms of the residual stream in a decoder layer, and whether heads are normalised."""
    sizes = [
        (name, parameter.numel())
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and name.endswith("weight") and ("norm" in name or ".ln_" in name)
        if "vision" not in name
    ]
    wide = sum(size == hidden and not name.endswith(("q_norm.weight", "k_norm.weight")) for name, size in sizes)
    return max(1, wide // layers), any(name.endswith("q_norm.weight") for name, _ in sizes)


def _intermediate(config: Any, linears: Any, fused: Any, hidden: int, layers: int, chosen: int) -> int:
    """Width inside the MLP of one token: of all the experts it goes through, and of those that all go through."""
    if chosen:
        width = int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
        shared = int(getattr(config, "shared_expert_intermediate_size", None) or 0)
        return chosen * width + shared
    stated = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    if isinstance(stated, int):
        return stated
    into = [one.columns for one in linears if one.rows == hidden]  # the widest layer back into the stream
    return max(into, default=4 * hidden)
