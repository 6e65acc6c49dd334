"""Conversations to packed rows: labels on the answers alone, nothing cut in their middle, every count adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import with_template
from conftest import ENGLISH, GERMAN, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from bam_lora import slicing
from bam_lora.chat import answers_only
from bam_lora.data import Layout, TrainingSource, prepare
from bam_lora.default_template import default_template
from bam_lora.errors import UserError
from bam_lora.packing import NOT_TRAINED, load_rows
from bam_lora.sources import TextSource

END = "<|im_end|>"


def chats(count: int, turns: int = 2) -> list[list[dict[str, str]]]:
    """Conversations whose answers are all different."""
    return [
        [
            message
            for turn in range(turns)
            for message in (
                {"role": "user", "content": GERMAN[(number + turn) % len(GERMAN)]},
                {"role": "assistant", "content": f"Antwort {number}, {turn}: schön."},
            )
        ]
        for number in range(count)
    ]


def write_chats(path: Path, conversations: list[list[dict[str, str]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


def answers(conversations: list[list[dict[str, str]]]) -> list[str]:
    return [m["content"] + END for messages in conversations for m in messages if m["role"] == "assistant"]


def chat_source(path: Path, role: str = "target", **options: Any) -> TrainingSource:
    return TrainingSource(TextSource(str(path), mode="chat"), role, **options)


@pytest.fixture(scope="module")
def tokenizer(story_tokenizer: Any) -> Any:
    return with_template(story_tokenizer, "chatml")


def make(folder: Path, sources: list[TrainingSource], tokenizer: Any, **options: Any) -> dict[str, Any]:
    layout = {"slices": 2, "sequence_length": 256, "slicing": "random", "replay_share": 0.0, "seed": 0, **options}
    return prepare(sources, Layout(**layout), tokenizer, folder, key="key", say=lambda text: None)


def documents_of(folder: Path, part: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of every document in a slice."""
    found = []
    for row in load_rows(folder, tuple(part["rows"])):
        start = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
        assert start == len(row["input_ids"]) == len(row["labels"])
    return found


def trained_text(documents: list[tuple[list[int], list[int]]], tokenizer: Any) -> list[str]:
    texts = [tokenizer.decode([token for token in labels if token != NOT_TRAINED]) for _, labels in documents]
    return [part + END for text in texts for part in text.split(END) if part]


def test_labels_are_the_answers_and_the_counts_add_up(tmp_path: Path, tokenizer: Any) -> None:
    conversations = chats(20)
    no_answer = [conversations[0][:1], [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]]
    path = write_chats(tmp_path / "chats.jsonl", conversations + no_answer)
    facts = make(tmp_path / "01", [chat_source(path)], tokenizer, slices=3)
    documents = [one for part in facts["slices"] for one in documents_of(tmp_path / "01", part)]
    assert sorted(trained_text(documents, tokenizer)) == sorted(answers(conversations))
    for ids, labels in documents:
        assert all(label in (token, NOT_TRAINED) for token, label in zip(ids, labels, strict=True))
    source = facts["sources"][0]
    counted = {"conversations": 22, "without_answer": 2, "cut": 0, "lost_answers": 0, "documents": 20}
    assert {name: source[name] for name in counted} == counted
    trained = sum(label != NOT_TRAINED for _, labels in documents for label in labels)
    assert sum(part["trained_tokens"] for part in facts["slices"]) == trained == source["answer_tokens"]
    tokens = sum(len(ids) for ids, _ in documents)
    assert sum(part["target_tokens"] for part in facts["slices"]) == tokens == source["used_tokens"]


def test_text_is_replayed_in_a_chat_run_with_all_its_tokens(tmp_path: Path, english_file: Path, tokenizer: Any) -> None:
    sources = [
        chat_source(write_chats(tmp_path / "chats.jsonl", chats(30))),
        TrainingSource(TextSource(str(english_file)), "replay"),
    ]
    facts = make(tmp_path / "01", sources, tokenizer, replay_share=0.2)
    for part in facts["slices"]:
        assert part["replay_tokens"] == round(part["target_tokens"] / 4)
        documents = documents_of(tmp_path / "01", part)
        texts = [(ids, labels) for ids, labels in documents if "miller" in tokenizer.decode(ids)]
        assert texts
        for ids, labels in texts:
            assert labels == [NOT_TRAINED, *ids[1:]]  # nothing predicts a document's first token
        trained = sum(label != NOT_TRAINED for _, labels in documents for label in labels)
        assert part["trained_tokens"] == trained


