"""Continued pretraining on text, then instruction tuning from the finished run: one ledger, one model, one report."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import CHATML, GEMMA
from conftest import ENGLISH, GERMAN, write_jsonl
from test_chat_data import chats, write_chats

from bam_lora.chat_result import chat_files
from bam_lora.check import check_recipe
from bam_lora.errors import UserError
from bam_lora.evaluate import score
from bam_lora.loop import run
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.score_files import score_files
from bam_lora.scoring import SetSource, prepare_evaluation
from bam_lora.sources import TextSource

TRAINING = {
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "checkpointing": False,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_jsonl(folder / "german.jsonl", GERMAN[:16])
    write_jsonl(folder / "english.jsonl", ENGLISH[:60])
    write_jsonl(folder / "english.test.jsonl", ENGLISH[-3:])
    write_chats(folder / "chats.jsonl", [*chats(12), chats(1)[0][:1]])
    write_chats(folder / "chats.test.jsonl", chats(15)[12:])
    return folder


def recipe(base: Path, files: Path, mode: str, **data: Any) -> Recipe:
    chat = mode == "chat"
    return recipe_from_dict({
        "base": str(base),
        "output": "unused",
        "mode": mode,
        "data": {
            "target": [{"path": str(files / ("chats.jsonl" if chat else "german.jsonl"))}],
            "replay": [{"path": str(files / "english.jsonl"), "mode": "text"}],
            "replay_share": 0.2,
            "sequence_length": 128,
            **data,
        },
        "bam": {"slices": 2, "branches": 2},
        "lora": {"r": 4},
        "training": TRAINING,
        "evaluation": {
            "target": [{"path": str(files / "chats.test.jsonl"), "set": "answers", "mode": "chat"}] if chat else [],
            "source": [{"path": str(files / "english.test.jsonl"), "set": "english", "mode": "text"}],
            "samples": ["Wohin geht der Müller?"] if chat else [],
        },
    })  # fmt: skip


@pytest.fixture(scope="module")
def chained(tiny_base: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run on text, and one on conversations that starts from it."""
    root = tmp_path_factory.mktemp("runs")
    run(recipe(tiny_base, files, "text"), root / "text")
    run(recipe(root / "text", files, "chat"), root / "chat")
    return root / "text", root / "chat"


def test_one_ledger_one_model_one_report(chained: tuple[Path, Path], tiny_base: Path) -> None:
    chat = chained[1]
    ledger = json.loads((chat / "ledger.json").read_text())
    assert Path(ledger["base"]["name"]).name == tiny_base.name
    assert [len(ledger[part]) for part in ("inherited", "iterations")] == [1, 1]
    report = json.loads((chat / "report.json").read_text())
    scores = {(score["iteration"], score["set"]): score for score in report["scores"] if score["branch"] is None}
    assert scores[1, "answers"]["bits_per_byte"] < scores[0, "answers"]["bits_per_byte"]
    assert set(scores) == {(n, name) for n in (0, 1) for name in ("answers", "english")}
    samples = json.loads((chat / "samples.json").read_text())["samples"]
    assert [sample["iteration"] for sample in samples] == [0, 1]
    assert all("### " not in sample["text"] for sample in samples[1:]), "it stops at the end of its turn"
    assert (chat / "report.html").is_file()


