"""Rows as users have them, and rows that are wrong."""

from __future__ import annotations

from typing import Any

import pytest
from chat_templates import ANSWER, SECOND, TURNS, encode, said, trained, with_template

from bam_lora.chat_rows import QUESTION_COLUMNS
from bam_lora.errors import UserError


def test_plain_prompt_and_completion(story_tokenizer: Any, trimmed_tokenizer: Any) -> None:
    row = encode(story_tokenizer, prompt="Frage: Wer da? Antwort:", completion=" Ich, wie üblich.")
    assert trained(row, story_tokenizer) == [[" Ich, wie üblich.</s>"]]
    assert (
        row.sequences[0].input_ids[: len(story_tokenizer("Frage: Wer da? Antwort:")["input_ids"])]
        == (story_tokenizer("Frage: Wer da? Antwort:")["input_ids"])
    )
    straddling = encode(story_tokenizer, prompt="the mill", completion="er went")
    assert trained(straddling, story_tokenizer) == [["er went</s>"]]
    spaced = encode(story_tokenizer, prompt="the miller ", completion="went")
    assert trained(spaced, story_tokenizer) == [["went</s>"]]
    assert trained(encode(trimmed_tokenizer, prompt="the miller ", completion="went"), trimmed_tokenizer) == [
        ["went</s>"]
    ]
    assert story_tokenizer.decode(spaced.sequences[0].input_ids) == "<s>the miller went</s>"


@pytest.mark.parametrize("completion", ["", "  ", None])
def test_no_completion_is_no_answer(completion: str | None, story_tokenizer: Any) -> None:
    row = {"prompt": "a", "completion": completion, "text": "b"}
    if completion is None:
        with pytest.raises(UserError, match="found columns completion, prompt, text"):
            encode(story_tokenizer, **row)
    else:
        assert encode(story_tokenizer, **row).sequences == ()


def test_sharegpt_and_alpaca(story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, "chatml")
    turns = [{"from": who, "value": t["content"]} for who, t in zip(("human", "gpt") * 2, TURNS, strict=True)]
    assert encode(tokenizer, conversations=turns) == encode(tokenizer, messages=TURNS)
    turns = [{"role": who, "text": t["content"]} for who, t in zip(("prompter", "assistant") * 2, TURNS, strict=True)]
    assert encode(tokenizer, conversation=turns) == encode(tokenizer, messages=TURNS)
    greeting = encode(tokenizer, conversations=[{"from": "gpt", "value": "Hallo!"}, *turns])
    assert trained(greeting, tokenizer) == [[said("chatml", ANSWER), said("chatml", SECOND)]]
    row = encode(tokenizer, instruction="Übersetze.", input="good", output="gut", system="")
    assert trained(row, tokenizer) == [["gut<|im_end|>"]]
    assert "Übersetze.\n\ngood<|im_end|>" in tokenizer.decode(row.sequences[0].input_ids)


@pytest.mark.parametrize("columns", QUESTION_COLUMNS)
def test_pairs_of_a_question_and_its_answer(columns: tuple[str, str], story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, "chatml")
    row = encode(tokenizer, **dict(zip(columns, ("Wer da?", "Ich."), strict=True)), id=3, language="deu")
    turns = [{"role": "user", "content": "Wer da?"}, {"role": "assistant", "content": "Ich."}]
    assert row == encode(tokenizer, messages=turns)
    assert trained(row, tokenizer) == [["Ich.<|im_end|>"]]


@pytest.mark.parametrize("left_out", [{"train": False}, {"weight": 0}, {"weight": 0.0, "train": None}])
def test_a_message_can_be_left_out(left_out: dict[str, Any], story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, "llama3")
    row = encode(tokenizer, messages=[TURNS[0], {**TURNS[1], **left_out}, *TURNS[2:]])
    assert trained(row, tokenizer) == [[said("llama3", SECOND)]]
    assert ANSWER in tokenizer.decode(row.sequences[0].input_ids)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a"}, "expected chat data in columns messages, .*found columns text"),
        ({"messages": "a"}, "row 1, messages: expected JSON"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "message 1, role: expected one of .*found 'robot'"),
        ({"messages": [{"speaker": "a"}]}, "message 1: expected role and content .*found keys speaker"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "expected text, found a part of type image"),
        ({"prompt": "a", "completion": [TURNS[1]]}, "expected prompt and completion both text.*found str and list"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}, "message 2, weight: expected 0 or 1, found 0.5"),
        ({"messages": TURNS, "tools": "{"}, "row 1, tools: expected JSON"),
        ({"instruction": 3, "output": "a"}, "row 1, instruction: expected text, found int"),
    ],
)
def test_wrong_rows_are_one_clear_line(row: dict[str, Any], words: str, story_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=words) as caught:
        encode(with_template(story_tokenizer, "chatml"), **row)
    assert "\n" not in str(caught.value)
