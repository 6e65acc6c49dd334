"""Attention chosen for device and model: flash, else document by document, else transformers' own; or as was said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, GPTNeoConfig, LlamaConfig

from bam_lora import packed_attention
from bam_lora.attention import Recorded, attention_of, choose_attention
from bam_lora.base import Loading, load_model, require_fitting_base
from bam_lora.errors import UserError
from bam_lora.memory_shape import shape_of_config
from bam_lora.run_choices import settle_attention
from bam_lora.rundir import RunDirectory
from bam_lora.store import read_record, write_record


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved(LlamaConfig(hidden_size=256, num_attention_heads=4), tmp_path / "llama")


def saved(config: Any, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


def machine(
    monkeypatch: pytest.MonkeyPatch, *, flash: bool, kernels: bool = False, capability: int = 8, own: bool = False
) -> None:
    """A machine with a GPU; `own`: torch has a kernel for documents of any length that takes everything."""
    monkeypatch.setattr(packed_attention, "kernel_takes", lambda device, *of: own and device.type == "cuda")
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: flash)
    monkeypatch.setattr(transformers.utils, "is_kernels_available", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))


@pytest.mark.parametrize("kind", ["falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"])
def test_a_base_without_attention_is_one_line(tmp_path: Path, story_tokenizer: Any, kind: str) -> None:
    config = AutoConfig.for_model(kind)
    config.save_pretrained(tmp_path)
    words = rf"expected a model whose layers attend, found a {kind} model, .* Choose a transformer"
    with pytest.raises(UserError, match=f"base org/it: {words}"):
        require_fitting_base("org/it", tmp_path, story_tokenizer, 64)
    with pytest.raises(UserError, match=f"base org/it: {words}"):
        shape_of_config(config.to_dict(), "org/it")


def test_a_state_runs_from_one_packed_text_into_the_next() -> None:
    """Why: positions that begin anew keep texts apart where layers attend, and nowhere else."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}
    moved = {}
    for kind, own in (("mamba", {"state_size": 8}), ("llama", {"num_attention_heads": 2, "intermediate_size": 48})):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **own)).eval()
        second, positions = torch.arange(10, 26), torch.arange(16).repeat(2)[None]
        rows = [torch.cat([torch.arange(first, first + 16), second])[None] for first in (20, 40)]
        with torch.no_grad():
            one, other = (model(input_ids=row, position_ids=positions, use_cache=False).logits[0, 16:] for row in rows)
        moved[kind] = float((one - other).abs().max())
    assert moved["llama"] == 0.0
    assert moved["mamba"] > 1e-3


def test_auto_takes_flash_attention_only_where_everything_fits(
    monkeypatch: pytest.MonkeyPatch, llama: Path, tmp_path: Path
) -> None:
    machine(monkeypatch, flash=True)
    assert choose_attention("auto", llama, "bfloat16", "cuda:0") == "flash_attention_2"
    assert choose_attention("auto", llama, "float32", "cuda:0") is None
    assert choose_attention("auto", llama, "bfloat16", "cpu") == "packed"
    assert choose_attention("auto", llama, "bfloat16", "xpu:0") is None
    wide = saved(LlamaConfig(hidden_size=2048, num_attention_heads=4), tmp_path / "wide")
    assert choose_attention("auto", wide, "bfloat16", "cuda:0") is None
    stated = saved(Gemma3TextConfig(hidden_size=64, num_attention_heads=1, head_dim=256), tmp_path / "stated")
    assert choose_attention("auto", stated, "float16", "cuda:0") == "flash_attention_2"
    machine(monkeypatch, flash=True, capability=7)
    assert choose_attention("auto", llama, "float16", "cuda:0") is None
    machine(monkeypatch, flash=False, kernels=True)  # which would fetch code from the network
    assert choose_attention("auto", llama, "bfloat16", "cuda:0") is None


def test_auto_takes_what_torch_brings_along_where_flash_attn_is_not_there(
    monkeypatch: pytest.MonkeyPatch, llama: Path, tmp_path: Path
) -> None:
    machine(monkeypatch, flash=False, own=True)
    assert choose_attention("auto", llama, "bfloat16", "cuda:0") == "packed"
    unknown = saved(GPTNeoConfig(), tmp_path / "neo")
    dropping = saved(LlamaConfig(attention_dropout=0.1), tmp_path / "dropping")
    for folder in (unknown, dropping):
        assert choose_attention("auto", folder, "bfloat16", "cuda:0") is None
        assert choose_attention("auto", folder, "float32", "cpu") is None
        with pytest.raises(UserError, match=r"quantization.attention: packed.* one of the kinds .*llama.*at auto"):
            choose_attention("packed", folder, "bfloat16", "cpu")
    assert choose_attention("packed", llama, "bfloat16", "cpu") == "packed"


