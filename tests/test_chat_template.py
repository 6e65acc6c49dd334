"""A base without a chat template gets one of tokens that it has."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CALL, CHATML, TOOL_TURNS, TOOLS, TURNS, trained, with_template

from bam_lora.chat_encoder import ChatEncoder
from bam_lora.chat_template import ChatTemplate
from bam_lora.default_template import default_template, settle_template
from bam_lora.errors import UserError


def test_a_base_without_a_template_gets_one_of_its_own_tokens(story_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(story_tokenizer)
    note = settle_template(tokenizer)
    assert note is not None
    assert "no chat template" in note
    assert "plain-text headers" in note
    assert len(tokenizer) == len(story_tokenizer)
    assert ChatTemplate(tokenizer).end_of_turn == tokenizer.eos_token
    row = ChatEncoder(tokenizer).row({"messages": [{"role": "system", "content": "S."}, *TURNS]}, "row 1")
    assert trained(row, tokenizer) == [[TURNS[1]["content"] + "</s>", TURNS[3]["content"] + "</s>"]]
    text = tokenizer.decode(row.sequences[0].input_ids)
    assert text.startswith("<s>### System:\nS.\n\n### User:\nWo fließt")
    assert row.sequences[0].input_ids.count(tokenizer.bos_token_id) == 1
    assert settle_template(tokenizer) is None, "now it has one"


def test_it_has_tools(story_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(story_tokenizer)
    tokenizer.chat_template = default_template(tokenizer)
    row = ChatEncoder(tokenizer).row({"messages": TOOL_TURNS, "tools": TOOLS}, "row 1")
    call = '<tool_call>\n{"name": "wetter", "arguments": {"ort": "Köln", "tage": 2}}\n</tool_call></s>'
    assert trained(row, tokenizer) == [[call, "Es regnet in Köln.</s>"]]
    text = tokenizer.decode(row.sequences[0].input_ids)
    assert '"description": "Wetter"' in text
    assert "### Tool:\nEs regnet.\n\n### Assistant:\n" in text
    spoken = {"role": "assistant", "content": "Moment.", "tool_calls": [CALL, CALL]}
    row = ChatEncoder(tokenizer).row({"messages": [TOOL_TURNS[0], spoken]}, "row 1")
    both = call.removesuffix("</s>")
    assert trained(row, tokenizer) == [[f"Moment.\n{both}\n{both}</s>"]]


def test_chatml_where_its_tokens_are_there(story_tokenizer: Any) -> None:
    tokenizer = with_template(story_tokenizer, "chatml")
    tokenizer.chat_template = None
    note = settle_template(tokenizer)
    assert note is not None
    assert "ChatML" in note
    assert ChatTemplate(tokenizer).end_of_turn == "<|im_end|>"
    row = ChatEncoder(tokenizer).row({"messages": TURNS}, "row 1")
    reference = ChatEncoder(with_template(story_tokenizer, "chatml")).row({"messages": TURNS}, "row 1")
    begin = [tokenizer.bos_token_id]
    assert row.sequences[0].input_ids == begin + reference.sequences[0].input_ids
    assert row.sequences[0].mask == [0, *reference.sequences[0].mask]


IN_USE = {
    "llama3_1": ("<|eot_id|>", ""),
    "qwen2_5": ("<|im_end|>", ""),
    "qwen3": ("<|im_end|>", "<think>\n\n</think>\n\n"),
    "gemma3": ("<end_of_turn>", ""),
    "phi3": ("<|end|>", ""),
    "cohere": ("<|END_OF_TURN_TOKEN|>", ""),
    "gptoss": ("<|return|>", "<|channel|>final<|message|>"),
    "deepseekv3_training": ("<｜end▁of▁sentence｜>", ""),
    "qwen2_5_training": ("<|im_end|>", ""),
}


@pytest.mark.parametrize("name", IN_USE)
def test_templates_in_use(name: str, story_tokenizer: Any) -> None:
    """As TRL has them; with generation markers where their name ends with `training`."""
    import trl

    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this version of TRL has no {path.name}")
    template = path.read_text(encoding="utf-8")
    tokenizer = copy.deepcopy(story_tokenizer)
    tokens = sorted(set(re.findall(r"<[|｜][^<>{}' ]+?[|｜]>|<(?:start|end)_of_turn>", template)))
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = template
    end, thought = IN_USE[name]
    row = ChatEncoder(tokenizer).row({"messages": TURNS}, "row 1")
    texts = [text for texts in trained(row, tokenizer) for text in texts]
    assert texts == [thought + TURNS[1]["content"] + end, thought + TURNS[3]["content"] + end]
    one = ChatEncoder(tokenizer).row({"messages": TURNS[:2]}, "row 1").sequences[0]
    whole = tokenizer.apply_chat_template(TURNS[:2])["input_ids"]
    assert one.input_ids == whole[: len(one.input_ids)]


def test_a_template_from_a_file(story_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = with_template(story_tokenizer, "chatml")
    (tmp_path / "mine.jinja").write_text("{# mine #}" + CHATML)
    note = settle_template(tokenizer, tmp_path / "mine.jinja")
    assert note == f"chat template: {tmp_path / 'mine.jinja'}"
    assert tokenizer.chat_template.startswith("{# mine #}")
    with pytest.raises(UserError, match=r"data\.chat_template .*none\.jinja: expected a Jinja file"):
        settle_template(tokenizer, tmp_path / "none.jinja")
