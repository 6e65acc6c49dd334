"""The trained tokens are the answers: asserted on decoded text, for the templates in use."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from chat_templates import (
    ANSWER,
    END,
    MARKED,
    QUESTION,
    SECOND,
    SYSTEM,
    TEMPLATES,
    TOOL_TURNS,
    TOOLS,
    TURNS,
    encode,
    said,
    trained,
    with_template,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from bam_lora.chat import answers_only
from bam_lora.chat_encoder import ChatEncoder
from bam_lora.errors import UserError


@pytest.fixture(scope="module")
def metaspace() -> Any:
    """A BPE with ▁ for spaces, which puts one before a text, as Llama 2's and Mistral's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([QUESTION, ANSWER[:20], SYSTEM] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_trained_text_is_the_answers(name: str, story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, name)
    row = encode(tokenizer, messages=TURNS)
    texts = trained(row, tokenizer)
    if name == "qwen3":  # the first answer has its thoughts only while it is the last
        assert texts == [[said(name, ANSWER)], [said(name, SECOND)]]
    else:
        assert texts == [[said(name, ANSWER), said(name, SECOND)]]
    for sequence, upto in zip(row.sequences, (2, 4) if name == "qwen3" else (4,), strict=True):
        whole = tokenizer.apply_chat_template(TURNS[:upto])["input_ids"]
        assert whole[: len(sequence.input_ids)] == sequence.input_ids, "as the template gives it, no second BOS"
        prompt = tokenizer.apply_chat_template(TURNS[: upto - 1], add_generation_prompt=True)["input_ids"]
        assert sequence.input_ids[: len(prompt)] == prompt, "what inference shows"
        assert sequence.mask[len(prompt)] == 1
        assert sum(sequence.mask[len(prompt) :]) == len(sequence.input_ids) - len(prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_other_kinds_of_tokenizers(name: str, trimmed_tokenizer: Any, metaspace: Any) -> None:
    for kind in (trimmed_tokenizer, metaspace):
        tokenizer = with_template(kind, name)
        texts = [text for texts in trained(encode(tokenizer, messages=TURNS), tokenizer) for text in texts]
        assert texts == [said(name, ANSWER), said(name, SECOND)], kind
        spaced = [TURNS[0], {"role": "assistant", "content": "  Ja."}]
        texts = trained(encode(tokenizer, messages=spaced), tokenizer)[0]
        assert texts == [said(name, "Ja." if name in ("llama3", "gemma") else "  Ja.")], kind


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("gemma", "qwen3")])
def test_system_prompts_are_context(name: str, story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, name)
    messages = [{"role": "system", "content": SYSTEM}, *TURNS]
    row = encode(tokenizer, messages=messages)
    assert trained(row, tokenizer) == [[said(name, ANSWER), said(name, SECOND)]]
    assert SYSTEM in tokenizer.decode(row.sequences[0].input_ids)
    assert encode(tokenizer, conversations=TURNS, system=SYSTEM) == row


