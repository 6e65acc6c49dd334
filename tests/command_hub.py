"""What the commands of the documents find: a local Hub, texts, adapters; and what makes them quick.

A command is not changed. The bases on the Hub have two layers, the data sets a hundred rows of the stated columns,
and every recipe is cut as it is read (`cut`): a step is a few short sequences, sets are of two documents, and 200 M
tokens are 5,000.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import conftest
import pytest
from command_world import World
from conftest import write_jsonl
from hub_server import TOKENS
from recipe_hub import BASES, FULL, RECIPES, catalogue, hub_id, recipes_hub
from shown_commands import Shown

from bam_lora.recipe import Recipe, load_recipe

CUT = (
    "training.per_device_train_batch_size=8", "training.gradient_accumulation_steps=1", "training.warmup_steps=0",
    "training.checkpointing=false", "evaluation.branches=false",
)  # fmt: skip
LENGTHS = {"text": 64, "chat": 128}  # tokens
DOCUMENTS, ROWS = 2, 100
TOKENS_CUT, LEAST_TOKENS = 38_000, 1_300

# What the documents name, beside what the recipes do.
MODELS = {
    "org/base-instruct": "qwen3",
    "meta-llama/Llama-3.1-8B-Instruct": "llama",
    "HuggingFaceTB/SmolLM2-135M": "llama",
}
ENGLISH, GERMAN = ("english", "select.en", "valid.en"), ("german", "select.de", "valid.de", "valid.bg")
CHOICES = {"text": ["red", "blue", "green", "black"], "label": ["A", "B", "C", "D"]}
OPTIONS = {f"option_{letter}": text for letter, text in zip("abcd", CHOICES["text"], strict=True)}
SPLITS = ("train", "validation", "test")


def questions(count: int = 12) -> Iterator[tuple[str, str]]:
    """Number and text of each question; the answer is always the second."""
    return ((str(number), f"Which colour has sky {number}?") for number in range(count))


BELEBELE = [
    {"flores_passage": "The sky is blue.", "question": text, "correct_answer_num": "2"}
    | {f"mc_answer{number}": answer for number, answer in enumerate(CHOICES["text"], 1)}
    for _, text in questions()
]
ARC = [{"id": number, "question": text, "choices": CHOICES, "answerKey": "B"} for number, text in questions()]
M_ARC = [{"id": number, "instruction": text, "answer": "B", "option_e": "", **OPTIONS} for number, text in questions()]
AYA = [{"inputs": "Mikä?", "targets": "Tämä.", "language_code": code} for code in ("fin", "eng") * 4]
DATA: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {
    "facebook/belebele": {name: {"test": BELEBELE} for name in ("bul_Cyrl", "deu_Latn")},
    "allenai/ai2_arc": {"ARC-Easy": dict.fromkeys(SPLITS, ARC)},
    "alexandrainst/m_arc": {"de": dict.fromkeys(SPLITS, M_ARC)},
    "CohereLabs/aya_dataset": {"default": {"train": AYA}},
}
_WRITE = "from pathlib import Path; Path('recipe.yaml').write_text('extends: recipes/german/pretrain.yaml')"
INIT = "bam-lora init"
PRETRAIN = "bam-lora run recipes/german/pretrain.yaml"
MADE = {  # what the documents take for granted
    "recipe.yaml": Shown("a recipe of the reader's", 1, _WRITE, "python"),
    "german.yaml": Shown("a recipe by init", 1, f"{INIT} --language German --base qwen3-4b --gpu-memory 12GB --yes"),
    "runs/german-single": Shown("a baseline", 1, f"{PRETRAIN} --set strategy=single --output runs/german-single"),
    "runs/german-2": Shown("another run", 1, f"{PRETRAIN} --set seed=2 --output runs/german-2"),
}


def cut(load: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """`load_recipe`, and then the same again with values that make a run quick; what the recipe says is read first."""

    def quick(path: Any, overrides: Sequence[str] = (), output: str | None = None) -> Recipe:
        whole = load(path, overrides, output)
        fewer = [f"data.sequence_length={LENGTHS[whole.mode]}"]
        for role, sources in (("target", whole.data.target), ("replay", whole.data.replay)):
            for number, source in enumerate(sources):
                if source.tokens is not None:
                    tokens = max(source.tokens // TOKENS_CUT, LEAST_TOKENS)
                    fewer.append(f"data.{role}.{number}.tokens={tokens}")
        for role, count in (("target", len(whole.evaluation.target)), ("source", len(whole.evaluation.source))):
            fewer += [f"evaluation.{role}.{number}.documents={DOCUMENTS}" for number in range(count)]
        if whole.strategy != "single":
            fewer.append(f"bam.slices={max(whole.slices // 2, whole.bam.branches)}")
        if whole.mode == "text":  # what the README says to have for `shrink --source-weight`
            fewer += ["selection.target=[{path: select.de.jsonl}]", "selection.source=[{path: select.en.jsonl}]"]
        return load(path, [*overrides, *CUT, *fewer], output)

    return quick


@contextlib.contextmanager
def world(folder: Path, tokenizer: Path, shown: Iterable[Shown]) -> Iterator[World]:
    """A world below this folder, in which the paths that the documents show can be made."""
    import bam_lora.points
    import bam_lora.rundir  # noqa: F401 -- both read a run's own recipe, which is cut already

    here = folder / "here"
    shutil.copytree(RECIPES, here / "recipes")
    for names, texts in ((ENGLISH, conftest.ENGLISH), (GERMAN, conftest.GERMAN)):
        for name in names:
            write_jsonl(here / f"{name}.jsonl", texts)
    with recipes_hub(folder, tokenizer, map(load_recipe, FULL), ROWS) as hub, pytest.MonkeyPatch.context() as patch:
        for name, kind in MODELS.items():
            hub.add_model(name, folder / kind)
        for name, configs in DATA.items():
            hub.add_dataset(name, configs)
        everything = (*map(hub_id, BASES), *catalogue())
        hub.log_in(hub.add_token(TOKENS["write"], user="my-name", role="write", access=everything))
        patch.setenv("BAM_LORA_CACHE", str(folder / "cache"))
        for module in ("bam_lora.recipe", "bam_lora.recipe_catalogue"):
            patch.setattr(f"{module}.load_recipe", cut(load_recipe))
        for number, name in enumerate(("a", "b")):
            save_adapter(here / name, folder / "llama", "meta-llama/Llama-3.1-8B", seed=number)
        yield World(here, makers_of(shown), load_recipe)


def makers_of(shown: Iterable[Shown]) -> dict[str, Shown]:
    """What makes a path: of a run the recipe that names it, else the first command that shows it as its output."""
    makers = dict(MADE)
    for recipe in FULL:
        place = recipe.relative_to(RECIPES.parent).as_posix()
        makers.setdefault(load_recipe(recipe).output, Shown(place, 1, f"bam-lora run {place}"))
    for output, maker in list(makers.items()):  # the baseline, as the heads of the recipes say it
        if maker.page.endswith(".yaml"):
            single = f"{maker.text} --set strategy=single --output {output}-single"
            makers.setdefault(f"{output}-single", Shown(maker.page, 1, single))
    for one in shown:
        words = one.words if one.kind == "command" else ()
        for at, word in enumerate(words[:-1]):
            if word in ("--output", "--write"):
                makers.setdefault(words[at + 1], one)
    return makers


def save_adapter(folder: Path, base: Path, name: str, *, seed: int) -> None:
    """A LoRA adapter with random numbers on a base, which it calls by its name on the Hub."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = name
    adapted.save_pretrained(folder)
