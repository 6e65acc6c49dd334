"""What a run could not merge after hours of training is refused before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapter_kinds import ARCHITECTURES, make_model

from bam_lora.difference import Known
from bam_lora.errors import UserError
from bam_lora.recipe_lora import Lora
from bam_lora.rehearsal import require_mergeable
from bam_lora.sft_branch import adapter_config


def base(folder: Path, kind: str) -> Path:
    make_model(ARCHITECTURES[kind]()).to(torch.bfloat16).save_pretrained(folder)
    return folder


def rehearse(folder: Path, method: str = "linear", bits: int = 4, **lora: Any) -> None:
    config = adapter_config(Lora(**{"r": 4, **lora}).arguments())
    require_mergeable(folder, folder, Known(None), config, method, bits)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"modules_to_save": ["embed_tokens", "norms"]}, "modules_to_save: expected ends of names .* found 'norms'"),
    ({"modules_to_save": ["k_proj"], "target_modules": ["q_proj"]}, r"modules that are not quantised.* found .*k_proj"),
    ({"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, r"modules that are not quantised.* found .*mlp"),
    ({"trainable_token_indices": [3, 60]}, "expected token numbers below 60, the base's vocabulary, found 60"),
    ({"rank_pattern": {"q_prj": 2}}, "rank_pattern: expected patterns of adapted layers' names, found 'q_prj'"),
    ({"alpha_pattern": {"q_proj": 8, "layers.9.q_proj": 4}}, "alpha_pattern: .* found 'layers.9.q_proj'"),
    ({"target_parameters": ["experts.up"]}, "target_parameters: expected ends of names .* found 'experts.up'"),
    ({"dora": True, "target_modules": ["nothing"]}, "the adapter: expected one that PEFT can put on the base, found"),
]


@pytest.mark.parametrize(("lora", "expected"), REFUSED)
def test_adapters_that_cannot_be_trained_or_folded(tmp_path: Path, lora: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        rehearse(base(tmp_path, "llama"), **lora)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": {"embed_tokens": [59, 3]}},
        {"dora": True},
        {},
    ],
)
def test_what_can_be_merged_passes(tmp_path: Path, kind: str, lora: dict[str, Any]) -> None:
    rehearse(base(tmp_path, kind), "linear" if lora else "ties", **lora)


def test_a_module_that_is_not_quantised_may_be_trained_whole(tmp_path: Path) -> None:
    rehearse(base(tmp_path, "llama"), bits=16, modules_to_save=["k_proj"], target_modules=["q_proj"])


def test_experts_and_patterns_pass(tmp_path: Path) -> None:
    folder = base(tmp_path, "qwen3-moe")
    patterns = {"q_proj": 2, "experts.down_proj": 3}
    rehearse(folder, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], rank_pattern=patterns)


def test_experts_in_pieces_do_not_go_with_ties(tmp_path: Path) -> None:
    folder = base(tmp_path, "qwen3-moe")
    rehearse(folder, "linear")  # plain LoRA, which needs no rehearsal
    rehearse(folder, "ties", target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"experts.* expected a matrix stored as it is in memory.* found several"):
        rehearse(folder, "ties")


def test_the_head_of_a_tied_base_is_shown_tied(tmp_path: Path) -> None:
    folder = base(tmp_path, "llama-tied")
    assert transformers.AutoConfig.from_pretrained(folder).tie_word_embeddings
    rehearse(folder, modules_to_save=["lm_head"], ensure_weight_tying=False)