def test_replayed_conversations_stay_whole(tmp_path: Path, german_file: Path, tokenizer: Any) -> None:
    conversations = chats(60, turns=1)
    sources = [
        TrainingSource(TextSource(str(german_file)), "target"),
        chat_source(write_chats(tmp_path / "chats.jsonl", conversations), "replay"),
    ]
    facts = make(tmp_path / "01", sources, tokenizer, replay_share=0.3, slices=3)
    found = []
    for part in facts["slices"]:
        documents = [(ids, labels) for ids, labels in documents_of(tmp_path / "01", part) if ids[0] != 0]
        found += trained_text(documents, tokenizer)
        longest = max(len(ids) for ids, _ in documents)
        assert abs(part["replay_tokens"] - part["target_tokens"] * 3 / 7) <= longest
        assert part["replay_tokens"] == sum(len(ids) for ids, _ in documents)
    assert len(set(found)) == len(found)
    assert set(found) <= set(answers(conversations))
    assert facts["sources"][1]["used_tokens"] == sum(part["replay_tokens"] for part in facts["slices"])


def test_a_token_limit_takes_whole_conversations_and_an_extension_goes_on_behind_them(
    tmp_path: Path, tokenizer: Any
) -> None:
    conversations = chats(20)
    path = write_chats(tmp_path / "chats.jsonl", conversations)
    first = make(tmp_path / "01", [chat_source(path, tokens=700)], tokenizer, slicing="contiguous")
    used = first["sources"][0]["next_row"]
    assert 700 <= first["sources"][0]["used_tokens"] < 900
    rest = make(tmp_path / "02", [chat_source(path, skip_rows=used)], tokenizer, slicing="contiguous")
    texts = [
        trained_text(documents_of(tmp_path / name, part), tokenizer)
        for name, facts in (("01", first), ("02", rest))
        for part in facts["slices"]
    ]
    assert sorted(text for one in texts for text in one) == sorted(answers(conversations))


def test_long_conversations_are_cut_between_messages_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    conversations = chats(6, turns=6)
    path = write_chats(tmp_path / "chats.jsonl", conversations)
    facts = make(tmp_path / "01", [chat_source(path)], tokenizer, sequence_length=100)
    documents = [one for part in facts["slices"] for one in documents_of(tmp_path / "01", part)]
    assert sorted(trained_text(documents, tokenizer)) == sorted(answers(conversations))
    assert all(tokenizer.decode(ids).startswith("<|im_start|>user") for ids, _ in documents)
    assert facts["sources"][0]["cut"] == 6
    assert facts["sources"][0]["lost_answers"] == 0
    long = [{"role": "user", "content": " ".join(GERMAN[:4])}, {"role": "assistant", "content": "Zu spät."}]
    path = write_chats(tmp_path / "long.jsonl", [*conversations, long, long + conversations[0]])
    facts = make(tmp_path / "02", [chat_source(path)], tokenizer, sequence_length=100)
    source = facts["sources"][0]
    counted = {"conversations": 8, "without_answer": 1, "cut": 8, "lost_answers": 2}
    assert {name: source[name] for name in counted} == counted
    kept = [one for part in facts["slices"] for one in documents_of(tmp_path / "02", part)]
    assert sorted(trained_text(kept, tokenizer)) == sorted(answers([*conversations, conversations[0]]))


def test_conversations_are_sliced_by_a_column(tmp_path: Path, story_tokenizer: Any) -> None:
    """With a template that makes two sequences of a row."""
    tokenizer = with_template(story_tokenizer, "qwen3")
    rows = [{"messages": one, "language": ("de", "bg")[index % 2]} for index, one in enumerate(chats(16))]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = make(tmp_path / "01", [chat_source(path, group_column="language")], tokenizer, slicing="by_column")
    assert [part["group"] for part in facts["slices"]] == ["de", "bg"]
    for index, part in enumerate(facts["slices"]):
        documents = documents_of(tmp_path / "01", part)
        assert len(documents) == 16
        texts = sorted(text.removeprefix("<think>\n\n</think>\n\n") for text in trained_text(documents, tokenizer))
        assert texts == sorted(answers(chats(16)[index::2]))


def test_a_run_of_text_has_no_labels(tmp_path: Path, german_file: Path, tokenizer: Any) -> None:
    facts = make(tmp_path / "01", [TrainingSource(TextSource(str(german_file)), "target")], tokenizer)
    rows = load_rows(tmp_path / "01", (0, facts["slices"][-1]["rows"][1]))
    assert rows.column_names == ["input_ids", "seq_lengths"]
    trained = sum(part["trained_tokens"] for part in facts["slices"])
    assert trained == sum(length - 1 for lengths in rows["seq_lengths"] for length in lengths)


