"""The models of the GPU benchmark: configs of real ones, copied from their `config.json` on the Hub.

Only what decides sizes and speed is here. Time and memory do not depend on the weights' values, which are random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_COMMON: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "dtype": "bfloat16", "attention_dropout": 0.0}


@dataclass(frozen=True)
class Shape:
    """A model to be made.

    Attributes:
        name: What results call it.
        source: Where its config is from.
        date: Day on which that was as it is here.
        parameters: What its model card counts; checked when the model is made. None: nobody has counted.
        config: Its config.json.
    """

    name: str
    source: str
    date: str
    parameters: int | None
    config: dict[str, Any]


def _llama(**others: Any) -> dict[str, Any]:
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
    return {**_COMMON, **kind, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **others}


def _qwen3(**others: Any) -> dict[str, Any]:
    kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}
    sizes = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 32768}
    tokens = {"bos_token_id": 151643, "eos_token_id": 151643}
    rest = {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True}
    return {**_COMMON, **kind, **sizes, **tokens, **rest, **others}


_LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "llama-3.1-8b", "meta-llama/Llama-3.1-8B", "2026-11-21", 8_030_261_248,
            _llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                   num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0,
                   rope_scaling=_LLAMA_ROPE, bos_token_id=128000, eos_token_id=128001),
        ),
        Shape(
            "mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3", "2026-11-21", 7_248_023_552,
            {**_COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
             "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
             "head_dim": 128, "vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None,
             "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "tie_word_embeddings": False, "bos_token_id": 1,
             "eos_token_id": 2},
        ),
        Shape(
            "qwen3-0.6b", "Qwen/Qwen3-0.6B-Base", "2026-11-21", 596_049_920,
            _qwen3(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
        ),
        Shape(
            "qwen3-4b", "Qwen/Qwen3-4B-Base", "2026-11-21", 4_022_468_096,
            _qwen3(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
        ),
        Shape(
            "tiny", "nobody's: for trying the scripts on a CPU", "2026-11-21", None,
            _llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, vocab_size=1024, max_position_embeddings=512, rope_theta=10000.0,
                   bos_token_id=1022, eos_token_id=1023),
        ),
    )
}  # fmt: skip
