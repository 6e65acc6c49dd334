"""No operation takes a tensor of the card and one of the machine: models on the meta device stand in for a card's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from bam_lora.adapters import Factors
from bam_lora.branch_adapters import dora_scales, settle_adapter
from bam_lora.evaluate import Window, score
from bam_lora.learned_weights import LearningSettings, learn_weights
from bam_lora.merge_search import SearchSettings, search_weights
from bam_lora.sampling import write_after
from bam_lora.selection import SelectionWindows
from bam_lora.views import branch_view, with_weights

ATEN = torch.ops.aten
# What may see both: copies. (Indices on the CPU are allowed for tensors anywhere, too, but nothing here needs that.)
MOVES = {ATEN._to_copy.default, ATEN.copy_.default}


class Card(TorchDispatchMode):
    """The meta device as a card: every operation is on one side, and what comes back from it are ones."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode operations come here before they are taken apart
            if (whole := func.decompose(*args, **kwargs)) is not NotImplemented:
                return whole
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim()}  # plain numbers may be anywhere
        assert len(devices) < 2 or func in MOVES, f"{func} of tensors on {sorted(devices)}"
        self.operations += "meta" in devices
        if func is ATEN._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if func is ATEN._to_copy.default and args[0].is_meta and str(kwargs.get("device", "meta")) == "cpu":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is ATEN.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].fill_(1)
        return func(*args, **kwargs)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # there is none for meta
    with Card() as card:
        yield card
    assert card.operations > 100  # the test has done its work on the card


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def windows(count: int) -> list[Window]:
    return [Window(n, (1, 2, 3), tuple(range(4, 24 + n)), 40) for n in range(count)]


def selection() -> SelectionWindows:
    text = {"target": windows(3), "source": windows(2)}
    return SelectionWindows(text, text)


def branches(model: Any) -> dict[str, list[Factors | None]]:
    names = [name for name, _ in model.named_parameters() if "proj" in name]
    made: Callable[..., torch.Tensor] = torch.randn
    found: dict[str, list[Factors | None]] = {}
    for name in names:
        rows, columns = model.get_parameter(name).shape
        found[name] = [Factors(A_ri=made(4, columns), B_or=made(rows, 4), scaling=0.5) for _ in range(2)]
    return found


def test_scores(model: Any, card: Card) -> None:
    nats, sizes = score(model, windows(5), pad=0, batch_size=2, dtype="float32")
    assert (nats.shape, sizes.tolist()) == ((5,), [40.0] * 5)


def test_learned_weights(model: Any, card: Card) -> None:
    settings = LearningSettings(
        source_weight=1.0, batch_tokens=64, dtype="float32", groups=3, steps=2, windows=1, learning_rate=0.1,
        tokens=10**6, seed=0, checkpointing=True,
    )  # fmt: skip
    found = learn_weights(model, branches(model), [0.5, 0.5], selection(), settings)
    assert all(one.values.device.type == "cpu" for one in found.coefficients.values())


def test_searched_weights(model: Any, card: Card) -> None:
    settings = SearchSettings(
        source_weight=1.0, batch_tokens=64, dtype="float32", scales=(0.5, 1.0), evaluations=3, tokens=10**6
    )
    assert search_weights(model, branches(model), [0.5, 0.5], selection(), settings).weights


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_adapters(model: Any, card: Card, kind: dict[str, Any]) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **kind)
    view = branch_view(model)
    with torch.device("meta"):
        adapted = get_peft_model(view, config)
    settle_adapter(adapted, model)
    assert all(one.device.type == "cpu" for one in dora_scales(adapted).values())
    score(adapted.eval(), windows(2), pad=0, batch_size=2, dtype="float32")


def test_other_weights(model: Any, card: Card) -> None:
    name = "model.embed_tokens.weight"
    view = with_weights(model, {name: torch.zeros(96, 32)}, {})
    score(view, windows(2), pad=0, batch_size=2, dtype="float32")
    score(view, windows(2), pad=0, batch_size=2, dtype="float32")


class Words:
    """A tokenizer that only has to put ids into words."""

    pad_token_id = 0
    eos_token_id = 1

    def decode(self, ids: Any, **options: Any) -> str:
        return str(len(ids))


def test_samples(model: Any, card: Card) -> None:
    assert write_after(model, Words(), [1, 2, 3], 4, "float32") != ""


def test_mixing_would_be_seen() -> None:
    with Card(), pytest.raises(AssertionError, match=r"add.Tensor of tensors on \['cpu', 'meta'\]"):
        torch.zeros(3, device="meta") + torch.zeros(3)
