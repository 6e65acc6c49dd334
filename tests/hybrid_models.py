"""Tiny bases with random weights some of whose layers carry a state from token to token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_SIZES: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_DELTA = {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_CONV = {"layer_types": ["conv", "full_attention"] * 2}
_GRANITE = {**_MAMBA2, "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_MORE: dict[str, dict[str, Any]] = {
    "jamba": {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 8,
              "expert_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64, "mamba_n_heads": 4},
    "granitemoehybrid": {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid-dense": {**_GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0},
    "qwen3_next": {**_EXPERTS, **_DELTA, **_LINEAR, "linear_num_key_heads": 2, "moe_intermediate_size": 32,
                   "shared_expert_intermediate_size": 32},
    "qwen3_5_text": {**_DELTA, **_LINEAR, "linear_num_key_heads": 2},
    "lfm2": {**_CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_EXPERTS, **_CONV, "moe_intermediate_size": 32, "num_dense_layers": 1},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "mlp"], "mamba_num_heads": 8,
                   "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
    "olmo_hybrid": {**_DELTA, **_LINEAR, "linear_num_key_heads": 4},
    "minimax": {**_LINEAR, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16},
    "zaya": {},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 16, "mamba_headdim": 16,
               "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 16, "num_mem_blocks": 1, "adapter_rank": 4},
}  # fmt: skip
HYBRID_MODELS = {kind: {**_SIZES, **more} for kind, more in _MORE.items()}


def hybrid(kind: str) -> Any:
    """A model of a kind, in fp32."""
    config = transformers.CONFIG_MAPPING[kind.partition("-")[0]](**HYBRID_MODELS[kind])
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float()


def hybrid_base(kind: str, tokenizer: Path, folder: Path) -> Path:
    """The same as a base in bf16, with the tokenizer of another."""
    hybrid(kind).to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
