"""What memory is estimated from, against independent counts: real models, real quantised weights, real state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import DENSE, EXPERTS

from bam_lora import memory, memory_activations, memory_parts, packed_attention
from bam_lora.base import Loading, load_model
from bam_lora.front import Front
from bam_lora.memory_adapter import adapter_numbers
from bam_lora.memory_shape import BaseShape, shape_of_config, shape_of_folder
from bam_lora.recipe import Recipe, recipe_from_dict

KINDS = {name: values for name, values in {**DENSE, **EXPERTS}.items() if name != "qwen3_5_moe"}  # of 35 B here
WIDE = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
        "pad_token_id": 0}  # fmt: skip
TOKENS = 512


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {"base": "org/model", "output": "run", "data": {"target": [{"path": "org/text"}]}}
    return recipe_from_dict({**values, **changes})


def small(kind: str, values: dict[str, Any]) -> tuple[BaseShape, Any]:
    config = transformers.AutoConfig.for_model(kind, **values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return shape_of_config({"model_type": kind, **values}, kind), model


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_counts_every_number_of_a_model(kind: str) -> None:
    shape, model = small(kind, KINDS[kind])
    assert shape.parameters == model.num_parameters()
    assert (shape.experts > 0) == (kind in EXPERTS)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT, of GPT-2
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")  # PEFT, of patterns that it adds for experts
@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        *((kind, {}) for kind in KINDS),
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}}),
        ("qwen3", {"dora": True}),
        ("mistral", {"exclude_modules": ["gate_proj"]}),
        ("gpt2", {"target_modules": ["c_attn"]}),
    ],
)
def test_the_adapter_is_counted_as_peft_puts_it_on(kind: str, lora: dict[str, Any]) -> None:
    from peft import get_peft_model

    shape, model = small(kind, KINDS[kind])
    wanted = recipe(lora={"r": 4, **lora})
    with torch.device("meta"):
        adapted = get_peft_model(model, Front(wanted).adapter_config())
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert adapter_numbers(wanted, shape) == trained


def test_embeddings_that_are_trained_count() -> None:
    shape, _ = small("llama", KINDS["llama"])
    plain = adapter_numbers(recipe(), shape)
    whole = adapter_numbers(recipe(lora={"modules_to_save": ["embed_tokens"]}), shape)
    rows = adapter_numbers(recipe(lora={"trainable_token_indices": [1, 2, 3]}), shape)
    new = adapter_numbers(recipe(vocabulary={"tokens": 10}), shape)
    assert (whole - plain, rows - plain, new - plain) == (96 * 32, 3 * 32, 10 * 32)


@pytest.mark.parametrize("double", [True, False])
def test_four_bit_weights_take_what_bitsandbytes_holds(tiny_base: Path, double: bool) -> None:
    import bitsandbytes as bnb

    shape = shape_of_folder(tiny_base)
    model = load_model(tiny_base, Loading(4, double=double))
    held = quantised = other = 0
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors = [module.weight.data, state.absmax, *([state.state2.absmax] if double else [])]
            held += sum(one.numel() * one.element_size() for one in tensors)
            quantised += state.shape.numel()
    for name, parameter in model.named_parameters():
        other += 0 if type(parameter).__name__ == "Params4bit" else parameter.numel() * parameter.element_size()
        assert name
    assert quantised == shape.quantised
    assert memory_parts.four_bit_bytes(shape.quantised, double) == pytest.approx(held, rel=0.01)
    parts = {one.name: one.bytes for one in memory_parts.weights(shape, 4, double, 2)}
    assert parts["unquantised weights"] == other


def _adafactor(parameters: Any) -> Any:
    return transformers.optimization.Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False)


@pytest.mark.parametrize(
    ("optim", "make"),
    [
        ("adamw_torch_fused", lambda given: torch.optim.AdamW(given)),
        ("sgd", lambda given: torch.optim.SGD(given, lr=1e-3)),
        ("adagrad", lambda given: torch.optim.Adagrad(given)),
        ("adafactor", _adafactor),
    ],
)
def test_the_optimizer_holds_what_is_said(optim: str, make: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(512, 256))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter])
    optimizer.step()
    tensors = [one for state in optimizer.state.values() for one in state.values() if isinstance(one, torch.Tensor)]
    held = sum(one.numel() * one.element_size() for one in tensors) / parameter.numel()
    assert memory_parts.state_bytes(optim) == pytest.approx(held, abs=0.05)


def test_eight_bit_state_is_a_byte_a_moment() -> None:
    assert (
        memory_parts.state_bytes("paged_adamw_8bit")
        == memory_parts.state_bytes("adamw_bnb_8bit")
        == pytest.approx(2.03, abs=0.01)
    )
    assert memory_parts.state_bytes("lion_8bit") == pytest.approx(1.016, abs=0.01)
    assert memory_parts.state_bytes("paged_adamw_32bit") == 8


def saved_bytes(kind: str, checkpointing: bool, attention: str = "sdpa") -> int:
    """What autograd keeps of one packed batch through the layers of a small adapted model, parameters left out."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    packed_attention.register()
    config = transformers.AutoConfig.for_model(kind, **WIDE)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = get_peft_model(model.bfloat16(), LoraConfig(r=8, target_modules="all-linear"), autocast_adapter_dtype=False)
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    places = torch.arange(TOKENS // 2).repeat(2)[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.base_model.model.model(input_ids=torch.ones(1, TOKENS, dtype=torch.long), position_ids=places,
                                     use_cache=False)  # fmt: skip
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "packed"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_activations_are_those_that_autograd_keeps(kind: str, attention: str) -> None:
    shape = shape_of_config({"model_type": kind, **WIDE}, kind)
    work = memory_activations.Work(TOKENS, False, attention, 2, 8, False, "cpu")
    assert memory_activations.stored_bytes(work, shape) == pytest.approx(saved_bytes(kind, False, attention), rel=0.15)


