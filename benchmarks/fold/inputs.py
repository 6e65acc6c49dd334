"""What the fold benchmark works on: random Llamas of real shapes and two LoRA adapters each; seeded, made once.

Times and memory do not depend on the weights' values, and the rounding error depends on their spread only, which is
that of a trained model: 0.02, and deltas of 1 % of it.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bam_lora.merged_adapter import merge_adapters
from bam_lora.safetensors_stream import write_stream, write_tensors
from bam_lora.store import hash_file, require_space

RANK, ALPHA = 64, 128
WEIGHTS = (0.5, 0.5)
_WEIGHT_STD = 0.02
_RELATIVE_DELTA = 0.01  # of each adapter
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MADE = "made.json"  # written last: what lies beside it is whole


@dataclass(frozen=True)
class Size:
    """The shapes of a Llama."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int


SIZES = {
    "tiny": Size(256, 8, 704, 8, 4, 8192),  # 10 M parameters, for trying
    "1.1b": Size(2048, 22, 5632, 32, 4, 32000),  # TinyLlama's
    "8b": Size(4096, 32, 14336, 32, 8, 128256),  # Llama 3.1's
}


@dataclass(frozen=True)
class Inputs:
    """Folders of one base and its adapters, and what they are."""

    name: str
    base: Path
    adapters: tuple[Path, Path]
    stacked: Path  # both adapters as one, exact, of twice the rank
    facts: dict[str, Any]

    @property
    def base_bytes(self) -> int:
        """The size of the base's folder."""
        return sum(path.stat().st_size for path in self.base.iterdir())


def make_inputs(name: str, work: Path, *, seed: int = 0) -> Inputs:
    """Makes a base and two adapters in `work`, or finds them made."""
    size, root = SIZES[name], work / name
    base, first, second, stacked = (root / part for part in ("base", "adapter-1", "adapter-2", "adapters-stacked"))
    wanted = {"shapes": asdict(size), "rank": RANK, "seed": seed}
    made = root / _MADE
    facts = json.loads(made.read_text()) if made.exists() else {}
    if {key: facts.get(key) for key in wanted} != wanted:
        shutil.rmtree(root, ignore_errors=True)
        print(f"making {root}", flush=True)
        root.mkdir(parents=True, exist_ok=True)
        require_space(root, 2 * _bytes(size), "a random model and what is made of it")
        _write_base(base, size, seed)
        for number, folder in enumerate((first, second), start=1):
            _write_adapter(folder, size, base, seed + number)
        merge_adapters([first, second], stacked, weights=list(WEIGHTS))
        files = [base / "model.safetensors", *(folder / "adapter_model.safetensors" for folder in (first, second))]
        hashes = {str(file.relative_to(root)): hash_file(file) for file in files}
        facts = {**wanted, "bytes": {str(f.relative_to(root)): f.stat().st_size for f in files}, "sha256": hashes}
        made.write_text(json.dumps(facts, indent=2) + "\n")
    return Inputs(name, base, (first, second), stacked, facts)


def linear_shapes(size: Size) -> dict[str, tuple[int, int]]:
    """(o, i) of every linear weight's module, the output head aside, as `all-linear` has it."""
    head = size.hidden // size.heads
    rows = {"q_proj": head * size.heads, "k_proj": head * size.kv_heads, "v_proj": head * size.kv_heads}
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(size.layers):
        for target in _TARGETS:
            part = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            columns = {"down_proj": size.intermediate, "o_proj": head * size.heads}.get(target, size.hidden)
            wide = size.intermediate if target in ("gate_proj", "up_proj") else size.hidden
            shapes[f"model.layers.{layer}.{part}.{target}"] = (rows.get(target, wide), columns)
    return shapes


def _layout(size: Size) -> list[tuple[str, str, tuple[int, ...]]]:
    tensors: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear_shapes(size).items()}
    for name in ("lm_head", "model.embed_tokens"):
        tensors[f"{name}.weight"] = (size.vocabulary, size.hidden)
    for layer in range(size.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = (size.hidden,)
    tensors["model.norm.weight"] = (size.hidden,)
    return [(name, "BF16", shape) for name, shape in sorted(tensors.items())]


def _bytes(size: Size) -> int:
    return sum(2 * math.prod(shape) for _, _, shape in _layout(size))


def _gaussian(name: str, shape: tuple[int, ...], std: float, seed: int) -> torch.Tensor:
    # Hashed together: torch's CPU generator looks at the lower 32 bits of a seed only.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(*shape, generator=generator).mul_(std)


def _write_base(folder: Path, size: Size, seed: int) -> None:
    layout = _layout(size)

    def tensors() -> Iterator[torch.Tensor]:
        for name, _, shape in layout:
            values = torch.ones(shape) if len(shape) == 1 else _gaussian(name, shape, _WEIGHT_STD, seed)
            yield values.to(torch.bfloat16)

    write_stream(folder / "model.safetensors", layout, tensors(), {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": size.hidden, "num_hidden_layers": size.layers, "intermediate_size": size.intermediate,
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "vocab_size": size.vocabulary,
        "head_dim": size.hidden // size.heads, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """One token a byte: small, and complete enough for tools that load it."""
    special = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([*special, *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
              "eos_token": "</s>", "pad_token": "</s>", "model_max_length": 2048}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_adapter(folder: Path, size: Size, base: Path, seed: int) -> None:
    """An adapter as PEFT writes it: fp32 factors, Gaussian, sized so that scaling · B·A is 1 % of the weights."""
    tensors = {}
    for module, (rows, columns) in linear_shapes(size).items():
        A_std = columns**-0.5
        B_std = _RELATIVE_DELTA * _WEIGHT_STD / (ALPHA / RANK * RANK**0.5 * A_std)
        for half, shape, std in (("A", (RANK, columns), A_std), ("B", (rows, RANK), B_std)):
            name = f"base_model.model.{module}.lora_{half}.weight"
            tensors[name] = _gaussian(name, shape, std, seed)
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.resolve()), "r": RANK,
        "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": list(_TARGETS), "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
