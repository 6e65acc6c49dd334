"""What several tests share: a tiny model of a real architecture, and real text where the environment names it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import hub, hub_server  # noqa: F401
from hypothesis import settings

# The machine that runs the tests may be slow and shared; a deadline per example would test that instead.
settings.register_profile("bam_lora", deadline=None, max_examples=50)
settings.load_profile("bam_lora")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny models the fastest, and fair to a shared machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs from all tests but those that are for one (`pytest -m gpu`): they compare bits, or count processes."""
    if config.option.markexpr.strip() != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


ENGLISH = [
    f"The {who} went to the {place} on a {day} morning. There the {who} found {what}, and was glad of it."
    for who in ("miller", "smith", "baker", "fox")
    for place in ("river", "market", "forest")
    for day in ("cold", "bright")
    for what in ("a golden key", "an old friend", "three apples")
]
GERMAN = [
    f"Am {day} ging {who} {place}. Dort fand er {what} und freute sich sehr darüber."
    for who in ("der Müller", "der Schmied", "der Bäcker", "der Fuchs")
    for place in ("an den Fluss", "auf den Markt", "in den Wald")
    for day in ("Morgen", "Abend")
    for what in ("einen goldenen Schlüssel", "einen alten Freund", "drei Äpfel")
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Puts torch's threads back after a test that sets them: what it computes next would be slow, or other bits."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def quick_files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here survives a power cut, and hundreds of runs need no PNG each; `test_report_plots` draws real ones."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    if request.module.__name__ != "test_report_plots":
        monkeypatch.setattr("bam_lora.report.plots.why_no_png", lambda: "not in these tests")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """Writes texts as JSON lines with a column `text`."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def english_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "english.jsonl", ENGLISH)


@pytest.fixture(scope="session")
def german_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "german.jsonl", GERMAN)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights: 2 layers, 64 wide, context 256, byte-level BPE; bf16 safetensors."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(ENGLISH, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def story_tokenizer() -> Any:
    """The quickstart's tokenizer: byte-level BPE, no chat template."""
    from transformers import AutoTokenizer

    import bam_lora.quickstart

    return AutoTokenizer.from_pretrained(Path(bam_lora.quickstart.__file__).parent / "base")


@pytest.fixture(scope="session")
def trimmed_tokenizer(story_tokenizer: Any) -> Any:
    """The same with places of tokens that leave out the space at their beginning, as GPT-2's and Llama 3's do."""
    import copy

    from tokenizers import processors

    tokenizer = copy.deepcopy(story_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.fixture(scope="session")
def bench_data() -> Path:
    """The folder with real text and a small real base, or a skip that says so."""
    folder = os.environ.get("BAM_LORA_BENCH_DATA")
    if not folder:
        pytest.skip("BAM_LORA_BENCH_DATA is not set: no real text to test on")
    return Path(folder)
