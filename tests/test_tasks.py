"""Benchmarks by lm-evaluation-harness on a loaded model: the numbers of a plain loop, and nothing else touched."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_kinds import documents, write_task

from bam_lora.base import Loading, load_model, load_tokenizer
from bam_lora.errors import UserError
from bam_lora.task_scores import task_line
from bam_lora.tasks import TaskSpec, find_tasks, score_task

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "german")
    write_task(folder, "english")
    return folder


@pytest.mark.parametrize("language", ["german", "english"])
def test_accuracy_is_that_of_a_plain_loop(language: str, tiny_base: Path, files: Path) -> None:
    """acc: the likeliest ending; acc_norm: the likeliest for its length in characters. One text at a time, float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for one in documents(language, 15):
        totals = []
        for choice in one["choices"]:  # type: ignore[attr-defined]
            before = tokenizer(one["question"])["input_ids"]
            ids = torch.tensor([tokenizer(f"{one['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                logs = torch.log_softmax(plain(ids).logits[0].double(), dim=-1)
            totals.append(sum(float(logs[at - 1, ids[0, at]]) for at in range(len(before), ids.shape[1])))
        lengths = [len(choice) for choice in one["choices"]]  # type: ignore[attr-defined]
        right["acc"].append(float(np.argmax(totals) == one["label"]))
        right["acc_norm"].append(float(np.argmax(np.array(totals) / lengths) == one["label"]))
    assert 0 < np.mean(right["acc"]) < 1, "all answers alike: the test shows too little"
    found = find_tasks([TaskSpec(str(files / f"what_{language}.yaml"))])[0]
    model = load_model(tiny_base, Loading(16, compute_dtype="float32"))
    scores = score_task(model, tokenizer, found, batch_size=4, dtype="float32")
    assert {one["metric"]: one["per_document"] for one in scores["results"]} == right
    for one in scores["results"]:
        count = len(right[one["metric"]])
        assert one["value"] == pytest.approx(np.mean(right[one["metric"]]))
        assert one["stderr"] == pytest.approx(np.std(right[one["metric"]], ddof=1) / np.sqrt(count))
        assert (one["documents"], one["num_fewshot"]) == (15, 0)
    assert scores["truncated"] == 0


def test_scoring_leaves_tokenizer_and_generators_as_they_were(tiny_base: Path, files: Path) -> None:
    import torch

    tokenizer = load_tokenizer(tiny_base)
    tokenizer.pad_token = None
    model = load_model(tiny_base, Loading(16))
    found = find_tasks([TaskSpec(str(files / "what_german.yaml"), limit=2)])[0]
    torch.manual_seed(7)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    seen: list[tuple[int, int]] = []
    score_task(
        model, tokenizer, found, batch_size=4, dtype="bfloat16", on_progress=lambda done, of: seen.append((done, of))
    )
    assert tokenizer.pad_token is None
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert after == states
    assert seen[0] == (4, 6)
    assert seen[-1] == (6, 6)


def test_prompts_longer_than_the_context_are_counted(tiny_base: Path, files: Path) -> None:
    model, tokenizer = load_model(tiny_base, Loading(16)), load_tokenizer(tiny_base)
    found = find_tasks([TaskSpec(str(files / "what_german.yaml"), limit=3, num_fewshot=4)])[0]
    scores = score_task(model, tokenizer, found, batch_size=4, dtype="float32")
    assert scores["truncated"] == 9
    assert scores["results"][0]["num_fewshot"] == 4
    assert "9 prompts were cut" in task_line(scores)


WRITTEN = """task: written
dataset_path: json
dataset_kwargs: {data_files: {test: written.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["</s>"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def test_what_is_written_is_what_the_model_writes_greedily(tiny_base: Path, tmp_path: Path) -> None:
    """The answer to the first question is what `generate` writes, to the second it is not; the third is too long."""
    import torch

    model, tokenizer = load_model(tiny_base, Loading(16, compute_dtype="float32")), load_tokenizer(tiny_base)
    questions = ["The miller went to the river", "The fox found", "The baker went to the market. " * 60]
    ids = tokenizer(questions[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    answers = [tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), "nothing", "nothing"]
    lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in zip(questions, answers, strict=True)]
    (tmp_path / "written.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "written.yaml").write_text(WRITTEN, encoding="utf-8")
    found = find_tasks([TaskSpec(str(tmp_path / "written.yaml"))])[0]
    scores = score_task(model, tokenizer, found, batch_size=2, dtype="float32")
    (one,) = scores["results"]
    assert (one["metric"], one["per_document"]) == ("exact_match", [1.0, 0.0, 0.0])
    assert scores["truncated"] == 1


def test_conversations_go_through_the_chat_template(tiny_base: Path, files: Path) -> None:
    model, tokenizer = load_model(tiny_base, Loading(16)), load_tokenizer(tiny_base)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    asked: list[str] = []
    real = tokenizer.apply_chat_template

    def asking(messages: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(messages[-1]["content"])
        return real(messages, *args, **kwargs)

    found = find_tasks([TaskSpec(str(files / "what_german.yaml"), limit=2)])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tokenizer), "apply_chat_template", lambda self, *a, **k: asking(*a, **k))
        score_task(model, copy.copy(tokenizer), found, batch_size=4, dtype="float32", chat=True)
        score_task(model, copy.copy(tokenizer), found, batch_size=4, dtype="float32")
    assert {text.strip() for text in asked} == {str(one["question"]) for one in documents("german", 2)}


GROUP = """group: both
task: [what_german, what_english]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


@pytest.mark.parametrize("kind", ["group", *(pytest.param(k, marks=pytest.mark.slow) for k in ("loose group", "tag"))])
def test_a_group_is_one_score_if_its_tasks_add_up_to_one(
    kind: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    for language, count in (("german", 6), ("english", 3)):
        path = write_task(tmp_path, language, count=count)
        text = path.read_text(encoding="utf-8").replace("{test: ", f"{{test: {tmp_path}/")
        path.write_text(text + ("tag: both\n" if kind == "tag" else ""), encoding="utf-8")
    if kind != "tag":
        text = GROUP if kind == "group" else GROUP[: GROUP.index("aggregate")]
        (tmp_path / "both.yaml").write_text(text, encoding="utf-8")
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr("bam_lora.tasks._all_tasks", lambda: manager)
    model, tokenizer = load_model(tiny_base, Loading(16)), load_tokenizer(tiny_base)
    scores = score_task(model, tokenizer, find_tasks([TaskSpec("both", 1)])[0], batch_size=4, dtype="float32")
    found = [(one["task"], one["metric"], one["documents"], one["num_fewshot"]) for one in scores["results"]]
    if kind == "group":
        assert found == [("both", "acc", 9, 1)]
        assert scores["results"][0]["stderr"] > 0
    else:
        german, english = ([("what_" + name, metric, count, 1) for metric in ("acc", "acc_norm")]
                           for name, count in (("german", 6), ("english", 3)))  # fmt: skip
        assert sorted(found) == sorted(german + english)
    assert scores["name"] == "both"


def test_more_examples_than_there_are_documents(tiny_base: Path, files: Path) -> None:
    found = find_tasks([TaskSpec(str(files / "what_german.yaml"), limit=3, num_fewshot=400)])[0]
    with pytest.raises(UserError, match="task 'what_german': expected one that can be done, found ValueError: Sample"):
        score_task(load_model(tiny_base, Loading(16)), load_tokenizer(tiny_base), found, batch_size=4, dtype="float32")
