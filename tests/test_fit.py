"""What fits a card: within it, as large as it can be, in the documented order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bam_lora import fit, memory_parts
from bam_lora.errors import UserError
from bam_lora.fit import Fit, fit_recipe, left_free, with_settings
from bam_lora.fit_bases import bases_up_to
from bam_lora.memory import estimate
from bam_lora.memory_shape import BaseShape, shape_of_config
from bam_lora.recipe import Recipe, recipe_from_dict

GIB = 2**30
BATCH, ACCUMULATION = "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiled_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cards' sizes are chosen for TRL's loss in tiles; TRL 1.10 has all logits at once and needs larger ones."""
    monkeypatch.setattr(memory_parts, "_tiled_loss", lambda: True)


@pytest.fixture(scope="module")
def shape() -> BaseShape:
    return shape_of_config(LLAMA_8B, "org/llama-8b")


def recipe(**training: Any) -> Recipe:
    given = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, **training}
    values = {"base": "org/llama-8b", "output": "run", "data": {"target": [{"path": "org/text"}]}, "training": given}
    return recipe_from_dict(values)


def step_tokens(wanted: Recipe) -> int:
    training = wanted.training
    return training.per_device_train_batch_size * training.gradient_accumulation_steps * wanted.data.sequence_length


@pytest.mark.parametrize(("gigabytes", "free"), [(8, 1.12), (12, 1.28), (16, 1.44), (24, 1.92), (80, 6.4)])
def test_a_small_card_has_room_for_a_desktop(gigabytes: int, free: float) -> None:
    assert left_free(gigabytes * GIB) == pytest.approx(free * GIB)
    assert left_free(GIB // 4) == GIB // 4  # not more than there is


@pytest.mark.parametrize("gigabytes", [10, 11, 12, 16, 24, 32, 48, 80])
@pytest.mark.parametrize("attention", [None, "packed", "flash_attention_2"])
def test_what_fits_is_within_the_card_and_keeps_the_step(
    shape: BaseShape, gigabytes: int, attention: str | None
) -> None:
    found = fit_recipe(recipe(), shape, gigabytes * GIB, attention=attention)
    applied = found.applied(recipe())
    taken = estimate(applied, shape, attention=attention)
    assert taken == found.estimate
    assert taken.peak_bytes <= gigabytes * GIB - left_free(gigabytes * GIB)
    assert step_tokens(applied) == step_tokens(recipe())


@pytest.mark.parametrize("gigabytes", [10, 12, 16, 24, 48])
def test_what_fits_is_the_first_of_the_documented_order(shape: BaseShape, gigabytes: int) -> None:
    """Nothing before it in the order fits: no larger batch, no batch without checkpointing, no longer sequence."""
    found = fit_recipe(recipe(), shape, gigabytes * GIB)
    usable = gigabytes * GIB - left_free(gigabytes * GIB)
    for settings in fit._candidates(recipe(), shape, None):
        if settings == found.settings:
            return
        assert estimate(with_settings(recipe(), settings), shape, attention=None).peak_bytes > usable
    pytest.fail("it is no candidate")


def test_a_large_card_needs_no_checkpointing_where_no_batch_has_2048_tokens(shape: BaseShape) -> None:
    """77 sequences have the divisors 1 and 7, and seven of them are more than a batch gains by."""
    wanted = with_settings(recipe(), {BATCH: 7, ACCUMULATION: 11, "data.sequence_length": 1536})
    found = fit_recipe(wanted, shape, 80 * GIB)
    assert found.settings == {BATCH: 1, ACCUMULATION: 77, "training.checkpointing": False}


def test_a_larger_card_never_gets_less(shape: BaseShape) -> None:
    def rank(found: Fit) -> tuple[int, bool, int]:
        settings = found.settings
        length = settings.get("data.sequence_length", 2048)
        return length, not settings["training.checkpointing"], settings[BATCH]

    ranks = [rank(fit_recipe(recipe(), shape, size * GIB)) for size in (10, 12, 16, 24, 32, 48, 80)]
    assert ranks == sorted(ranks)


def test_small_cards_get_shorter_sequences_then_a_smaller_optimizer_and_say_so(shape: BaseShape) -> None:
    shorter = fit_recipe(recipe(), shape, round(10.3 * GIB))
    assert shorter.settings["data.sequence_length"] < 2048
    assert "training.optim" not in shorter.settings
    assert "longer texts are cut" in shorter.notes[0]
    sizes = [size / 10 for size in range(88, 100, 3)]
    fitting = []
    for size in sizes:
        try:
            fitting.append(fit_recipe(recipe(), shape, round(size * GIB)))
        except UserError:
            continue
    rounded = [found for found in fitting if "training.optim" in found.settings]
    assert rounded
    assert any("paged_adamw_8bit in place of adamw_torch_fused" in note for note in rounded[0].notes)


def test_with_a_dense_mask_a_batch_stays_small_enough_to_pay(shape: BaseShape) -> None:
    assert fit_recipe(recipe(), shape, 1000 * GIB).settings[BATCH] * 2048 <= 8192
    tiny = shape_of_config({**LLAMA_8B, "num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 512,
                            "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512}, "tiny")  # fmt: skip
    assert fit_recipe(recipe(), tiny, 1000 * GIB).settings[BATCH] == 1
    for kind in ("flash_attention_2", "packed"):
        assert fit_recipe(recipe(), tiny, 1000 * GIB, attention=kind).settings[BATCH] == 4


def test_what_cannot_fit_names_the_component_and_a_base_that_would(shape: BaseShape) -> None:
    words = r"on 6\.0 GiB: expected at most 5\.0 GiB .*, found .* 3\.4 GiB of it 4-bit weights\. Take a base of up to "
    with pytest.raises(UserError, match=words + r"about [3-6]\.\d B parameters \(\S+/\S+ or \S+/\S+\)"):
        fit_recipe(recipe(), shape, 6 * GIB)
    with pytest.raises(UserError, match="Take a larger card"):
        fit_recipe(recipe(), shape, GIB // 2)


def test_known_bases_are_named_by_what_their_files_state(tmp_path: Path) -> None:
    folder = tmp_path / "_shared" / "bases"
    folder.mkdir(parents=True)
    for name, size in (("small", "600 M"), ("middle", "4.0 B"), ("large", "8.2 B")):
        (folder / f"{name}.yaml").write_text(f"# {name}; {size} parameters; open\nbase: org/{name}\n")
    assert bases_up_to(5 * 10**9, tmp_path) == ["org/middle", "org/small"]
    assert bases_up_to(10**8, tmp_path) == []


def test_a_base_of_the_named_size_does_fit(shape: BaseShape) -> None:
    most = fit.largest_base(recipe(), shape, 6 * GIB)
    low, high = 0.1, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fit.scaled(shape, middle).parameters <= most else (low, middle)
    found = fit_recipe(recipe(), fit.scaled(shape, low * 0.99), 6 * GIB, attention="flash_attention_2")
    assert found.estimate.peak_bytes <= 6 * GIB - left_free(6 * GIB)


def test_scoring_must_fit_as_well(shape: BaseShape) -> None:
    wanted = recipe_from_dict({**recipe().resolved(), "evaluation": {"precision": "16bit"}})
    with pytest.raises(UserError, match=r"15\.0 GiB of it weights"):
        fit_recipe(wanted, shape, 12 * GIB)
    assert fit_recipe(wanted, shape, 24 * GIB).estimate.peak_bytes < 24 * GIB
