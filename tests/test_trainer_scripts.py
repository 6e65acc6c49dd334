"""`BamTrainer` in scripts as TRL's users write them: what they pass, and what they call afterwards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENGLISH, GERMAN, write_jsonl
from datasets import Dataset, IterableDataset, load_dataset
from safetensors.torch import load_file
from trainer_runs import arguments, lora, plain_adapter, rows, same
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from bam_lora import BamConfig, BamTrainer, UserError
from bam_lora.store import MANIFEST


def trainer(folder: Path, base: Any, *, args: dict[str, Any] | None = None, **others: Any) -> BamTrainer:
    given: dict[str, Any] = {
        "train_dataset": rows(GERMAN[::2]), "peft_config": lora(), "bam": BamConfig(slices=2, branches=2),
    }  # fmt: skip
    return BamTrainer(base, arguments(folder, **(args or {})), **{**given, **others})


def test_the_script_that_trl_comes_with(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Api:
        def __init__(self, token: str | None) -> None:
            pass

        def create_repo(self, name: str, **details: Any) -> Any:
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, *, run_as_future: bool, **details: Any) -> str:
            assert not run_as_future
            return (Path(details["folder_path"]) / "README.md").read_text()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    loading = {"revision": "main", "trust_remote_code": False, "attn_implementation": None, "dtype": "float32"}
    ours = trainer(tmp_path / "run", str(tiny_base), args={"model_init_kwargs": loading}, quantization_config=None)
    ours.train(resume_from_checkpoint=ours.args.resume_from_checkpoint)
    ours.accelerator.print("trained")
    ours.save_model(ours.args.output_dir)
    AutoModelForCausalLM.from_pretrained(ours.args.output_dir)
    assert trainer(tmp_path / "run", str(tiny_base), args={"model_init_kwargs": loading}).train().global_step
    card = ours.push_to_hub(dataset_name="me/stories", tags="bulgarian")
    assert "datasets:\n- me/stories\n" in card
    assert "tags:\n- bulgarian\n" in card
    assert ours.hub_model_id == "run"
    ours.end()


def test_evaluation_and_selection_sets_may_share_their_names(tmp_path: Path, tiny_base: Path) -> None:
    ours = trainer(
        tmp_path / "run", str(tiny_base), bam=BamConfig(slices=2, branches=2, weights="learned"),
        selection_dataset={"target": rows(GERMAN[1::8]), "source": rows(ENGLISH[1::8])},
        eval_dataset={"target": rows(GERMAN[3::8]), "source": rows(ENGLISH[3::8])},
    )  # fmt: skip
    ours.train()
    for name, own, foreign in (("evaluation", GERMAN[3], GERMAN[1]), ("selection", GERMAN[1], GERMAN[3])):
        kept = json.loads((tmp_path / "run" / "data" / f"{name}.json").read_text())
        text = json.dumps(kept, ensure_ascii=False)
        assert (own in text, foreign in text) == (True, False), name


def test_keys_of_bam_that_do_not_exist(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(UserError, match=r"bam, key 'slice': .* Write 'slices'"):
        trainer(tmp_path / "run", str(tiny_base), bam={"slice": 2})
    assert trainer(tmp_path / "run", str(tiny_base), bam={"slices": 3}).bam == BamConfig(slices=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("length", [None, 1024])
def test_a_limit_beyond_the_context_is_the_plain_trainers(tmp_path: Path, tiny_base: Path, length: int | None) -> None:
    changes = {"max_length": length, "packing": False}
    ours = trainer(tmp_path / "run", str(tiny_base), args=changes, bam=BamConfig(slices=1, branches=1))
    ours.train()
    theirs = plain_adapter(tmp_path, tiny_base, arguments(tmp_path / "plain-run", **changes), rows(GERMAN[::2]))
    path = tmp_path / "run" / "iterations" / "01" / "branch-1" / "adapter" / "adapter_model.safetensors"
    same(load_file(path), theirs)


def test_a_stream_can_be_evaluated(tmp_path: Path, tiny_base: Path) -> None:
    held_out = write_jsonl(tmp_path / "held-out.jsonl", GERMAN[1::8])
    from_file = load_dataset(
        "json", data_files=str(held_out), split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )
    generated = IterableDataset.from_generator(lambda: ({"text": text} for text in ENGLISH[::9]))
    ours = trainer(
        tmp_path / "run", str(tiny_base), args={"eval_strategy": "epoch"},
        eval_dataset={"target": from_file, "source": generated},
    )  # fmt: skip
    ours.train()
    losses = {name for entry in ours.state.log_history for name in entry if name.endswith("_loss")}
    assert losses >= {"eval_target_loss", "eval_source_loss"}
    assert ours.evaluate(generated)["eval_loss"] == pytest.approx(ours.evaluate()["eval_source_loss"], rel=1e-6)


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            control.should_training_stop = True


def test_a_callback_may_end_a_branch(tmp_path: Path, tiny_base: Path) -> None:
    ours = trainer(tmp_path / "run", str(tiny_base), callbacks=[StopAt])
    ours.train()
    for branch in (1, 2):
        done = json.loads((ours.directory.branch(1, branch) / MANIFEST).read_text())
        assert done["facts"]["steps"] == 3
    assert ours.directory.model.is_dir()


def test_a_loaded_model_and_the_environment_are_as_they_were(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    ours = trainer(
        tmp_path / "run", model, bam=BamConfig(slices=2, base=str(tiny_base)), eval_dataset=rows(GERMAN[1::9])
    )
    ours.evaluate()
    ours.train()
    assert model.training
    assert model.model.layers[0].training
    assert [name for name, one in model.named_parameters() if not one.requires_grad] == ["model.embed_tokens.weight"]
    assert "WANDB_RUN_GROUP" not in os.environ  # the next trainer's runs are another group


@pytest.mark.slow
def test_a_stream_has_its_budget_in_words_and_of_what_is_left_of_its_examples(tmp_path: Path, tiny_base: Path) -> None:
    stream = IterableDataset.from_generator(lambda: ({"text": GERMAN[i % len(GERMAN)]} for i in range(2000)))
    ours = trainer(
        tmp_path / "run", str(tiny_base), args={"max_length": 16, "packing": False}, train_dataset=stream,
        bam=BamConfig(slices=2, tokens="8k"),
    )  # fmt: skip
    ours.train()
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["data"]["target_tokens"] == 8000


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}Q: {{ m.content }} {% endif %}{% endfor %}"
)


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")  # TRL still takes it
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_examples_that_are_cut_to_nothing_are_left_out_of_the_shares(
    tmp_path: Path, tiny_base: Path, mode: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = TEMPLATE
    question, answer = {"role": "user", "content": "w" * 200}, {"role": "assistant", "content": "Ja."}
    turns = [question, answer] if mode == "keep_start" else [answer, question]
    short = [{"role": "user", "content": "Was?"}]
    talks = Dataset.from_dict({"messages": [
        turns if i % 3 == 0 else [*short, {"role": "assistant", "content": text}] for i, text in enumerate(GERMAN)
    ]})  # fmt: skip
    changes = {"max_length": 64, "packing": False, "assistant_only_loss": True, "truncation_mode": mode}
    ours = trainer(
        tmp_path / "run", str(tiny_base), args=changes, train_dataset=talks, replay_dataset=rows(ENGLISH),
        processing_class=tokenizer,
    )  # fmt: skip
    ours.train()
    part = json.loads((tmp_path / "run" / "plan.json").read_text())["parts"][0]
    assert [source["untrained_documents"] for source in part["sources"]] == [24, 0]
    data = Dataset.from_file(str(ours.directory.data("01") / "rows.arrow"))
    for one in part["slices"]:
        assert one["dropped_tokens"] == 0
        assert one["replay_tokens"] == round(one["target_tokens"] / 4)
        kept = data.select(range(*one["rows"]))["input_ids"]
        assert sum(map(len, kept)) == one["target_tokens"] + one["replay_tokens"]
    none = talks.filter(lambda row: row["messages"] == turns)
    with pytest.raises(UserError, match=r"raise args\.max_length"):
        trainer(tmp_path / "none", str(tiny_base), args=changes, train_dataset=none, processing_class=tokenizer).train()


def test_its_recipe_is_not_checked_without_the_script(tmp_path: Path, tiny_base: Path) -> None:
    from bam_lora.check import check_recipe

    with pytest.raises(UserError, match="one that BamTrainer wrote"):
        check_recipe(trainer(tmp_path / "run", str(tiny_base)).recipe)


def test_another_prompt_or_tokenizer_is_another_run(tmp_path: Path, tiny_base: Path) -> None:
    def made(prompt: str, token: str | None = None) -> BamTrainer:
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        if token is not None:
            tokenizer.pad_token = token
        return trainer(
            tmp_path / "run", str(tiny_base), formatting_func=lambda row: prompt + row["text"],
            processing_class=tokenizer,
        )  # fmt: skip

    made("Es war: ").train()
    made("Es war: ").train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="other values for formatting_func"):
        made("Es ist: ").train()
    with pytest.raises(UserError, match="other values for tokenizer"):
        made("Es war: ", "</s>").train()


def test_every_row_of_a_data_set_counts() -> None:
    from bam_lora.trainer_sets import fingerprint

    texts = [f"{number} {text}" for number in range(40) for text in GERMAN]
    whole = rows(texts)
    assert (
        fingerprint(whole)
        == fingerprint(rows(texts))
        == fingerprint(rows(["x", *texts]).select(range(1, len(texts) + 1)))
    )
    texts[3] += "!"
    assert fingerprint(whole) != fingerprint(rows(texts))
