"""Settings with which a recipe fits a card, for `bam-lora init`: what `check --fit` does, without the base's files."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bam_lora.cards import Card, generation_before_ampere, parse_card
from bam_lora.errors import UserError
from bam_lora.in_time import in_time

if TYPE_CHECKING:
    from bam_lora.fit import Fit
    from bam_lora.memory_shape import BaseShape
    from bam_lora.recipe import Recipe

_SECONDS = 5.0
_LAYERS = ((2.5e9, 28), (6e9, 36), (float("inf"), 34))  # of bases of about this size


def read_card(text: str) -> Card | None:
    """A card, as `bam-lora check --gpu-memory` reads it; None for 0, `none` and `cpu`.

    Raises:
        UserError: If it is no such thing.
    """
    if text.strip().lower() in ("0", "0gb", "none", "cpu"):
        return None
    return parse_card(text)


@functools.cache
def detected_card() -> tuple[Card, str] | None:
    """The GPU that a run would use here, and its name; None without one."""
    import torch

    from bam_lora.base import device

    if not device().startswith("cuda"):
        return None
    old = None if torch.version.hip else generation_before_ampere(torch.cuda.get_device_capability(0))
    card = Card(int(torch.cuda.mem_get_info(0)[1]), old or "", bfloat16=old is None)
    return card, str(torch.cuda.get_device_name(0))


def base_shape(model: str, parameters: int, vocabulary: int) -> tuple[BaseShape, bool] | None:
    """The shape of a base, and whether it is its own; else that of a usual model of its size; None if that is unknown.

    Args:
        model: Folder, finished run, or id on the Hub, of which only config.json is read.
        parameters: Its size, if known.
        vocabulary: Rows of its embedding, if known.
    """
    from bam_lora.memory_shape import shape_of_config

    config = _config_in_folder(model) or _config_on_hub(model)
    if config is not None:
        with contextlib.suppress(UserError):  # an architecture that no estimate can be made of
            return shape_of_config(config, model), True
    if not parameters:
        return None
    return shape_of_config(_usual_config(parameters, vocabulary or 128_000), model), False


def fit(recipe: Recipe, shape: BaseShape, card: Card) -> Fit:
    """Settings that fit a card.

    Raises:
        UserError: If none do.
    """
    from bam_lora.attention import assumed_attention
    from bam_lora.fit import fit_recipe

    chosen = recipe.quantization
    attention = assumed_attention(
        chosen.attention, chosen.compute_dtype, newer=card.bfloat16, packed=shape.packed, flash=shape.flash
    )
    return fit_recipe(recipe, shape, card.memory_bytes, attention=attention)


def _config_in_folder(model: str) -> dict[str, Any] | None:
    """The config.json of a model folder or a finished run; None if it is neither.

    Raises:
        UserError: If the file is damaged.
    """
    for folder in (Path(model) / "model", Path(model)):
        if (folder / "config.json").is_file():
            try:
                found = json.loads((folder / "config.json").read_bytes())
            except ValueError as error:
                raise UserError.of(
                    str(folder / "config.json"), expected="JSON", found=str(error), remedy="Restore the file"
                ) from None
            return found if isinstance(found, dict) else None
    return None


def _config_on_hub(model: str) -> dict[str, Any] | None:
    """The base's config.json, from the cache or the Hub; None if it cannot be had now (offline, gated).

    Raises:
        UserError: If the Hub knows no such model: better said here than by the next command.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        cached = try_to_load_from_cache(model, "config.json")
        found = json.loads(Path(cached).read_bytes()) if isinstance(cached, str) else in_time(_ask(model), _SECONDS)
    except GatedRepoError:
        return None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError.of(
            f"--base {model}",
            expected="a model on the Hub",
            found="none of that name, or a private one that cannot be seen without its owner's token",
            remedy="Check the spelling of owner/name, or log in with `hf auth login`",
        ) from None
    except Exception:  # `check` says why; here an estimate by the size serves
        return None
    return found if isinstance(found, dict) else None


def _ask(model: str) -> Callable[[], Any]:
    """Asks the Hub once: its client would try again for half a minute where there is no network."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    def call() -> Any:
        reply = get_session().get(hf_hub_url(model, "config.json"), headers=build_hf_headers(), timeout=_SECONDS)
        hf_raise_for_status(reply)
        return reply.json()

    return call


def _usual_config(parameters: int, vocabulary: int) -> dict[str, Any]:
    """The config of a Llama of so many parameters or a few more, heads of 128, an MLP 3.5 times as wide as the rest."""
    layers = next(layers for size, layers in _LAYERS if parameters < size)
    heads = 4
    while _numbers(heads, layers, vocabulary) < parameters:
        heads += 1
    hidden = 128 * heads
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": next(count for count in range(max(heads // 4, 1), 0, -1) if heads % count == 0),
        "intermediate_size": hidden * 7 // 2,
        "vocab_size": vocabulary,
        "tie_word_embeddings": parameters < 3e9,
        "dtype": "bfloat16",
    }


def _numbers(heads: int, layers: int, vocabulary: int) -> int:
    hidden = 128 * heads
    return layers * 13 * hidden**2 + 2 * vocabulary * hidden