def test_no_answer_at_all_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    path = write_chats(tmp_path / "chats.jsonl", [chats(1)[0][:1]])
    with pytest.raises(UserError, match=r"expected conversations with answers, found none in 1 rows"):
        make(tmp_path / "01", [chat_source(path)], tokenizer)
    texts = write_jsonl(tmp_path / "texts.jsonl", ENGLISH)
    with pytest.raises(UserError, match=r"texts\.jsonl, row 1: expected chat data .*found columns text.*`mode: text`"):
        make(tmp_path / "02", [chat_source(texts)], tokenizer)


def test_another_template_makes_other_data(tmp_path: Path, story_tokenizer: Any, tokenizer: Any) -> None:
    path = write_chats(tmp_path / "chats.jsonl", chats(8))
    digests = {
        make(tmp_path / name, [chat_source(path)], one)["sources"][0]["chat_template"]
        for name, one in (("01", tokenizer), ("02", with_template(story_tokenizer, "marked")))
    }
    assert len(digests) == 2


def test_the_trainer_trains_what_the_labels_say(tmp_path: Path, tiny_base: Path) -> None:
    """In a real batch: after the shift no token is predicted from another document."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = with_template(AutoTokenizer.from_pretrained(tiny_base), "mistral")
    tokenizer.add_special_tokens({"additional_special_tokens": []})
    path = write_chats(tmp_path / "chats.jsonl", chats(12))
    facts = make(tmp_path / "01", [chat_source(path)], tokenizer, slices=1)
    rows = load_rows(tmp_path / "01", tuple(facts["slices"][0]["rows"]))
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.resize_token_embeddings(len(tokenizer))
    arguments = SFTConfig(
        str(tmp_path / "out"), packing=True, packing_strategy="bfd_split", max_length=256, use_cpu=True, bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True}, per_device_train_batch_size=2, report_to="none",
    )  # fmt: skip
    trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    seen: list[str] = []
    for batch in trainer.get_train_dataloader():
        ids, labels, places = (batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
        assert places.count(0) > 1, "several documents side by side"
        targets: list[int] = []
        for at in range(len(ids) - 1):  # the model's output at `at` is compared with labels[at + 1]
            if labels[at + 1] != NOT_TRAINED:
                assert labels[at + 1] == ids[at + 1]
                assert places[at + 1] == places[at] + 1, "the same document"
                targets.append(ids[at + 1])
        assert trainer.compute_loss(model, batch).isfinite()
        seen += [text for text in tokenizer.decode(targets).split("</s>") if text]
    assert sorted(seen) == sorted(f" {text.removesuffix(END)}" for text in answers(chats(12)))


def test_trl_takes_the_masks_of_answers_only(tmp_path: Path, tiny_base: Path) -> None:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = default_template(tokenizer)
    rows = answers_only(datasets.Dataset.from_list([{"messages": one} for one in chats(6)]), tokenizer, max_length=128)
    for packing in (False, True):
        arguments = SFTConfig(
            str(tmp_path / "out"), packing=packing, max_length=128, use_cpu=True, bf16=False, report_to="none"
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        texts = [tokenizer.decode([t for t in row["labels"] if t != NOT_TRAINED]) for row in trainer.train_dataset]
        said = [m["content"] for messages in chats(6) for m in messages[1::2]]
        assert sorted(text for one in texts for text in one.split("</s>") if text) == sorted(said)


_LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(lengths=_LENGTHS, amounts=st.lists(st.integers(0, 20), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_documents_are_made_whole_where_they_began(lengths: list[int], amounts: list[int], seed: int) -> None:
    import numpy as np

    stores = [np.asarray(lengths), np.asarray(lengths[::-1])]
    table = slicing.order(slicing.documents(stores), "random", seed)
    parts = slicing.deal_exactly(table, amounts)
    whole = slicing.uncut(parts, stores, [1])
    assert [len(part[part["store"] == 0]) for part in parts] == [len(part[part["store"] == 0]) for part in whole]
    documents = {(int(p["start"]), int(p["length"])) for p in slicing.documents(stores) if p["store"] == 1}
    found = [(int(p["start"]), int(p["length"])) for part in whole for p in part[part["store"] == 1]]
    assert set(found) <= documents
    assert len(set(found)) == len(found)
    begun = {int(p["start"]) for part in parts for p in part if p["store"] == 1 and p["length"]}
    assert {start for start, _ in found} >= {start for start in begun if start in {first for first, _ in documents}}


@given(lengths=_LENGTHS, tokens=st.integers(0, 60))
def test_as_many_whole_documents_as_hold_a_number_of_tokens(lengths: list[int], tokens: int) -> None:
    import numpy as np

    found = slicing.whole_documents(np.asarray(lengths), min(tokens, sum(lengths)))
    assert found in {0, *np.cumsum(lengths)}
    assert min(tokens, sum(lengths)) <= found < min(tokens, sum(lengths)) + max(lengths)
