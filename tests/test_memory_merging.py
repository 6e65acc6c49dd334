"""What learning and searching merge weights takes, against the tensors that a real one has at once."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bam_lora import memory, memory_parts
from bam_lora.adapters import Factors
from bam_lora.evaluate import Window
from bam_lora.fit import fit_recipe, left_free, with_settings
from bam_lora.learned_weights import LearningSettings, learn_weights
from bam_lora.memory_merging import delta_count, merging
from bam_lora.memory_shape import shape_of_config
from bam_lora.merge_search import SearchSettings, search_weights
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.selection import ROLES, SelectionWindows

RANK, LENGTH = 8, 256
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "pad_token_id": 0}  # fmt: skip


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        if storage._cdata in self.held:
            return
        self.held[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)


def recipe(weights: str, batch: int, *, checkpointing: bool = False, **more: Any) -> Recipe:
    sets = [{"path": "org/one", "documents": 8}]
    merge = {"weights": weights, "learned": {"windows": 4, "scope": "iteration", **more}}
    values = {
        "base": "org/model", "output": "run", "data": {"target": [{"path": "org/text"}], "sequence_length": LENGTH},
        "lora": {"r": RANK}, "quantization": {"bits": 16}, "bam": {"slices": 12, "branches": 2, "merge": merge},
        "training": {"per_device_train_batch_size": batch, "checkpointing": checkpointing},
        "selection": {"target": sets, "source": sets},
    }  # fmt: skip
    return recipe_from_dict(values)


def live_bytes(config: Mapping[str, Any], wanted: Recipe) -> int:
    """The most that learning or searching has at once, the base left out."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config)).bfloat16().eval()
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    linear = {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and one is not head}
    branches = {
        f"{name}.weight": [
            Factors(torch.randn(RANK, one.in_features) * 0.01, torch.randn(one.out_features, RANK) * 0.01, 1.0)
            for _ in range(delta_count(wanted))
        ]
        for name, one in linear.items()
    }
    windows = [Window(number, (1,), (5,) * (LENGTH - 1), 1000) for number in range(4)]
    text = SelectionWindows(dict.fromkeys(ROLES, windows), dict.fromkeys(ROLES, windows))
    batch = wanted.training.per_device_train_batch_size * LENGTH
    shared: dict[str, Any] = {"source_weight": 1.0, "batch_tokens": batch, "dtype": "bfloat16", "tokens": 10**7}
    start = [0.5] * delta_count(wanted)
    with Live() as live:
        if wanted.bam.merge.weights == "search":
            search_weights(model, branches, start, text, SearchSettings(scales=[1.0, 0.5], evaluations=2, **shared))
        else:
            settings = LearningSettings(groups=4, steps=1, windows=4, learning_rate=1e-2, seed=0,
                                        checkpointing=wanted.training.checkpointing, **shared)  # fmt: skip
            learn_weights(model, branches, start, text, settings)
    return live.peak


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "vocabulary", "weights", "batch", "more"),
    [
        ("llama", 512, "learned", 4, {}),
        ("qwen3", 4096, "learned", 2, {"checkpointing": True}),
        ("llama", 4096, "search", 4, {}),
        pytest.param("gemma3_text", 512, "learned", 4, {}, marks=pytest.mark.slow),
        pytest.param("llama", 512, "learned", 4, {"scope": "run"}, marks=pytest.mark.slow),
        pytest.param("llama", 512, "learned", 4, {"checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("llama", 40_000, "learned", 4, {}, marks=pytest.mark.slow),
        pytest.param("llama", 40_000, "search", 4, {}, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_what_is_there_at_once(
    kind: str, vocabulary: int, weights: str, batch: int, more: dict[str, Any]
) -> None:
    config = {"model_type": kind, "vocab_size": vocabulary, **SIZES}
    wanted = recipe(weights, batch, **more)
    parts = merging(wanted, shape_of_config(config, kind), "cpu")
    estimated = sum(part.bytes for part in parts if part.name != "weights")
    assert estimated == pytest.approx(live_bytes(config, wanted), rel=0.15)


def test_deltas_are_those_of_an_iteration_or_of_as_many_as_training_has_room_for() -> None:
    assert delta_count(recipe("search", 1)) == delta_count(recipe("learned", 1)) == 2
    assert delta_count(recipe("learned", 1, scope="run")) == 8


def test_merging_is_a_phase_where_weights_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_parts, "_tiled_loss", lambda: True)  # as TRL has it from 1.14 on
    shape = shape_of_config({"model_type": "llama", "vocab_size": 100_000, **SIZES}, "llama")
    plain = memory.estimate(recipe("uniform", 4), shape, attention="packed")
    assert plain.merging == ()
    assert list(plain.to_json()) == ["peak_bytes", "training", "scoring"]
    learned = memory.estimate(recipe("learned", 4), shape, attention="packed")
    assert learned.training == plain.training
    assert memory_parts.total(learned.merging) > memory_parts.total(
        learned.training
    )  # all logits, which training never has
    assert learned.peak_bytes == max(map(memory_parts.total, (learned.merging, learned.scoring)))
    assert [one.name for one in learned.merging][:3] == ["GPU context", "weights", "deltas"]
    assert max(learned.merging[1:], key=lambda one: one.bytes).name == "logits"
    assert memory.from_json(learned.to_json()) == learned
    assert memory.from_json(plain.to_json()) == plain


def test_what_is_learned_must_fit_the_card_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_parts, "_tiled_loss", lambda: True)
    config = {"model_type": "llama", "vocab_size": 100_000, **SIZES, "max_position_embeddings": 256}
    shape, wanted = shape_of_config(config, "llama"), recipe("learned", 8, windows=8)
    settings = {"training.checkpointing": False}
    first = memory.estimate(with_settings(wanted, settings), shape, attention="packed")
    trained, merged = memory_parts.total(first.training), memory_parts.total(first.merging)
    assert trained < merged
    card = next(size for size in range(trained, 2 * merged, 2**20) if size - left_free(size) > (trained + merged) / 2)
    found = fit_recipe(wanted, shape, card, attention="packed").estimate
    assert memory_parts.total(found.merging) <= card - left_free(card) < merged
