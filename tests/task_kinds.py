"""Small multiple-choice tasks in German and English, in the harness's own format, for the tests."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import ENGLISH, GERMAN

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {name}.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
_SPLIT = {"german": (GERMAN, " ging "), "english": (ENGLISH, " went ")}


def documents(language: str, count: int) -> list[dict[str, object]]:
    """How a sentence of the tests' own goes on, out of three ends; what differs in them is the thing that is found."""
    sentences, middle = _SPLIT[language]
    found = []
    for number in range(count):
        picked = [sentences[(7 * number + step) % len(sentences)].partition(middle) for step in (0, 5, 10)]
        ends = [end for _, _, end in picked]
        order = sorted(range(3), key=lambda place: (place + number) % 3)
        found.append(
            {
                "question": picked[0][0] + middle.rstrip(),
                "choices": [ends[place] for place in order],
                "label": order.index(0),
            }
        )
    return found


def write_task(folder: Path, language: str, *, count: int = 15, name: str | None = None, text: str = TASK) -> Path:
    """A task file and its data; the path of the task file."""
    name = name or f"what_{language}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in documents(language, count)]
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(text.format(name=name), encoding="utf-8")
    return path
