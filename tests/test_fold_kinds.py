"""Every kind of LoRA adapter on real architectures made small: the folded model against PEFT's own, unmerged."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from bam_lora.errors import UserError
from bam_lora.folding import fold

# What PEFT says of tied, adapted or resized embeddings and of the shapes of biases is what these tests are about.
pytestmark = [
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
}
KINDS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "rslora": {**LINEAR, "use_rslora": True},
    "patterns": {**LINEAR, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.o_proj": 32}},
    "dora": {**LINEAR, "use_dora": True},
    "lora-bias": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "bias-all": {"target_modules": ["q_proj", "k_proj"], "bias": "all"},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "embeddings-dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both-ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "saved-embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved-tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 59]},
    "experts": FUSED,
    "one-of-the-experts": {**FUSED, "target_parameters": ["mlp.experts.down_proj"]},
    "conv1d": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "conv1d-dora": {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True, "use_dora": True},
    "neox-bias": {"target_modules": ["query_key_value", "dense"], "lora_bias": True},
    "vision-language": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
}
CASES = [
    *[(architecture, "linear") for architecture in ARCHITECTURES if architecture not in ("gpt2", "mixtral")],
    *[("llama", kind) for kind in ("rslora", "patterns", "dora", "embeddings", "embeddings-dora", "head", "both-ends")],
    *[("llama", kind) for kind in ("saved", "saved-embeddings", "tokens")],
    *[("llama-tied", kind) for kind in ("embeddings", "head", "both-ends", "saved-embeddings", "saved-tied", "tokens")],
    *[("qwen2", kind) for kind in ("lora-bias", "bias-all", "dora")],
    ("gpt2", "conv1d"), ("gpt2", "conv1d-dora"), ("gpt-neox", "neox-bias"), ("phi3", "dora"),
    ("mixtral", "experts"), ("qwen3-moe", "experts"), ("qwen3-moe", "one-of-the-experts"), ("gpt-oss", "experts"),
    ("gemma3-vision", "vision-language"), ("gemma3", "saved"), ("qwen3", "embeddings"),
]  # fmt: skip


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
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter)
            parameter.data = parameter.data * (1 + 0.1 * noise) if "magnitude" in name else parameter.data + 0.1 * noise
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


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_the_folded_model_is_the_adapted_one(tmp_path: Path, architecture: str, kind: str) -> None:
    config = ARCHITECTURES[architecture]()
    model = make_model(config)
    model.save_pretrained(tmp_path / "base")
    base = logits(model)
    adapted = train(model, 1, **KINDS[kind])
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", any_base=True, verify=True)
    assert_same_effect(logits(load(tmp_path / "out", config)), expected, base)


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    for tied in (False, True):
        config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
        model = make_model(config)
        model.save_pretrained(tmp_path / "base")
        model.resize_token_embeddings(67)
        base = logits(model, 67)
        adapted = train(model, 1, target_modules=["q_proj"])
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        expected = logits(adapted, 67)
        fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", any_base=True)
        folded = load(tmp_path / "out", config)
        assert folded.config.vocab_size == 67
        assert folded.config.tie_word_embeddings == tied
        assert_same_effect(logits(folded, 67), expected, base)
        with pytest.raises(UserError, match=r"vocabulary was resized: expected a sum of 1 .*found 0.5"):
            fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "half", any_base=True, weights=[0.5])


def test_adapted_tied_embeddings_are_untied_and_untouched_ones_stay_tied(tmp_path: Path) -> None:
    config = ARCHITECTURES["llama-tied"]()
    model = make_model(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    embedding = model.model.embed_tokens.weight.detach().clone()
    for kind, tied in (("head", False), ("linear", True), ("tokens", True), ("saved-tied", True)):
        train(copy.deepcopy(model), 1, **KINDS[kind]).save_pretrained(tmp_path / kind)
        fold(tmp_path / "base", [tmp_path / kind], tmp_path / f"{kind}-out", any_base=True, dtype="float32")
        index = json.loads((tmp_path / f"{kind}-out" / "model.safetensors.index.json").read_text())
        assert ("lm_head.weight" in index["weight_map"]) is not tied
        sizes = [path.stat().st_size for path in (tmp_path / f"{kind}-out").glob("*.safetensors")]
        assert 0 <= sum(sizes) - index["metadata"]["total_size"] < 2000 * len(sizes)  # headers
        folded = load(tmp_path / f"{kind}-out", config)
        assert folded.config.tie_word_embeddings is tied
        assert torch.equal(folded.model.embed_tokens.weight, embedding) is (kind in ("head", "linear"))
    changed = (folded.model.embed_tokens.weight != embedding).any(dim=1).nonzero().flatten().tolist()
    assert changed == list(range(60)), "modules_to_save replaces all of it"
    rows = load(tmp_path / "tokens-out", config).model.embed_tokens.weight
    assert (rows != embedding).any(dim=1).nonzero().flatten().tolist() == [3, 7, 59]


@pytest.mark.parametrize("kind", ["dora", "saved", "tokens", "lora-bias", "bias-all", "embeddings-dora"])
def test_the_mean_of_two_of_a_kind(tmp_path: Path, kind: str) -> None:
    model = make_model(ARCHITECTURES["qwen2"]())
    model.save_pretrained(tmp_path / "base")
    weights = [0.7, 0.3]
    base = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in base.items()}
    for seed, weight in enumerate(weights):
        adapted = train(copy.deepcopy(model), seed, **KINDS[kind])
        adapted.save_pretrained(tmp_path / str(seed))
        for name, value in adapted.merge_and_unload().state_dict().items():
            wanted[name] += weight * (value.double() - base[name].double())
    fold(tmp_path / "base", [tmp_path / "0", tmp_path / "1"], tmp_path / "out", any_base=True, weights=weights)
    folded = load(tmp_path / "out", None).state_dict()
    changed = [name for name, delta in wanted.items() if bool(delta.any())]
    assert changed
    for name in folded:
        found = folded[name].double() - base[name].double()
        if name in changed:
            assert (found - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
        else:
            assert torch.equal(folded[name], base[name]), name


def test_kinds_that_a_method_is_not_defined_for(tmp_path: Path) -> None:
    model = make_model(ARCHITECTURES["llama"]())
    model.save_pretrained(tmp_path / "base")
    for seed in (0, 1):
        train(copy.deepcopy(model), seed, **KINDS["dora"]).save_pretrained(tmp_path / str(seed))
    with pytest.raises(UserError, match=r"merge method 'slerp' on 'model.layers.0.*found DoRA"):
        fold(tmp_path / "base", [tmp_path / "0", tmp_path / "1"], tmp_path / "out", any_base=True, method="slerp")
    assert not (tmp_path / "out").exists()
