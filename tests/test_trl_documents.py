"""The scripts in the README, in docs/trl.md and in the notebook run, with something tiny in the place of the Hub's.

What is exchanged, and nothing else: the Hub ids of models for a tiny base's folder, `datasets.load_dataset` for a few
rows of the form that the named data set has, thousands of rows for twenty, and the GPU for the CPU. In the notebook
also what only Jupyter has.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import conftest
import datasets
import pytest
import trl
from test_docs import README, ROOT, blocks, options

GUIDE = ROOT / "docs" / "trl.md"
NOTEBOOK = ROOT / "examples" / "bam_colab.ipynb"
HUB_MODEL = re.compile(r'"Qwen/[\w.-]+"')
ENGLISH, GERMAN = conftest.ENGLISH[:32], conftest.GERMAN[:32]
TALKS = [[{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:]}] for text in GERMAN]
HUB_DATA = {
    "HuggingFaceFW/fineweb-2": {"text": GERMAN, "id": GERMAN},
    "HuggingFaceFW/fineweb-edu": {"text": ENGLISH, "id": ENGLISH},
    "trl-lib/Capybara": {"messages": TALKS},
    "trl-lib/ultrafeedback_binarized": {
        "chosen": TALKS,
        "rejected": [[talk[0], {"role": "assistant", "content": ENGLISH[0]}] for talk in TALKS],
    },
}
TEMPLATE = "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"


def tiny_load_dataset(path: str, name: str | None = None, *, split: str, streaming: bool = False) -> Any:
    columns = HUB_DATA[path]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if streaming:  # without an end, as those of the Hub seem
        return datasets.IterableDataset.from_generator(lambda: (row for _ in range(100) for row in rows))
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def tiny_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_base: Path) -> str:
    """A place to run scripts in; gives the folder of a tiny base with a chat template."""
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))  # as those shown have
    (base / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setattr(datasets, "load_dataset", tiny_load_dataset)
    for configuration in (trl.SFTConfig, trl.DPOConfig):
        monkeypatch.setattr(configuration, "__init__", on_cpu(configuration.__init__))
    monkeypatch.chdir(tmp_path)
    return str(base)


def on_cpu(initialise: Any) -> Any:
    def with_cpu(self: Any, *args: Any, **given: Any) -> None:
        initialise(self, *args, **{**given, "use_cpu": True, "bf16": False, "fp16": False})

    return with_cpu


def execute(source: str, base: str, names: dict[str, Any]) -> None:
    source, found = HUB_MODEL.subn(lambda match: repr(base), source)
    source = re.sub(r"\b\d+_000\b", "20", source)
    exec(compile(source, "block", "exec"), names)
    names["replaced"] = names.get("replaced", 0) + found


def sides(diff: str) -> tuple[str, str]:
    """A diff's text before and after."""
    kept = [
        "\n".join(line[1:] for line in diff.splitlines() if line[:1] in (mark, " ", "")) + "\n" for mark in ("-", "+")
    ]
    return kept[0], kept[1]


def test_the_guide_and_the_readme_show_the_same_change() -> None:
    (shown,) = blocks(README, "diff")
    assert shown == blocks(GUIDE, "diff")[0]
    before, after = sides(shown)
    assert "SFTTrainer(" in before
    assert "bam" not in before
    changed = [line for line in shown.splitlines() if line[:1] in ("-", "+")]
    assert changed == [
        "-from trl import SFTTrainer", "+from bam_lora import BamConfig, BamTrainer",
        "-trainer = SFTTrainer(", "+trainer = BamTrainer(", "+    bam=BamConfig(slices=4, branches=2),",
    ]  # fmt: skip
    assert after.count("BamTrainer") == 2


def test_the_readmes_script_runs_before_and_after(tiny_world: str) -> None:
    before, after = sides(blocks(README, "diff")[0])
    for script, name in ((before, "base-SFT"), (after, "base-BaM")):
        execute(script, tiny_world, {})
        assert Path(name).is_dir()
    report = json.loads(Path("base-BaM/report.json").read_text())
    assert len(report["iterations"]) == 2


def test_the_guides_scripts_run(tiny_world: str) -> None:
    names: dict[str, Any] = {}
    shown = blocks(GUIDE, "python")
    assert len(shown) >= 6
    for block in shown:
        execute(block, tiny_world, names)
    assert names["replaced"] >= 6
    assert Path("german-adapter/adapter_config.json").is_file()
    assert Path("german-model/model.safetensors").is_file()
    scores = json.loads(Path("runs/german/report.json").read_text())["scores"]
    assert {score["role"] for score in scores} == {"target", "source"}


def cells() -> list[str]:
    """The notebook's code cells; magics and shell commands are dropped."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    return ["".join(line for line in cell["source"] if line[:1] not in ("%", "!")) for cell in code]


def test_the_notebooks_cells_compile_and_its_commands_exist() -> None:
    assert len(cells()) >= 8
    for cell in cells():
        ast.parse(cell)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "Not measured" in text
    for command in re.findall(r"!bam-lora ([^\"\\]+)", text):
        first, *rest = command.split()
        assert {word for word in rest if word.startswith("--")} <= options()[first]


@pytest.mark.slow
def test_the_notebook_runs(tiny_world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jupyter = types.ModuleType("IPython.display")
    shown: list[str] = []
    jupyter.HTML, jupyter.display = str, shown.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", jupyter)
    names: dict[str, Any] = {}
    for cell in cells():
        if "torch.cuda" not in cell:
            execute(cell.replace('"3M"', '"3k"').replace("(200)", "(4)"), tiny_world, names)
    assert names["replaced"] == 1
    assert "bits per byte" in shown[0]
    assert json.loads(Path("runs/qwen/report.json").read_text())["cost"]["train_tokens"] == 3750