def test_a_model_without_flash_attention_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, flash=True)
    old = saved(transformers.XLNetConfig(d_model=64, n_head=2), tmp_path / "old")
    assert choose_attention("auto", old, "bfloat16", "cuda:0") is None
    assert (
        choose_attention("auto", saved(GPTNeoConfig(), tmp_path / "neo"), "bfloat16", "cuda:0") == "flash_attention_2"
    )


def test_the_users_word_counts(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    machine(monkeypatch, flash=True)
    for name in ("sdpa", "eager", None):
        assert choose_attention(name, llama, "bfloat16", "cuda:0") == name
    machine(monkeypatch, flash=False, kernels=True)
    assert choose_attention("flash_attention_2", llama, "bfloat16", "cuda:0") == "flash_attention_2"


@pytest.mark.parametrize(("device", "found"), [("cuda:0", "neither package"), ("cpu", "no GPU")])
def test_flash_attention_by_name_where_it_cannot_be(
    monkeypatch: pytest.MonkeyPatch, llama: Path, device: str, found: str
) -> None:
    machine(monkeypatch, flash=False)
    with pytest.raises(UserError, match=rf"quantization.attention.*found {found}.*leave it at auto"):
        choose_attention("flash_attention_2", llama, "bfloat16", device)


def test_a_loaded_model_has_it(tiny_base: Path) -> None:
    assert load_model(tiny_base, Loading(16, attention="eager")).config._attn_implementation == "eager"
    given = load_model(tiny_base, Loading(16, attention="eager"), attn_implementation="sdpa")
    assert given.config._attn_implementation == "sdpa"
    assert load_model(tiny_base, Loading(16)).config._attn_implementation == "sdpa"
    assert load_model(tiny_base, Loading(16, attention="auto")).config._attn_implementation == "packed"
    given = load_model(tiny_base, Loading(16), attn_implementation="packed")  # as a script's model_init_kwargs
    assert given.config._attn_implementation == "packed"


def test_only_a_choice_by_name_goes_into_hashes() -> None:
    assert Loading(4, attention="auto").facts() == Loading(4).facts() == {
        "bits": 4, "quant_type": "nf4", "double": True, "compute_dtype": "bfloat16",
    }  # fmt: skip
    assert Loading(4, attention="auto", before=Recorded("packed")).facts() == Loading(4).facts()
    assert Loading(4, attention="auto", before=Recorded("packed")) == Loading(4, attention="auto")
    assert Loading(4, attention="eager").facts()["attention"] == "eager"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    write_record(directory.environment, "environment", {"threads": 1})
    return directory


def noted(directory: RunDirectory) -> Any:
    record = read_record(directory.environment)
    assert record is not None
    return record["attention"]


AUTO = Loading(4, attention="auto")


def test_a_run_keeps_the_attention_it_began_with(run: RunDirectory, llama: Path) -> None:
    training, scoring, said = settle_attention(run, AUTO, AUTO, llama)
    assert noted(run) == "packed"
    assert said is None
    assert attention_of(training, llama, "cpu") == attention_of(scoring, llama, "cpu") == "packed"
    write_record(run.environment, "environment", {"threads": 1, "attention": None})  # by an earlier version
    training, scoring, said = settle_attention(run, AUTO, AUTO, llama)
    assert attention_of(training, llama, "cpu") is attention_of(scoring, llama, "cpu") is said is None


def test_a_run_from_before_there_was_a_choice_keeps_to_sdpa(run: RunDirectory, llama: Path) -> None:
    write_record(run.plan, "plan", {})
    training, _, said = settle_attention(run, AUTO, AUTO, llama)
    assert attention_of(training, llama, "cpu") is said is None
    assert noted(run) is None


def test_a_run_whose_attention_is_not_to_be_had_says_so(run: RunDirectory, llama: Path) -> None:
    write_record(run.environment, "environment", {"threads": 1, "attention": "flash_attention_2"})
    training, _, said = settle_attention(run, AUTO, AUTO, llama)
    assert attention_of(training, llama, "cpu") is None
    assert said == "attention was flash_attention_2 so far, which this machine or model cannot do: now sdpa"


def test_the_users_word_needs_no_keeping(run: RunDirectory, llama: Path) -> None:
    eager = Loading(4, attention="eager")
    training, _, said = settle_attention(run, eager, eager, llama)
    assert (attention_of(training, llama, "cpu"), said) == ("eager", None)
    assert noted(run) == "eager"
