"""Real architectures made small and PEFT adapters of every kind on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

# What PEFT says of tied, adapted or resized embeddings and of the shapes of biases is what these kinds are about.
PEFT_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{words}")
    for words in (
        ".*save_embedding_layers.*",
        ".*tie_word_embeddings.*",
        ".*LoRA tensor.*invalid shape.*",
        ".*ensure_weight_tying.*",
        ".*_pattern keys did not match.*",
        ".*resiz.*",
    )
]

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SQUARE = {**SIZES, "intermediate_size": 16}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {"target_modules": "all-linear"}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 60,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FUSED = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]}


def vision_language() -> Any:
    text = {"model_type": "gemma3_text", **SIZES, "sliding_window": 16}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES),
    "phi3": lambda: transformers.Phi3Config(**SIZES, tie_word_embeddings=False),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=3),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, tie_word_embeddings=False),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SIZES, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False
    ),
    "gemma3-vision": vision_language,
    # Square experts, whose orientation their shape does not tell: gate_up is 2 · intermediate by hidden.
    "gpt-oss-square": lambda: transformers.GptOssConfig(
        **SQUARE, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False
    ),
    "llama4-square": lambda: transformers.Llama4TextConfig(
        **SQUARE,
        intermediate_size_mlp=32,
        num_local_experts=3,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        attention_chunk_size=16,
        tie_word_embeddings=False,
    ),
    "aria-square": lambda: transformers.AriaTextConfig(
        **SQUARE, moe_num_experts=3, moe_topk=2, moe_num_shared_experts=1, tie_word_embeddings=False
    ),
    # Ties an embedding of an unusual name.
    "mamba": lambda: transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=60, state_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "rslora": {**LINEAR, "use_rslora": True},
    "patterns": {**LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.o_proj": 32}},
    "dora": {**LINEAR, "use_dora": True},
    "lora-bias": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "bias-all": {"target_modules": ["q_proj", "k_proj"], "bias": "all"},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "embeddings-tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "embeddings-dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both-ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "saved-embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved-tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 59]},
    "experts": FUSED,
    "one-of-the-experts": {**FUSED, "target_parameters": ["mlp.experts.down_proj"]},
    "square": {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": ["q_proj"]},
    "square-llama4": {"target_parameters": ["feed_forward.experts.gate_up_proj"], "target_modules": ["q_proj"]},
    "embeddings-mamba": {"target_modules": ["embeddings"]},
    "saved-mamba": {"target_modules": ["in_proj"], "modules_to_save": ["embeddings"]},
    "tokens-and-head": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3, 7, 59]},
    "conv1d": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "conv1d-dora": {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True, "use_dora": True},
    "neox-bias": {"target_modules": ["query_key_value", "dense"], "lora_bias": True},
    "vision-language": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
}


def make_model(config: Any) -> Any:
    torch.manual_seed(0)
    automatic = transformers.AutoModelForImageTextToText if hasattr(config, "vision_config") else None
    model = (automatic or transformers.AutoModelForCausalLM).from_config(config).eval()
    for parameter in model.parameters():  # some initialise with zeros, which hide mistakes
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1)
    return model.float()


def logits(model: Any, vocabulary: int = 60) -> torch.Tensor:
    tokens = torch.randint(3, vocabulary, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return result.double()


def train(model: Any, seed: int, **settings: Any) -> Any:
    """A PEFT model whose trainable tensors are far from where they began: deltas of some 5 to 50 % of the weights."""
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    ).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter)
            # In place, as factors of tied layers share their memory.
            parameter.data.mul_(1 + 0.1 * noise) if "magnitude" in name else parameter.data.add_(0.1 * noise)
    return adapted


def load(folder: Path, config: Any) -> Any:
    vision = hasattr(config, "vision_config")
    automatic = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    model, info = automatic.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def assert_same_effect(folded: torch.Tensor, adapted: torch.Tensor, base: torch.Tensor) -> None:
    effect = (adapted - base).abs().max()
    assert effect > 1e-3, "an adapter that does nothing shows nothing"
    assert (folded - adapted).abs().max() <= 1e-3 * effect
