"""The demonstration: teach the embedded English base another language, as one run and as Branch-and-Merge."""

from __future__ import annotations

import json
import shlex
from importlib import resources
from pathlib import Path

from bam_lora.errors import UserError
from bam_lora.quickstart.stories import stories
from bam_lora.store import write_json, write_text

# Documents of each file; the seeds differ, so no evaluation story is a training story.
_DOCUMENTS = {"target.train": 400, "replay.train": 80, "target.test": 32, "source.test": 32}
_PROMPTS = {"german": "Am Abend", "bulgarian": "Една вечер"}

_RECIPE = """\
# What `bam-lora quickstart` ran, twice: as it is, and with --set strategy=single.
# Run it again with:  bam-lora run {folder}/recipe.yaml --output some/folder
base: {base}
output: {run}
data:
  target: [{{path: data/{language}.train.jsonl, tokens: 160k}}]
  replay: [{{path: data/english.train.jsonl}}]
  replay_share: 0.1
  sequence_length: 128
bam: {{slices: 4, branches: 2}}
lora: {{r: 32}}
training:
  learning_rate: 4.0e-3
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
  warmup_steps: 0.05
  checkpointing: false
evaluation:
  target: [{{path: data/{language}.test.jsonl, set: {language}}}]
  source: [{{path: data/english.test.jsonl, set: english}}]
  samples: ["{prompt}", "Once upon a time"]
"""


def quickstart(output: Path, language: str = "german") -> str:
    """Runs the demonstration into a folder; a second call goes on with what is there.

    Args:
        output: Gets `data/`, `recipe.yaml`, `single/`, `bam/`, `compare.json`, `report.json`, `report.html`.
        language: "german" or "bulgarian".

    Returns:
        The text for the terminal: what each run learned and forgot, a sample before and after, what to do next.

    Raises:
        UserError: If the language is not one of the two, or the folder cannot be written.
    """
    if language not in _PROMPTS:
        raise UserError.of("--language", expected="german or bulgarian", found=language, remedy="Choose one of them")
    from bam_lora.loop import run
    from bam_lora.progress import RunProgress
    from bam_lora.recipe import load_recipe
    from bam_lora.report import compare, render_html, render_text

    recipe_file = _write_inputs(output, language)
    folders = {strategy: output / strategy for strategy in ("single", "bam")}
    for strategy, folder in folders.items():
        recipe = load_recipe(recipe_file, [f"strategy={strategy}"], str(folder))
        run(recipe, folder, progress=RunProgress(title=strategy))
    comparison = compare(list(folders.values()))
    write_json(output / "compare.json", comparison)
    write_json(output / "report.json", comparison["runs"][-1])
    write_text(output / "report.html", render_html(comparison["runs"], comparison))
    return "\n\n".join(
        [render_text(comparison["runs"], comparison), _samples(comparison["runs"][-1]), _what_next(output)]
    )


def _write_inputs(output: Path, language: str) -> Path:
    """Writes the stories and the recipe; refuses a folder that another language or something else has used."""
    recipe_file = output / "recipe.yaml"
    base = resources.files("bam_lora.quickstart") / "base"
    folder = output.absolute()
    quoted = {name: json.dumps(str(value)) for name, value in (("base", base), ("run", folder / "bam"))}
    text = _RECIPE.format(folder=folder, language=language, prompt=_PROMPTS[language], **quoted)
    if recipe_file.exists() and recipe_file.read_text(encoding="utf-8") != text:
        raise UserError.of(
            str(output),
            expected="a new folder, or this quickstart's own",
            found="another one's recipe.yaml",
            remedy="Choose another --output",
        )
    for seed, (name, documents) in enumerate(_DOCUMENTS.items(), start=1):
        role, part = name.split(".")
        spoken = language if role == "target" else "english"
        lines = (json.dumps({"text": story}, ensure_ascii=False) for story in stories(spoken, documents, seed))
        write_text(output / "data" / f"{spoken}.{part}.jsonl", "\n".join(lines) + "\n")
    write_text(recipe_file, text)
    return recipe_file


def _samples(report: dict[str, object]) -> str:
    samples = report["samples"]
    assert isinstance(samples, list)
    prompt = samples[0]["prompt"]
    lines = [f"“{prompt}”, continued"]
    for sample in (one for one in samples if one["prompt"] == prompt):
        when = "after " if sample["iteration"] else "before"
        lines.append(f"  {when}: {prompt}{' '.join(sample['text'].split())[:240]}")
    return "\n".join(lines)


def _what_next(output: Path) -> str:
    return (
        f"The report is {output / 'report.html'}, the model {output / 'bam' / 'model'}.\n"
        "Now a real one, on a GPU with 12 GB:\n"
        f"  bam-lora run {shlex.quote(str(_real_recipe()))} --output runs/german"
    )


def _real_recipe() -> Path:
    """The first real recipe: in the checkout where there is one, else as the wheel carries it."""
    checkout = Path("recipes/german/pretrain.yaml")
    return checkout if checkout.is_file() else Path(str(resources.files("bam_lora"))) / checkout