def test_eval_scores_the_same_answers(chained: tuple[Path, Path], files: Path) -> None:
    scored = score_files(str(chained[1]), [str(files / "chats.test.jsonl")], None, chat=True)["scores"][0]
    report = json.loads((chained[1] / "report.json").read_text())
    last = next(s for s in report["scores"] if (s["iteration"], s["branch"], s["set"]) == (1, None, "answers"))
    assert scored["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-6)


def test_the_result_answers_as_it_was_trained(chained: tuple[Path, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text, chat = chained
    assert AutoTokenizer.from_pretrained(text / "model").chat_template is None
    tokenizer = AutoTokenizer.from_pretrained(chat / "model")
    model = AutoModelForCausalLM.from_pretrained(chat / "model", dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(chats(1)[0][:1], add_generation_prompt=True, return_tensors="pt")
    assert "### Assistant:\n" in tokenizer.decode(prompt["input_ids"][0])
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    written = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert written.shape[1] > prompt["input_ids"].shape[1]


def test_the_plan_counts_the_trained_tokens(chained: tuple[Path, Path]) -> None:
    for root in chained:
        plan = json.loads((root / "plan.json").read_text())
        slices = [one for part in plan["parts"] for one in part["slices"]]
        assert plan["data"]["trained_tokens"] == sum(one["trained_tokens"] for one in slices)
        for branch, one in zip(plan["iterations"][0]["branches"], slices, strict=True):
            assert branch["tokens"] == one["target_tokens"] + one["replay_tokens"]
            assert 0 < one["trained_tokens"] < branch["tokens"]
    assert plan["data"]["sources"][0]["without_answer"] == 1


def test_branches_train_on_answers_only(chained: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    from bam_lora.packing import load_rows

    chat = chained[1]
    tokenizer = AutoTokenizer.from_pretrained(chat / "model")
    plan = json.loads((chat / "plan.json").read_text())
    rows = load_rows(chat / "data" / "01", (0, plan["parts"][0]["slices"][-1]["rows"][1]))
    text = tokenizer.decode([t for row in rows["labels"] for t in row if t != -100])
    for messages in chats(12):
        assert messages[0]["content"] not in text
        assert messages[1]["content"] + "</s>" in text


def test_a_run_on_text_after_one_on_conversations_keeps_its_template(chained: tuple[Path, Path]) -> None:
    """The folded model has the files of the original base, which has no template."""
    from transformers import AutoTokenizer

    text, chat = (root / "model" for root in chained)
    tokenizer = AutoTokenizer.from_pretrained(chat)
    assert chat_files(text, chat, tokenizer, trained=False) == {"chat_template.jinja": tokenizer.chat_template}
    assert chat_files(text, text, tokenizer, trained=False) == {}
    assert chat_files(chat, chat, tokenizer, trained=True) == {}


def test_a_template_of_ones_own_and_where_it_stops(
    tiny_base: Path, files: Path, tmp_path: Path, chained: tuple[Path, Path]
) -> None:
    import shutil

    from transformers import AutoTokenizer

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})
    (tmp_path / "mine.jinja").write_text(CHATML.replace("<|im_end|>", "<pad>").replace("<|im_start|>", "# "))
    wanted = recipe(base, files, "chat", chat_template=str(tmp_path / "mine.jinja"))
    described = check_recipe(wanted)
    assert f"chat        chat template: {tmp_path / 'mine.jinja'}" in described
    assert "of the tokens are answers" in described
    assert "⟦Antwort 0, 0: schön." in described
    run(wanted, tmp_path / "run")
    result = tmp_path / "run" / "model"
    assert AutoTokenizer.from_pretrained(result).chat_template == (tmp_path / "mine.jinja").read_text()
    ends = json.loads((result / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<pad>")]
    assert json.loads((base / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    (tmp_path / "mine.jinja").write_text(GEMMA)
    shutil.rmtree(tmp_path / "run" / "data" / "01")
    shutil.rmtree(result)
    with pytest.raises(UserError, match=r"expected answers that end with a token of the tokenizer|planned with"):
        run(wanted, tmp_path / "run")


def test_scores_are_of_the_answers_alone(tiny_base: Path, tmp_path: Path) -> None:
    """Against log-probabilities taken one answer at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "# ")
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    conversations = chats(3)
    path = write_chats(tmp_path / "chats.jsonl", [*conversations, conversations[0][:1]])
    source = SetSource("answers", "target", TextSource(str(path), mode="chat"))
    options: dict[str, Any] = {"window_bytes": None, "overlap_bytes": None}
    kept = tmp_path / "evaluation.json"
    found = prepare_evaluation([source], tokenizer, kept, context_tokens=256, **options)
    path.unlink()
    again = prepare_evaluation([source], tokenizer, kept, context_tokens=256, **options)
    assert (again.key, again.windows) == (found.key, found.windows)
    nats, sizes = score(model, found.windows[0], pad=0, batch_size=4, dtype="float32")
    said = [m["content"] for messages in conversations for m in messages[1::2]]
    assert sizes.sum() == sum(len(text.encode()) for text in said)
    assert [document.split("\n\n") for document in found.sets[0].documents] == [said[i : i + 2] for i in (0, 2, 4)]
    expected = 0.0
    for messages in conversations:
        for upto in (1, 3):
            before = tokenizer.apply_chat_template(messages[:upto], add_generation_prompt=True)["input_ids"]
            answer = tokenizer(messages[upto]["content"])["input_ids"]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([before + answer])).logits[0].log_softmax(-1)
            expected -= sum(float(logits[len(before) - 1 + at, token]) for at, token in enumerate(answer))
    assert nats.sum() == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(nats.sum())
    # In a small context the oldest is left out and long answers are parted; every byte is still scored once.
    short = prepare_evaluation([source], tokenizer, None, context_tokens=16, read=lambda _: found.sets[0], **options)
    assert max(window.length for window in short.windows[0]) == 16
    tokens = [token for window in short.windows[0] for token in window.scored]
    assert tokens == [token for window in found.windows[0] for token in window.scored]
    assert np.isclose(sum(window.size_bytes for window in short.windows[0]), sizes.sum())
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("# ", "## ")
    changed = prepare_evaluation([source], other, None, context_tokens=256, read=lambda _: found.sets[0], **options)
    assert changed.key != found.key
