"""Training by TRL with attention document by document: packed text, quantised bases, GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENGLISH, GERMAN

from bam_lora import packed_attention
from bam_lora.attention import PACKED
from bam_lora.base import Loading, load_model, load_tokenizer
from bam_lora.library_versions import seed_the_adapter
from bam_lora.packed_attention import Documents


def losses(base: Path, folder: Path, attention: str, *, checkpointing: bool) -> list[float]:
    """Of four steps of TRL's trainer on packed text."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    arguments: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": checkpointing}
    seed_the_adapter(42)  # the trainer's own
    trainer = SFTTrainer(
        load_model(base, Loading(4, compute_dtype="float32", attention=attention)),
        args=SFTConfig(
            output_dir=str(folder / attention), max_length=128, packing=True, packing_strategy="bfd_split",
            per_device_train_batch_size=2, max_steps=4, logging_steps=1, learning_rate=1e-3, report_to="none",
            save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **arguments,
        ),
        train_dataset=Dataset.from_dict({"text": [*GERMAN[:40], *ENGLISH[:40]]}),
        processing_class=load_tokenizer(base),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trl_trains_the_same(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    seen: list[Documents] = []
    own = packed_attention._documents

    def documents(*given: Any) -> Documents | None:
        found = own(*given)
        assert found is not None
        seen.append(found)
        return found

    monkeypatch.setattr(packed_attention, "_documents", documents)
    expected = losses(tiny_base, tmp_path, "sdpa", checkpointing=checkpointing)
    assert not seen
    found = losses(tiny_base, tmp_path, PACKED, checkpointing=checkpointing)
    assert len(seen) == 4  # once a forward pass
    assert all(len(one.lengths) > 2 for one in seen)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[0] != found[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("head_dim", "shared"), [(64, 1), (128, 4)])
def test_the_kernel_is_right_on_a_gpu(head_dim: int, shared: int, window: int | None) -> None:
    lengths = (200, 1, 1, 37, 300, 61)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    documents, length = Documents(lengths, offsets, window), sum(lengths)
    torch.manual_seed(0)
    sizes = (8, 8 // shared, 8 // shared)
    inputs = [torch.randn(1, n, length, head_dim, device="cuda", dtype=torch.bfloat16) for n in sizes]
    weights = torch.randn(1, length, 8, head_dim, device="cuda", dtype=torch.bfloat16)
    assert packed_attention.kernel_takes(inputs[0].device, torch.bfloat16, head_dim, head_dim)
    at = torch.arange(length, device="cuda")
    document = torch.repeat_interleave(torch.tensor(lengths, device="cuda"))
    mask = (at[:, None] >= at) & (document[:, None] == document)
    if window is not None:
        mask &= at[:, None] - at < window
    found, expected = [one.clone().requires_grad_() for one in inputs], [one.float().requires_grad_() for one in inputs]
    result, _ = packed_attention.packed_attention(None, *found, documents)
    (result * weights).sum().backward()
    exact = torch.nn.functional.scaled_dot_product_attention(*expected, attn_mask=mask, enable_gqa=True)
    (exact.transpose(1, 2) * weights.float()).sum().backward()
    assert (result.float() - exact.transpose(1, 2)).norm() < 0.01 * exact.norm()
    for one, other in zip(found, expected, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad.float() - other.grad).norm() < 0.02 * other.grad.norm()