def test_a_mask_costs_the_square_of_a_batch_and_documents_one_by_one_none() -> None:
    shape, _ = small("llama", KINDS["llama"])

    def stored(tokens: int, attention: str) -> int:
        work = memory_activations.Work(tokens, True, attention, 2, 8, False, "cuda")
        return memory_activations.stored_bytes(work, shape)

    for kind in ("flash_attention_2", "packed"):
        assert stored(2000, kind) == 2 * stored(1000, kind)
    assert stored(2000, "sdpa") - 2 * stored(1000, "sdpa") == 2000**2 - 2 * 1000**2
    assert memory_activations.attention_square_bytes(
        memory_activations.Work(100, False, "eager", 2, 8, False, "cuda"), shape
    ) == 100**2 * shape.heads * 6  # fmt: skip


def test_experts_are_said_not_to_be_quantised() -> None:
    shape, _ = small("qwen3_moe", KINDS["qwen3_moe"])
    parts = {one.name: one for one in memory_parts.weights(shape, 4, True, 2)}
    assert parts["experts"].bytes == 2 * shape.experts
    assert "does not quantise" in parts["experts"].reason


def test_the_estimate_survives_json_and_names_what_is_largest() -> None:
    shape, _ = small("llama", KINDS["llama"])
    found = memory.estimate(recipe(), shape, attention=None)
    assert memory.from_json(found.to_json()) == found
    assert found.largest.name == "GPU context"
    assert found.peak_bytes == max(memory_parts.total(found.training), memory_parts.total(found.scoring))


def test_a_config_that_transformers_does_not_know_is_named() -> None:
    with pytest.raises(Exception, match=r"config of org/model: expected a causal language model .* knows, found"):
        shape_of_config({"model_type": "no_such_model"}, "org/model")


def test_without_triton_the_loss_works_on_its_tiles_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_parts, "_tiled_loss", lambda: True)
    config = {"model_type": "llama", **DENSE["llama"], "vocab_size": 65536}
    shape = shape_of_config(config, "llama")
    wanted = recipe(data={"target": [{"path": "t"}], "sequence_length": 512})
    work = memory_parts.work_of(wanted, shape, attention="packed", device="cuda")
    tile = min(work.tokens, 4096) * 32768
    with_triton = memory_parts.logits(work, shape).bytes
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr(memory_parts.importlib.util, "find_spec", lambda name: None)
    # The tile in bfloat16, and in fp32 seven copies and a mask at the peak of TRL's backward pass.
    assert memory_parts.logits(work, shape).bytes - with_triton == tile * (7 * 4 + 1)


@pytest.mark.parametrize("dropout", [False, True])
def test_fused_kernels_keep_what_goes_into_norms_and_gates(dropout: bool) -> None:
    """Llama's widths: a norm's input in bfloat16 in place of fp32, and no activation beside gate and up."""
    shape = shape_of_config({"model_type": "llama", **DENSE["llama"]}, "llama")
    work = memory_activations.Work(64, False, "packed", 2, 8, dropout, "cuda")
    fused = memory_activations.Work(64, False, "packed", 2, 8, dropout, "cuda", fused=True)
    saved = 2 * 2 * shape.hidden + 2 * shape.intermediate
    assert memory_activations.layer_bytes(work, shape) - memory_activations.layer_bytes(fused, shape) == 64 * saved
