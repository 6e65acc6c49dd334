"""Bases with a state beside attention: their documents stay apart in a packed row, and a run on them ends well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import ENGLISH, GERMAN, write_jsonl
from hybrid_models import HYBRID_MODELS, hybrid, hybrid_base
from test_loop import recipe

from bam_lora.check_report import check_everything
from bam_lora.documents_apart import _groups, _lengths, is_hybrid, settle_hybrid, unsettled
from bam_lora.errors import UserError
from bam_lora.loop import run

QUICK = ("lfm2", "qwen3_5_text")  # a convolution, and linear attention; the others take longer
LIST = {"falcon_h1": ["q_proj", "v_proj", "in_proj", "down_proj"], "nemotron_h": ["q_proj", "in_proj", "down_proj"]}
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in HYBRID_MODELS]
RUNS = [kind for kind in HYBRID_MODELS if kind != "zamba2"]
LENGTHS = (12, 30, 9, 11, 2)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, texts in (("german", GERMAN), ("english", ENGLISH)):
        write_jsonl(tmp_path / f"{name}.jsonl", texts[:12])
        write_jsonl(tmp_path / f"{name}.test.jsonl", texts[-3:])
    return tmp_path


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 384, (1, length), generator=generator) for length in LENGTHS]


def packed(found: list[torch.Tensor]) -> dict[str, Any]:
    """A row as TRL's collator makes it."""
    lengths = torch.tensor([one.shape[1] for one in found])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    return {
        "input_ids": torch.cat(found, dim=1),
        "position_ids": torch.cat([torch.arange(int(length)) for length in lengths])[None],
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS),
        "seq_idx": torch.repeat_interleave(torch.arange(len(found)), lengths)[None].int(),
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_packed_row_are_what_they_are_alone(kind: str) -> None:
    model = hybrid(kind)
    assert is_hybrid(model)
    settle_hybrid(model)
    settle_hybrid(model)  # again changes nothing more
    model.train()
    found = documents()
    together = model(**packed(found), use_cache=False).logits
    alone = torch.cat([model(input_ids=one, use_cache=False).logits for one in found], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    first = packed([torch.full_like(found[0], 7), *found[1:]])
    torch.testing.assert_close(model(**first, use_cache=False).logits[:, 12:], together[:, 12:], rtol=1e-4, atol=1e-5)
    parameter = next(parameter for parameter in model.parameters() if parameter.dim() == 2)
    gradients = [torch.autograd.grad(logits.square().sum(), parameter)[0] for logits in (together, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_routers_tell_of_every_token_once(tmp_path: Path) -> None:
    model = hybrid("qwen3_next")
    settle_hybrid(model)
    found = documents()
    together = model(**packed(found), use_cache=False, output_router_logits=True)
    alone = [model(input_ids=one, use_cache=False, output_router_logits=True).router_logits for one in found]
    assert len(together.router_logits) == len(alone[0]) > 0
    for layer, *parts in zip(together.router_logits, *alone, strict=True):
        torch.testing.assert_close(layer, torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_what_is_no_packed_row_goes_its_own_way(tiny_base: Path) -> None:
    model = hybrid("lfm2").eval()
    ids, mask = torch.randint(3, 384, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    before = model(input_ids=ids, attention_mask=mask).logits
    written = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    settle_hybrid(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), written)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_base)
    kind = type(plain.get_decoder())
    assert not is_hybrid(plain)
    settle_hybrid(plain)
    assert type(plain.get_decoder()) is kind


def test_a_kernel_that_passes_by_the_last_layer_of_a_state_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """With mamba-ssm it would multiply by 4-bit codes, and leave the layer's adapter out."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the fused kernel")

    monkeypatch.setattr("transformers.models.bamba.modeling_bamba.mamba2_split_conv1d_scan_combined", refuse)
    model = hybrid("bamba").train()
    with pytest.raises(AssertionError, match="the fused kernel"):
        model(input_ids=documents()[0], use_cache=False)
    settle_hybrid(model)
    model(**packed(documents()), use_cache=False).logits.sum().backward()
    assert model.get_submodule("model.layers.0.mamba.out_proj").weight.grad.abs().sum() > 0
    model.train()  # rows with padding, as of merge weights that are learned or of a script that does not pack
    model(input_ids=torch.ones(2, 9, dtype=torch.int64), attention_mask=torch.ones(2, 9), use_cache=False)


@pytest.mark.parametrize("kind", ["granitemoehybrid", "granitemoehybrid-dense"])
def test_a_model_that_is_lent_is_given_back_as_it_was(kind: str) -> None:
    model = hybrid(kind)
    decoder, config = type(model.model), model.config.to_dict()
    with unsettled(model):
        settle_hybrid(model)
        assert type(model.model) is not decoder
        assert model.config.to_dict() != config
    assert type(model.model) is decoder
    assert model.config.to_dict() == config


def test_a_document_begins_where_positions_begin_anew() -> None:
    for positions, lengths in (
        ([0, 1, 2, 0, 1, 0], [3, 2, 1]), ([5, 6, 0, 1, 2], [2, 3]), ([4, 5, 6], [3]), ([0], [1]),
        ([7, 0, 0], [1, 1, 1]),
    ):  # fmt: skip
        assert _lengths(torch.tensor([positions])) == lengths
        assert _lengths(torch.tensor([[positions]] * 3)) == lengths


def test_documents_of_like_length_go_together() -> None:
    lengths = [100, 5, 90, 60, 4, 4, 70]
    groups = list(_groups(lengths))
    assert sorted(one for group in groups for one in group) == list(range(7))
    assert len(groups) < 7
    for group in groups:
        assert len(group) * lengths[group[0]] <= 1.5 * sum(lengths[one] for one in group)


def test_what_peft_refuses_is_said_before_anything_is_loaded(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    base = hybrid_base("falcon_h1", tiny_base, tmp_path / "base")
    words = (
        r"the adapter: expected one that PEFT can put .*'out_proj' is incompatible.* List layers in .*target_modules"
    )
    for look in (run, lambda wanted: check_everything(wanted, gpu_memory="12GB", fit=False, measure=False)):
        with pytest.raises(UserError, match=words):
            look(recipe(base, files, output=str(tmp_path / "run")))
    listed = recipe(base, files, output=str(tmp_path / "run"), lora={"target_modules": LIST["falcon_h1"]})
    told = check_everything(listed, gpu_memory="12GB", fit=False, measure=False)
    assert not told.problems
    assert "packed sequences of" not in told.text
    assert "note        some layers of a falcon_h1 model carry a state from token to token" in told.text


def test_layers_that_share_a_block_are_refused(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    base = hybrid_base("zamba2", tiny_base, tmp_path / "base")
    with pytest.raises(UserError, match="found a zamba2 model, in which many layers share one block"):
        run(recipe(base, files), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")  # Jamba's own layers
@pytest.mark.filterwarnings(
    "ignore:The following .*_pattern keys did not match:RuntimeWarning"
)  # PEFT's own, of experts
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_on_a_hybrid(kind: str, tiny_base: Path, files: Path, tmp_path: Path) -> None:
    """Its folded model is the base with the branch's adapter on it."""
    base = hybrid_base(kind, tiny_base, tmp_path / "base")
    lora = {"r": 4, **({"target_modules": LIST[kind]} if kind in LIST else {})}
    wanted = recipe(base, files, output=str(tmp_path / "run"), strategy="single", lora=lora, bam={"slices": 1})
    assert not check_everything(wanted, gpu_memory="12GB", fit=False, measure=False).problems
    report = run(wanted)
    assert report["summary"]["learned"] > 0
    root, load = tmp_path / "run", transformers.AutoModelForCausalLM.from_pretrained
    plain, folded = (load(folder, dtype=torch.float32).eval() for folder in (base, root / "model"))
    ids = torch.randint(3, 384, (1, 20), generator=torch.Generator().manual_seed(2))
    before, after = plain(ids).logits, folded(ids).logits
    adapted = peft.PeftModel.from_pretrained(plain, root / "iterations/01/branch-1/adapter").eval()(ids).logits
    assert float((after - before).norm()) > 0
    assert float((after - adapted).norm()) < 0.3 * float((after - before).norm())  # bf16 rounds the folded weights
