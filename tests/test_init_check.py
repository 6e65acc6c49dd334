"""What `bam-lora init` writes passes `bam-lora check`: every goal, five bases, ten languages, on a local Hub."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hub_fixtures import PatchedHub, patch_libraries, running
from recipe_hub import BASES, architecture, catalogue, comment, save_base, serve
from test_recipes_run import hub_id

from bam_lora import init_fit
from bam_lora.check_report import check_everything
from bam_lora.init import Flags, new_recipe
from bam_lora.languages import all_languages, choose_language
from bam_lora.recipe import Recipe, load_recipe

NAMES = ("qwen3-0.6b", "gemma-3-1b", "llama-3.2-1b", "olmo-2-1b", "smollm3-3b")
GOALS = ("pretrain-approximate", "pretrain-minimal", "single", "instruct")
WITH_CONVERSATIONS = ("Bulgarian", "arb", "Tamil")
LANGUAGES = (*WITH_CONVERSATIONS, "sr-Latn", "zh", "ckb", "Yoruba", "gsw", "iu_Cans", "no-test")


def written(folder: Path) -> dict[str, Recipe]:
    """A recipe of every language and goal that go together; of the first language with every base."""
    without_test = next(one.config for one in all_languages() if not one.has_test)
    found = {}
    for number, (language, goal) in enumerate(itertools.product(LANGUAGES, GOALS)):
        if goal == "instruct" and language not in WITH_CONVERSATIONS:
            continue
        config = without_test if language == "no-test" else choose_language(language).config
        for base in NAMES if number < len(GOALS) else [NAMES[number % len(NAMES)]]:
            file = folder / f"{config}-{goal}-{base}.yaml"
            hours = 0.5 if number % 2 else None
            new_recipe(Flags(config, base, goal, "12GB", hours), file, asking=False)
            found[file.stem] = load_recipe(file)
    return found


def add_bases(hub: PatchedHub, folder: Path, tokenizer: Path) -> list[str]:
    """Tiny ones with the context of real ones; returns the names of the gated ones."""
    gated = []
    for kind in sorted({architecture(base) for base in BASES}):
        config = save_base(folder / kind, kind, tokenizer) / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 8193}))
    for base in BASES:
        gated += [hub_id(base)] if "gated: ask" in comment(base) else []
        hub.add_model(hub_id(base), folder / architecture(base), gated=hub_id(base) in gated)
    return gated


@pytest.mark.slow
def test_what_init_writes_passes_check(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init_fit, "_config_on_hub", lambda model: None)
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    recipes = written(tmp_path)
    assert len(recipes) == len(GOALS) * len(NAMES) + 2 * len(GOALS) + 7 * 3
    with running(PatchedHub()) as hub:
        hub.home = tmp_path / "hf-home"
        patch_libraries(monkeypatch, hub.url, hub.home)
        gated = add_bases(hub, tmp_path, tiny_base)
        serve(hub, recipes.values())
        hub.log_in(hub.add_token("hf_of_who_has_access", user="somebody", access=(*gated, *catalogue())))
        for name, recipe in recipes.items():
            found = check_everything(recipe, gpu_memory="12GB", fit=False, measure=False)
            assert found.problems == (), name
            assert found.resources.steps is None or found.resources.steps > 0, name
