"""Chooses what fits a card: batch, accumulation, checkpointing, if need be sequence length and optimizer.

The tokens of an optimizer step stay as the recipe says, so that what is learned does not depend on the card. In this
order, the first that fits is taken:

1. no checkpointing (it computes each layer again, a third of the time), with at least 2,048 tokens a batch where a
   batch can have so many;
2. checkpointing;
3. in both the largest batch that pays: packed rows are one row of the whole batch, and by `sdpa` all of it is compared
   with all of it (`check_batch`); document by document more than 8,192 tokens a batch gain nothing;
4. half the sequence length, again and again down to 512, with twice the sequences;
5. as 1 to 4 with a paged 8-bit optimizer, which changes the training: said so.

What does not fit then needs a smaller base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bam_lora.attention import AUTO, BY_DOCUMENT, FLASH
from bam_lora.check_batch import smaller_batch
from bam_lora.errors import UserError
from bam_lora.fit_bases import bases_up_to
from bam_lora.memory import Estimate, estimate
from bam_lora.memory_parts import total
from bam_lora.memory_shape import BaseShape, Linear
from bam_lora.recipe import Recipe, recipe_from_dict

_MARGIN = 0.08  # of the memory: what an estimate leaves out
_DESKTOP_BYTES, _BESIDE_DESKTOP = round(0.8 * 2**30), 0.04  # which on small cards are more
SMALL_OPTIMIZER = "paged_adamw_8bit"
_WHOLE_BATCH = 2048  # tokens that keep a GPU busy
_LARGEST_BATCH = 8192  # tokens
_SHORTEST = 512
_BATCH, _ACCUMULATION = "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
_CHECKPOINTING, _OPTIM, _LENGTH = "training.checkpointing", "training.optim", "data.sequence_length"
_SCORED = "evaluation.batch_size"


@dataclass(frozen=True)
class Fit:
    """Settings that fit.

    Attributes:
        settings: The keys of the recipe that were chosen, dotted, and their values.
        estimate: What the run then takes.
        memory_bytes: What there is.
        notes: What else changes by it, in words.
    """

    settings: dict[str, Any]
    estimate: Estimate
    memory_bytes: int
    notes: tuple[str, ...] = ()

    def nested(self) -> dict[str, Any]:
        """The settings as sections of a recipe."""
        return nested(self.settings)

    def applied(self, recipe: Recipe) -> Recipe:
        """A recipe with these settings."""
        return with_settings(recipe, self.settings)

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        facts = {
            "memory_bytes": self.memory_bytes,
            "free_bytes": left_free(self.memory_bytes),
            "notes": list(self.notes),
        }
        return {"settings": self.settings, **facts, "estimate": self.estimate.to_json()}


def left_free(memory_bytes: int) -> int:
    """What of a card's memory a fit leaves free, in bytes: 8 %, or if that is more 4 % and a desktop's 0.8 GiB."""
    return min(memory_bytes, round(max(_MARGIN * memory_bytes, _DESKTOP_BYTES + _BESIDE_DESKTOP * memory_bytes)))


def fit_recipe(
    recipe: Recipe, outline: BaseShape, memory_bytes: int, *, attention: str | None = None, device: str = "cuda",
    kernels: str | None = None,
) -> Fit:  # fmt: skip
    """The settings with which a recipe fits.

    Args:
        recipe: The recipe.
        outline: Its base (`memory_shape.shape_of_config`, `shape_of_folder`).
        memory_bytes: Of the card, all of it; `left_free` of it stays free.
        attention: What attention is computed by; None: sdpa, or what the recipe names.
        device: "cuda" or "cpu".
        kernels: The branches' fused kernels.

    Raises:
        UserError: If nothing fits, naming the component that is too large and how large a base may be.
    """
    wanted = recipe.quantization.attention
    attention = attention or (None if wanted == AUTO else wanted)
    how: dict[str, Any] = {"attention": attention, "device": device, "kernels": kernels}
    usable = memory_bytes - left_free(memory_bytes)
    smallest: Estimate | None = None
    for settings in _candidates(recipe, outline, attention):
        found = estimate(with_settings(recipe, settings), outline, **how)
        if smallest is None or _trained(found) < _trained(smallest):
            smallest = found
        if _trained(found) > usable:
            continue
        for scored in _halves(recipe.evaluation.batch_size):
            settings |= {_SCORED: scored} if scored != recipe.evaluation.batch_size else {}
            found = smallest = estimate(with_settings(recipe, settings), outline, **how)
            if found.peak_bytes <= usable:
                return Fit(settings, found, memory_bytes, _notes(recipe, settings))
        break  # what is scored is too large, whatever is trained
    assert smallest is not None
    raise _too_large(recipe, outline, memory_bytes, smallest)


def _trained(found: Estimate) -> int:
    """What training takes, or learning the merge weights, which goes by the same settings."""
    return max(total(found.training), total(found.merging))


def _too_large(recipe: Recipe, shape: BaseShape, memory_bytes: int, smallest: Estimate) -> UserError:
    largest, free = smallest.largest, left_free(memory_bytes)
    most = largest_base(recipe, shape, memory_bytes)
    known = bases_up_to(most)[:2]
    such = f" ({' or '.join(known)})" if known else ""
    smaller = f"Take a base of up to about {most / 1e9:.1f} B parameters{such}" if most else "Take a larger card"
    return UserError.of(
        f"{recipe.base} on {memory_bytes / 2**30:.1f} GiB",
        expected=f"at most {(memory_bytes - free) / 2**30:.1f} GiB ({free / 2**30:.1f} GiB stay free)",
        found=f"{smallest.peak_bytes / 2**30:.1f} GiB with the smallest settings, "
        f"{largest.bytes / 2**30:.1f} GiB of it {largest.name}",
        remedy=f"{smaller}, or a lower lora.r",
    )


def _candidates(recipe: Recipe, shape: BaseShape, attention: str | None) -> Iterator[dict[str, Any]]:
    """Settings in the order of the module's text."""
    training, whole = recipe.training, recipe.data.sequence_length
    sequences = training.per_device_train_batch_size * training.gradient_accumulation_steps
    for optim in [training.optim] + ([] if "8bit" in training.optim else [SMALL_OPTIMIZER]):
        for length in _lengths(whole):
            rows = sequences * (whole // length)
            changed: dict[str, Any] = {_LENGTH: length} if length != whole else {}
            changed |= {_OPTIM: optim} if optim != training.optim else {}
            batches = _batches(rows, length, shape, attention)
            least = min(_WHOLE_BATCH, length * batches[0])
            for checkpointing in (False, True):
                for batch in [one for one in batches if checkpointing or one * length >= least]:
                    yield {_BATCH: batch, _ACCUMULATION: rows // batch, _CHECKPOINTING: checkpointing, **changed}


def _lengths(whole: int) -> list[int]:
    lengths = [whole]
    while lengths[-1] % 2 == 0 and lengths[-1] // 2 >= _SHORTEST:
        lengths.append(lengths[-1] // 2)
    return lengths


def _notes(recipe: Recipe, settings: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if _LENGTH in settings:
        whole = recipe.data.sequence_length
        notes.append(f"sequences of {settings[_LENGTH]:,} tokens in place of {whole:,}: longer texts are cut")
    if _OPTIM in settings:
        was = recipe.training.optim
        notes.append(f"{SMALL_OPTIMIZER} in place of {was}: its state is rounded to 8 bits, the last resort")
    return tuple(notes)


def _batches(rows: int, length: int, shape: BaseShape, attention: str | None) -> list[int]:
    """Batches that divide the sequences of a step, the largest that pays first."""
    fitting = [
        size for size in range(1, rows + 1) if rows % size == 0 and (size == 1 or size * length <= _LARGEST_BATCH)
    ]
    largest = max(fitting)
    if attention not in BY_DOCUMENT and not shape.hybrid:
        largest = smaller_batch(largest, length, shape.hidden * shape.layers, shape.parameters)
    return [size for size in reversed(fitting) if size <= largest]


def _halves(value: int) -> list[int]:
    sizes = [value]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with other values for some dotted keys."""
    values = recipe.model_dump(mode="json")
    for key, value in settings.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return recipe_from_dict(values)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections of a recipe."""
    sections: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections


def largest_base(recipe: Recipe, shape: BaseShape, memory_bytes: int) -> int:
    """Parameters of the largest base of this build, its widths scaled, that fits with the smallest settings; or 0."""
    small, usable = _smallest_settings(recipe), memory_bytes - left_free(memory_bytes)
    if estimate(small, scaled(shape, 0.0), attention=FLASH).peak_bytes > usable:
        return 0
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        fits = estimate(small, scaled(shape, middle), attention=FLASH).peak_bytes <= usable
        low, high = (middle, high) if fits else (low, middle)
    return scaled(shape, low).parameters


def _smallest_settings(recipe: Recipe) -> Recipe:
    shortest = _lengths(recipe.data.sequence_length)[-1]
    chosen = {_BATCH: 1, _CHECKPOINTING: True, _OPTIM: SMALL_OPTIMIZER, _LENGTH: shortest, _SCORED: 1}
    return with_settings(recipe, chosen)


def scaled(shape: BaseShape, factor: float) -> BaseShape:
    """A base with all its widths times a factor, but for the vocabulary and the number of layers."""

    def width(value: int) -> int:
        return max(1, round(value * factor))

    def narrower(layers: tuple[Linear, ...]) -> tuple[Linear, ...]:
        return tuple(replace(one, rows=width(one.rows), columns=width(one.columns)) for one in layers)

    return replace(
        shape, linears=narrower(shape.linears), fused=narrower(shape.fused), embeddings=width(shape.embeddings),
        expert_unit=width(shape.expert_unit),
        others=width(shape.others), hidden=width(shape.hidden), heads=width(shape.heads),
        kv_heads=width(shape.kv_heads), intermediate=width(shape.intermediate),
    )  # fmt: skip
