"""What a `BamTrainer` makes of the examples it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from trainer_runs import arguments, bam_trainer, lora, plain_adapter, rows, same
from transformers import AutoTokenizer

from bam_lora import BamConfig, BamTrainer, UserError
from bam_lora.store import read_record


def test_a_stream_is_cut_at_its_budget(tmp_path: Path, tiny_base: Path) -> None:
    read: list[int] = []

    def stream() -> Any:
        for number in range(10_000):
            read.append(number)
            yield {"text": GERMAN[number % len(GERMAN)]}

    def trainer(tokens: int | str | None) -> BamTrainer:
        return bam_trainer(
            tmp_path / "run", tiny_base, train_dataset=IterableDataset.from_generator(stream), replay_dataset=None,
            bam=BamConfig(slices=2, branches=2, tokens=tokens),
        )  # fmt: skip

    with pytest.raises(UserError, match="BamConfig"):
        trainer(None).train()
    read.clear()
    cut = trainer("3k")
    cut.train()
    assert len(read) < 1500
    plan = read_record(cut.directory.plan)
    assert plan is not None
    assert plan["data"]["target_tokens"] == 3000


TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}Antwort: {% generation %}{{ message.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}Frage: {{ message.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Antwort: {% endif %}"
)


@pytest.mark.parametrize("kind", ["prompt", pytest.param("formatting", marks=pytest.mark.slow), "messages"])
def test_other_examples_as_sft_trainer_takes_them(tmp_path: Path, tiny_base: Path, kind: str) -> None:
    if kind == "prompt":
        split = [text.partition(". ") for text in GERMAN]
        dataset = Dataset.from_dict({"prompt": [a + b for a, b, _ in split], "completion": [c for _, _, c in split]})
        others: dict[str, Any] = {}
        changes: dict[str, Any] = {"packing": False, "max_length": 128}
    elif kind == "messages":
        said = [text.partition(". ") for text in GERMAN]
        dataset = Dataset.from_dict({"messages": [
            [{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, _, b in said
        ]})  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        tokenizer.chat_template = TEMPLATE
        others = {"processing_class": tokenizer}
        changes = {"max_length": 128, "assistant_only_loss": True}
    else:
        dataset = Dataset.from_dict({"deutsch": GERMAN})
        others = {"formatting_func": lambda row: "Märchen: " + row["deutsch"]}
        changes = {"packing": False, "max_length": 128}
    trainer = BamTrainer(
        str(tiny_base), arguments(tmp_path / "run", **changes), BamConfig(slices=1, branches=1),
        train_dataset=dataset, peft_config=lora(), **others,
    )  # fmt: skip
    trainer.train()
    theirs = plain_adapter(tmp_path, tiny_base, arguments(tmp_path / "plain-run", **changes), dataset, **others)
    path = tmp_path / "run" / "iterations" / "01" / "branch-1" / "adapter" / "adapter_model.safetensors"
    same(load_file(path), theirs)


@pytest.mark.parametrize("slicing", ["by_dataset", "by_column"])
def test_one_branch_per_language(tmp_path: Path, tiny_base: Path, slicing: str) -> None:
    if slicing == "by_dataset":
        dataset: Any = {"de": rows(GERMAN), "en": rows(ENGLISH)}
        bam = BamConfig(slices=4, branches=2, slicing=slicing)
    else:
        languages = ["de"] * len(GERMAN) + ["en"] * len(ENGLISH)
        dataset = Dataset.from_dict({"text": GERMAN + ENGLISH, "lang": languages})
        bam = BamConfig(slices=4, branches=2, slicing=slicing, slicing_column="lang")
    trainer = bam_trainer(
        tmp_path / "run", tiny_base, train_dataset=dataset, replay_dataset=None, eval_dataset=None, bam=bam
    )
    trainer.train()
    plan = read_record(trainer.directory.plan)
    assert plan is not None
    assert [[branch["group"] for branch in one["branches"]] for one in plan["iterations"]] == [["de", "en"]] * 2
    data = Dataset.from_file(str(trainer.directory.data("01") / "rows.arrow"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    for one in plan["parts"][0]["slices"]:
        text = tokenizer.decode([token for row in data.select(range(*one["rows"])) for token in row["input_ids"]])
        assert ("freute" in text, "found" in text) == (one["group"] == "de", one["group"] == "en")
    if slicing == "by_column":
        bam = BamConfig(slices=4, slicing=slicing, slicing_column="language")
        with pytest.raises(UserError, match="'language'"):
            bam_trainer(tmp_path / "other", tiny_base, train_dataset=dataset, replay_dataset=None, bam=bam).train()


def test_answers_of_a_template_that_trl_does_not_know(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    talks = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b[:45].strip()},
         {"role": "user", "content": "Und dann?"}, {"role": "assistant", "content": c[20:60].strip()}]
        for a, b, c in zip(GERMAN[::3], GERMAN[1::3], GERMAN[2::3], strict=True)
    ]  # fmt: skip
    dataset = Dataset.from_dict({"messages": talks})
    trainer = bam_trainer(
        tmp_path / "run", tiny_base, train_dataset=dataset, replay_dataset=None, processing_class=tokenizer,
        args={"assistant_only_loss": True, "max_length": 256, "packing": False},
        eval_dataset={"target": dataset.select(range(3)), "source": rows(ENGLISH[:3])},
        bam=BamConfig(slices=2, branches=2),
    )  # fmt: skip
    output = trainer.train()
    data = Dataset.from_file(str(trainer.directory.data("01") / "rows.arrow"))
    trained = [[token for token in row["labels"] if token != -100] for row in data]
    assert sorted(tokenizer.decode(tokens) for tokens in trained) == sorted(
        f"{talk[1]['content']}</s>{talk[3]['content']}</s>" for talk in talks
    )
    assert output.metrics.keys() >= {"eval_target_bits_per_byte", "eval_source_bits_per_byte"}
    assert "eval_target_loss" in trainer.evaluate()


def test_examples_without_text_are_evaluated_by_their_loss(tmp_path: Path, tiny_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    ready = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in GERMAN]})
    trainer = bam_trainer(
        tmp_path / "run", tiny_base, train_dataset=ready, replay_dataset=None, eval_dataset={"target": ready},
        bam=BamConfig(slices=2, branches=2),
    )  # fmt: skip
    assert "eval_target_bits_per_byte" not in trainer.train().metrics
    assert trainer.evaluate().keys() >= {"eval_target_loss"}


def test_copies_and_evaluation_text_are_found(tmp_path: Path, tiny_base: Path, capsys: Any) -> None:
    doubled = rows(GERMAN + GERMAN[:5])
    given: dict[str, Any] = {"train_dataset": doubled, "replay_dataset": None, "eval_dataset": rows(GERMAN[::9])}
    trainer = bam_trainer(tmp_path / "warned", tiny_base, bam=BamConfig(slices=2), **given)
    trainer.train()
    assert "8 of 8 documents of evaluation set 'target' were found in the training sources" in capsys.readouterr().err
    assert "eval_loss" in trainer.evaluate()
    bam = BamConfig(slices=2, deduplicate="exact", contamination="drop")
    trainer = bam_trainer(tmp_path / "dropped", tiny_base, bam=bam, **given)
    trainer.train()
    plan = read_record(trainer.directory.plan)
    assert plan is not None
    (source,) = plan["data"]["sources"]
    assert source["rows"] == len(GERMAN) + 5
    assert source["documents"] == source["rows"] - sum(source["dropped"].values())
    assert source["dropped"]["contaminated"] >= 9  # the eight, a copy of one, and what is like them
    assert 1 <= source["dropped"]["duplicate"] <= 4
    with pytest.raises(UserError, match="evaluation set 'target'"):
        bam_trainer(tmp_path / "error", tiny_base, bam=BamConfig(slices=2, contamination="error"), **given).train()
