"""Files as PEFT writes them where the vocabulary was resized or a task adds a module: the fold against PEFT itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapter_kinds import ARCHITECTURES, PEFT_WARNINGS, SIZES, assert_same_effect, load, logits, make_model, train
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from bam_lora.adapters import Adapter
from bam_lora.errors import UserError
from bam_lora.folding import fold

pytestmark = PEFT_WARNINGS
EMBEDDING = "base_model.model.model.embed_tokens"


def resized(tmp_path: Path, tied: bool) -> Any:
    """A model with seven new tokens, whose base in the folder `base` has not got them; PEFT knows that folder."""
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    make_model(config).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    model.resize_token_embeddings(67)
    torch.manual_seed(7)
    with torch.no_grad():
        model.model.embed_tokens.weight[60:] = 0.3 * torch.randn(7, 32)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("settings", "suffix"),
    [
        ({"trainable_token_indices": [60, 66]}, "token_adapter.base_layer.weight"),
        ({"trainable_token_indices": {"embed_tokens": [3, 66]}}, "token_adapter.base_layer.weight"),
        ({"modules_to_save": ["embed_tokens"]}, "original_module.weight"),
    ],
)
def test_what_peft_saves_of_a_resized_vocabulary(
    tmp_path: Path, tied: bool, settings: dict[str, Any], suffix: str
) -> None:
    model = resized(tmp_path, tied)
    base = logits(model, 67)
    adapted = train(model, 1, target_modules=["q_proj"], **settings)
    adapted.save_pretrained(tmp_path / "adapter")
    assert f"{EMBEDDING}.{suffix}" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    folded = load(tmp_path / "out", model.config)
    assert folded.config.vocab_size == 67
    assert_same_effect(logits(folded, 67), logits(adapted, 67), base)


@pytest.mark.parametrize("copied", [True, False])
def test_a_wrapper_s_second_copy_must_be_one(tmp_path: Path, copied: bool) -> None:
    model = resized(tmp_path, tied=False)
    train(model, 1, target_modules=["q_proj"], modules_to_save=["embed_tokens"]).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = f"{EMBEDDING}.modules_to_save.weight" if copied else f"{EMBEDDING}.original_module.weight"
    tensors[name] = tensors[name][:60].clone()
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"'{name}' in .*expected model.embed_tokens.weight of shape \[60, 32\]"):
        Adapter.open(tmp_path / "adapter")
    del tensors[f"{EMBEDDING}.weight"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"embed_tokens.* beside it, found nothing"):
        Adapter.open(tmp_path / "adapter")


@pytest.mark.parametrize("saved", [(), ("embed_tokens",)])
def test_a_classifier(tmp_path: Path, saved: tuple[str, ...]) -> None:
    """PEFT lists `classifier` and `score` as saved, of which a model has one."""
    config = transformers.LlamaConfig(**SIZES, num_labels=3, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).float().eval()
    model.save_pretrained(tmp_path / "base")
    tokens = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        lora = LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=[*saved])
        adapted = get_peft_model(copy.deepcopy(model), lora).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        expected = adapted(input_ids=tokens).logits
        adapted.save_pretrained(tmp_path / "adapter")
        listed = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"]
        assert {"classifier", "score"} <= set(listed)
        fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", any_base=True)
        folded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        assert_same_effect(folded(input_ids=tokens).logits, expected, before)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for lost in (*saved, "score"):
        save_file({name: one for name, one in tensors.items() if not name.endswith(f".{lost}.weight")}, path)
        with pytest.raises(UserError, match=rf"modules_to_save in .*none of '.*{lost}"):
            Adapter.open(tmp_path / "adapter")


def test_mica_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    model = make_model(ARCHITECTURES["llama"]())
    model.save_pretrained(tmp_path / "base")
    base = logits(model)
    adapted = train(model, 1, target_modules=["q_proj"], init_lora_weights="mica")
    adapted.save_pretrained(tmp_path / "adapter")
    fold(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", any_base=True)
    assert_same_effect(logits(load(tmp_path / "out", model.config)), logits(adapted), base)


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        (
            "qwen3-moe",
            {"modules_to_save": ["mlp"]},
            r"experts\.\w+_proj' in .*weights and biases alone in modules_to_s",
        ),
        ("gemma3-vision", {"modules_to_save": ["multi_modal_projector"]}, "mm_input_projection_weight' in .*alone in"),
        (
            "gpt-oss",
            {"target_parameters": ["mlp.experts.gate_up_proj_bias"]},
            r"experts\.lora_A\.weight' in .*expected gate_up_proj or down_proj in target_parameters, found gate_up",
        ),
    ],
)
def test_kinds_that_are_not_supported_are_named(
    tmp_path: Path, architecture: str, settings: dict[str, Any], words: str
) -> None:
    model = make_model(ARCHITECTURES[architecture]())
    target = r".*(language_model.*)?layers.*\.q_proj"
    train(model, 1, target_modules=target, **settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=words):
        Adapter.open(tmp_path / "adapter")


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{folder.name}: {name}")


def test_a_resized_vocabulary_brings_its_tokenizer(tmp_path: Path) -> None:
    model = resized(tmp_path, tied=False)
    train(copy.deepcopy(model), 1, target_modules=["q_proj"]).save_pretrained(tmp_path / "more")
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    train(small, 2, target_modules=["q_proj"]).save_pretrained(tmp_path / "plain")
    write_files(tmp_path / "base", "tokenizer.json", "tokenizer.model", "tekken.json", "added_tokens.json", "LICENSE")
    write_files(tmp_path / "plain", "tokenizer.json", "tokenizer_config.json")
    write_files(tmp_path / "more", "chat_template.jinja")

    def companions(*adapters: str) -> dict[str, str]:
        weights = [1.0, *[0.0] * (len(adapters) - 1)]
        folders = [tmp_path / name for name in adapters]
        facts = fold(tmp_path / "base", folders, tmp_path / "out", any_base=True, weights=weights)
        owner = "base" if facts["tokenizer"] == "base" else Path(facts["tokenizer"]).name
        assert facts["vocabulary"] == (67 if "more" in adapters else None)
        assert (tmp_path / "out" / "LICENSE").read_text() == "base: LICENSE"
        found = [path for path in (tmp_path / "out").iterdir() if path.name.startswith(("to", "te", "ad", "ch"))]
        return {"": owner, **{path.name: path.read_text().partition(":")[0] for path in found}}

    of_base = dict.fromkeys(("", "tokenizer.json", "tokenizer.model", "tekken.json", "added_tokens.json"), "base")
    assert companions("plain") == of_base, "nothing was resized"
    assert companions("more") == of_base, "a chat template alone is no tokenizer"
    write_files(tmp_path / "more", "tokenizer.json", "tokenizer_config.json")
    names = ("", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert companions("more", "plain") == dict.fromkeys(names, "more"), "never mixed with the base's"
    (tmp_path / "private").write_text("secret")
    (tmp_path / "more" / "vocab.txt").symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match=r"more/vocab.txt: expected a file of its own folder, found a link"):
        companions("more")