def test_a_refused_system_prompt_names_template_and_row(story_tokenizer: Any) -> None:
    messages = [{"role": "system", "content": SYSTEM}, *TURNS]
    with pytest.raises(UserError, match=r"chat template of .*, row 1: .*found .*System role not supported"):
        encode(with_template(story_tokenizer, "gemma"), messages=messages)


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
@pytest.mark.parametrize("as_json", [False, True])
def test_tool_calls_are_answers_and_results_are_not(name: str, as_json: bool, story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, name)
    row = encode(tokenizer, messages=TOOL_TURNS, tools=json.dumps(TOOLS) if as_json else TOOLS)
    texts = [text for texts in trained(row, tokenizer) for text in texts]
    call, answer = texts
    key = "parameters" if name == "llama3" else "arguments"
    assert f'"{key}": {{"ort": "Köln", "tage": 2}}' in call
    assert call.endswith("<|eom_id|>" if name == "llama3" else "</tool_call><|im_end|>")
    assert answer == ("" if name == "llama3" else "<think>\n\n</think>\n\n") + "Es regnet in Köln." + END[name]
    if name == "llama3":
        assert '"description": "Wetter"' in tokenizer.decode(row.sequences[0].input_ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_completion_train_the_completion_only(name: str, story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, name)
    row = encode(tokenizer, prompt=TURNS[:3], completion=TURNS[3:])
    assert trained(row, tokenizer) == [[said(name, SECOND)]]
    assert encode(tokenizer, prompt=TURNS[:3], completion=TURNS[3:]).sequences[0].answers[0][2] == len(
        said(name, SECOND).removesuffix(END[name]).encode()
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "chat template of .*: expected one, found none"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "expected answers that end with a token.*nothing after"),
        (
            "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}",
            r"expected answers that end with a token.*found '<\|im_end\|>', which is none",
        ),
        (
            "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}",
            "message 2: expected an answer after the prompt it shows at inference, .*<think>",
        ),
        (
            "{% for m in messages %}{{ m.content + eos_token }}{% generation %}{% endgeneration %}{% endfor %}",
            "markers around the answer, found nothing",
        ),
    ],
)
def test_templates_that_cannot_be_trained_are_refused(template: str | None, words: str, story_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(story_tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=words):
        encode(tokenizer, messages=TURNS)


def test_a_header_that_is_not_in_the_prompt_is_not_trained(story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, "chatml")
    tokenizer.chat_template = tokenizer.chat_template.split("{%- if add_generation_prompt")[0]
    assert trained(encode(tokenizer, messages=TURNS), tokenizer) == [[said("chatml", ANSWER), said("chatml", SECOND)]]


def test_markers_without_the_end_of_turn_get_it(story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, "marked")
    inside, outside = (
        "{{- message.content + '<|im_end|>' }}{%- endgeneration",
        "{{- message.content }}{%- endgeneration",
    )
    tokenizer.chat_template = MARKED.replace(inside, outside).replace("endgeneration %}", "endgeneration %}<|im_end|>")
    assert tokenizer.chat_template.count("<|im_end|>") == 2
    assert trained(encode(tokenizer, messages=TURNS), tokenizer) == [[said("marked", ANSWER), said("marked", SECOND)]]


def test_markers_around_the_header_do_not_train_it(story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, "marked")
    header = "{{- '<|im_start|>' + message.role + '\\n' }}"
    assert header in MARKED
    marked = MARKED.replace(header, "{%- if message.role != 'assistant' %}" + header + "{%- endif %}")
    marked = marked.replace("{%- generation %}", "{%- generation %}" + header)
    for asked in ("", "<think>\\n"):  # the second begins a thought that no answer has
        tokenizer.chat_template = marked.replace("assistant\\n' }}{%- endif", f"assistant\\n{asked}' }}}}{{%- endif")
        prompt = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, tokenize=False)
        assert prompt.endswith("assistant\n" + asked.replace("\\n", "\n"))
        texts = trained(encode(tokenizer, messages=TURNS), tokenizer)
        assert texts == [[said("marked", ANSWER), said("marked", SECOND)]]


@pytest.mark.parametrize("name", ["phi3", "marked"])
def test_a_template_that_leaves_out_tool_calls_is_refused(name: str, story_tokenizer: Any) -> None:
    """Else silence would be trained where the data have a call."""
    with pytest.raises(UserError, match="message 2: expected the call of the tool 'wetter' in the answer, found ''"):
        encode(with_template(story_tokenizer, name), messages=TOOL_TURNS, tools=TOOLS)


def test_the_same_as_transformers_own_mask(story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, "marked")
    expected = tokenizer.apply_chat_template(TURNS, return_assistant_tokens_mask=True)
    sequence = encode(tokenizer, messages=TURNS).sequences[0]
    assert expected["assistant_masks"][: len(sequence.mask)] == sequence.mask
    assert not any(expected["assistant_masks"][len(sequence.mask) :])


