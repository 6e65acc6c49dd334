"""The committed base is a small, whole, real Llama that knows English stories and nothing else."""

import importlib.resources
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bam_lora.quickstart import make_base
from bam_lora.quickstart.stories import stories

BASE = Path(str(importlib.resources.files("bam_lora.quickstart"))) / "base"
LANGUAGES = ("english", "german", "bulgarian")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def bits_per_byte(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """BOS is context, EOS is not scored; a text longer than the context is cut at it."""
    bits, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True).input_ids
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        bits += loss.item() * (ids.shape[1] - 1) / math.log(2)
        size += len(tokenizer.decode(ids[0, 1:]).encode())
    return bits / size


def test_folder_is_small_and_whole() -> None:
    files = {path.name for path in BASE.iterdir()}
    assert files == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= make_base.MAXIMUM_BYTES
    assert (BASE / "README.md").read_text(encoding="utf-8") == make_base.CARD


def test_checkpoint_is_bf16_with_widths_for_four_bits() -> None:
    config = json.loads((BASE / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] >= 512
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"
    with (BASE / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert {entry["dtype"] for entry in tensors.values()} == {"BF16"}
    linear = [entry["shape"] for name, entry in tensors.items() if name.endswith("_proj.weight")]
    assert len(linear) == 7 * config["num_hidden_layers"]
    assert all(in_features % 64 == 0 for _, in_features in linear)


def test_special_tokens_are_three_and_only_bos_is_added(tokenizer: Any) -> None:
    ids = tokenizer("Once upon a time").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert max(ids) < make_base.VOCABULARY_TOKENS == len(tokenizer)


@pytest.mark.parametrize(("language", "bytes_a_token"), [("english", 3.5), ("german", 2.0), ("bulgarian", 2.5)])
def test_tokenizer_gives_every_language_back_in_few_tokens(tokenizer: Any, language: str, bytes_a_token: float) -> None:
    texts = stories(language, 20, 99)
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert sum(len(text.encode()) for text in texts) / sum(map(len, encoded)) > bytes_a_token
    other = "¿Qué? 漢字 🙂\t"
    assert tokenizer.decode(tokenizer(other, add_special_tokens=False).input_ids) == other


def test_base_knows_english_stories_and_neither_of_the_other_languages(model: Any, tokenizer: Any) -> None:
    scores = {language: bits_per_byte(model, tokenizer, stories(language, 8, 98)) for language in LANGUAGES}
    assert scores["english"] < 0.20
    assert scores["german"] > 3.0
    assert scores["bulgarian"] > 3.0


def test_base_tells_an_english_story(model: Any, tokenizer: Any) -> None:
    known = {word for text in stories("english", 1000, 5) for word in re.findall(r"\w+", text)}
    prompt = tokenizer("Once upon a time there was", return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(**prompt, max_new_tokens=120, do_sample=True, temperature=0.7)
    words = re.findall(r"\w+", tokenizer.decode(ids[0], skip_special_tokens=True))
    assert len(words) > 70
    assert sum(word in known for word in words) >= 0.95 * len(words)


def test_script_makes_the_same_kind_of_folder_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(make_base, "TOKENIZER_STORIES", {"english": 150, "german": 30, "bulgarian": 30})
    monkeypatch.setattr(make_base, "BATCH_SEQUENCES", 2)
    for name in ("one", "two"):
        argv = ["make_base", "--output", str(tmp_path / name), "--steps", "2"]
        monkeypatch.setattr("sys.argv", argv)
        make_base.main()
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
        assert path.stat().st_mode & 0o777 == 0o644
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in BASE.iterdir()}