def test_a_long_conversation_is_cut_at_a_question_and_keeps_its_system_prompt(story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, "chatml")
    messages = [{"role": "system", "content": SYSTEM}, *TURNS, *TURNS]
    whole = encode(tokenizer, messages=messages)
    limit = len(whole.sequences[0].input_ids) - 1
    row = ChatEncoder(tokenizer).row({"messages": messages}, "row 1", limit)
    assert row.cut
    assert row.lost == 0
    assert [len(texts) for texts in trained(row, tokenizer)] == [3, 1]
    assert [t for texts in trained(row, tokenizer) for t in texts] == trained(whole, tokenizer)[0]
    second = tokenizer.decode(row.sequences[1].input_ids)
    assert second.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nAuch in Köln?")
    assert all(len(sequence.input_ids) <= limit for sequence in row.sequences)


def test_an_answer_too_long_by_itself_is_shortened_and_one_out_of_reach_is_counted(story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, "llama3")
    encoder = ChatEncoder(tokenizer)
    prompt = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True)["input_ids"]
    row = encoder.row({"messages": TURNS[:2]}, "row 1", len(prompt) + 4)
    assert row.cut
    assert sum(row.sequences[0].mask) == 4
    assert ANSWER.startswith(trained(row, tokenizer)[0][0].rstrip("�"))
    lost = encoder.row({"messages": TURNS}, "row 1", len(prompt))
    assert lost.lost == 1, "the second question is shorter"
    assert [len(texts) for texts in trained(lost, tokenizer)] == [1]


_TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc", "Co")), min_size=1, max_size=20)


@given(texts=st.lists(_TEXT.filter(str.strip), min_size=2, max_size=6), name=st.sampled_from(sorted(TEMPLATES)))
def test_any_text_is_trained_as_rendered(
    texts: list[str], name: str, story_tokenizer: Any, trimmed_tokenizer: Any
) -> None:
    check_any_text(texts, name, with_template(story_tokenizer, name))
    check_any_text(texts, name, with_template(trimmed_tokenizer, name))


def check_any_text(texts: list[str], name: str, tokenizer: Any) -> None:
    pairs = zip(texts[::2], texts[1::2], strict=False)
    messages = [m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    row = encode(tokenizer, messages=messages)
    answers = [m["content"].strip() if name in ("llama3", "gemma") else m["content"] for m in messages[1::2]]
    found = [text for texts in trained(row, tokenizer) for text in texts]
    assert found == [said(name, answer) for answer in answers]
    for sequence in row.sequences:
        for (first, last, size), answer in zip(sequence.answers, answers, strict=len(row.sequences) == 1):
            text = tokenizer.decode(sequence.input_ids[first:last])
            assert len(text.encode()) == size
            if len(row.sequences) == 1:
                assert text.endswith(answer)


def test_answers_only_gives_the_columns_of_trl(story_tokenizer: Any) -> None:
    import datasets

    tokenizer = copy.deepcopy(story_tokenizer)
    rows = [{"messages": TURNS}, {"messages": TURNS[:1]}, {"messages": TURNS[:2]}]
    found = answers_only(datasets.Dataset.from_list(rows), tokenizer, chat_template=TEMPLATES["mistral"])
    assert found.column_names == ["input_ids", "assistant_masks"]
    assert tokenizer.chat_template is None
    texts = [
        tokenizer.decode([t for t, m in zip(row["input_ids"], row["assistant_masks"], strict=True) if m])
        for row in found
    ]
    assert texts == [f" {ANSWER}</s> {SECOND}</s>", f" {ANSWER}</s>"]
    with pytest.raises(UserError, match="expected answers to train on, found none"):
        answers_only(datasets.Dataset.from_list(rows[1:2]), tokenizer, chat_template=TEMPLATES["mistral"])
