"""What `bam-lora check` shows of the data: columns, rows with what is trained, and rows that give nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, LLAMA3
from conftest import ENGLISH, GERMAN
from typer.testing import CliRunner

from bam_lora import check_rows, cli, marked_text
from bam_lora.chat_encoder import ChatEncoder
from bam_lora.check_rows import marked_pieces, source_lines
from bam_lora.check_template import template_lines
from bam_lora.columns import describe_columns
from bam_lora.default_template import settle_template
from bam_lora.errors import UserError
from bam_lora.recipe import Recipe, dump_recipe, recipe_from_dict
from bam_lora.terminal_text import escaped


def chat(*said: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(said)], **more}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe(base: Path | str, target: dict[str, Any], mode: str = "text", **sections: Any) -> Recipe:
    data = {"target": [target], "sequence_length": 64, **sections.pop("data", {})}
    return recipe_from_dict({"base": str(base), "output": "unused", "mode": mode, "data": data, **sections})


def shown(tokenizer: Any, wanted: Recipe, **how: Any) -> str:
    settle_template(tokenizer)
    return "\n".join(source_lines(wanted, tokenizer, **how))


@pytest.fixture
def tokenizer(story_tokenizer: Any) -> Any:
    import copy

    return copy.deepcopy(story_tokenizer)


def test_a_text_row_as_the_model_sees_it(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": " ", "id": 1}, {"text": GERMAN[0], "id": 2}, {"text": GERMAN[1], "id": None}]
    path = write_rows(tmp_path / "german.jsonl", rows)
    text = shown(tokenizer, recipe("base", {"path": path, "tokens": "2k"}))
    assert f"target      {path}: at most 2,000 tokens; " in text
    assert "columns: text (text), id (whole number)" in text
    ids = tokenizer(GERMAN[0])["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert f"row 2, {len(ids) + 1} tokens, {len(ids)} of them trained:" in text
    row = re.search(r"trained:\n(.*)\nnote", text, re.DOTALL)
    assert row is not None
    assert " ".join(row[1].split()) == f"<s>⟦{GERMAN[0]}</s>⟧"
    assert "the first 3 rows: 1 without text in column 'text', passed over" in text
    assert "sequences of at most 64 tokens" in text
    assert "⟦…⟧: tokens that are trained" in text


def test_without_bos_the_first_token_is_not_marked(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    text = shown(tokenizer, recipe("base", {"path": write_rows(tmp_path / "a.jsonl", [{"text": ENGLISH[0]}])}))
    first = tokenizer.decode(tokenizer(ENGLISH[0])["input_ids"][:1])
    assert first
    assert f"{first}⟦{ENGLISH[0][len(first) : 30]}" in text


def test_answers_are_marked_and_evaluation_shows_what_is_scored(tokenizer: Any, tmp_path: Path) -> None:
    rows = [chat("Wer da?"), chat("Wo ist\nder Fluss?", "Im Wald.", "Und jetzt?", "Hier.", id=4)]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    evaluation = {"source": [{"path": path}]}
    wanted = recipe("base", {"path": path}, "chat", evaluation=evaluation, data={"sequence_length": 128})
    text = shown(tokenizer, wanted)
    training, _, scoring = text.partition("forgetting")
    assert "⟦Im Wald.</s>⟧" in training
    assert "⟦Hier.</s>⟧" in training
    assert "Wo ist↵\n              der Fluss?↵" in training
    assert training.count("⟦") == 2
    assert "⟦Im Wald.⟧</s>" in scoring
    assert "columns: messages (list of mapping of role, content), id (whole number)" in text
    assert "the first 2 rows: 1 with nothing to train on (no answer; row 1), left out" in training
    assert "longer conversations are cut before a user's message" in text


def test_replay_of_text_in_a_chat_run(tokenizer: Any, tmp_path: Path) -> None:
    chats = write_rows(tmp_path / "chats.jsonl", [chat("a?", "b")])
    texts = write_rows(tmp_path / "english.jsonl", [{"content": ENGLISH[0]}])
    replay = {"replay": [{"path": texts, "text": "content", "mode": "text"}], "replay_share": 0.1}
    text = shown(tokenizer, recipe("base", {"path": chats}, "chat", data=replay))
    replayed = text[text.index("replay  ") :]
    assert f"<s>⟦{ENGLISH[0][:20]}" in replayed
    assert "longer texts go on in the next piece" in replayed


def test_what_is_marked_is_what_the_mask_says(tokenizer: Any) -> None:
    """Decoded part by part, the parts are the whole, whatever the template."""
    for template in (CHATML, LLAMA3):
        tokenizer.chat_template = template.replace("<|im_end|>", "</s>").replace("<|eot_id|>", "</s>")
        (sequence,) = ChatEncoder(tokenizer).row(chat("Über was?", "  Über Äpfel, ja.", "So?", "Ja"), "row").sequences
        pieces = marked_pieces(sequence.input_ids, sequence.mask, tokenizer)
        assert "".join(text for text, _ in pieces) == tokenizer.decode(sequence.input_ids)
        assert pieces[-1] == ("Ja</s>", True)


def test_a_conversation_beyond_the_sequence_length(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "chats.jsonl", [chat("wort " * 200, "zu spät"), chat("So?", "Ja. " * 100)])
    text = shown(tokenizer, recipe("base", {"path": path}, "chat"))
    assert "1 with nothing to train on (all within data.sequence_length is question; row 1)" in text
    assert "2 longer than data.sequence_length" in text
    assert "row 2, 64 tokens" in text


def test_wrong_columns_are_told_with_a_guess(tokenizer: Any, tmp_path: Path) -> None:
    content = write_rows(tmp_path / "a.jsonl", [{"url": "http://x", "content": ENGLISH[0]}])
    with pytest.raises(UserError, match=r"found columns content, url\. .*it looks like 'content'"):
        shown(tokenizer, recipe("base", {"path": content}))
    other = write_rows(tmp_path / "b.jsonl", [{"id": "short", "artikel": ENGLISH[0], "n": 1}])
    with pytest.raises(UserError, match="it looks like 'artikel'"):
        shown(tokenizer, recipe("base", {"path": other}))
    chats = write_rows(tmp_path / "c.jsonl", [{"dialogue": chat("a", "b")["messages"]}])
    with pytest.raises(UserError, match="Column 'dialogue' holds conversations: set this source's `mode: chat`"):
        shown(tokenizer, recipe("base", {"path": chats}))
    with pytest.raises(UserError, match="Column 'dialogue' looks like messages: name it in this source's `text:`"):
        shown(tokenizer, recipe("base", {"path": chats}, "chat"))
    pairs = write_rows(tmp_path / "d.jsonl", [{"question": "a", "response": "b"}])
    with pytest.raises(UserError, match="Rename 'question' to 'instruction' and 'response' to 'output'"):
        shown(tokenizer, recipe("base", {"path": pairs}, "chat"))
    with pytest.raises(UserError, match=r"set `mode: text` .*\(`text: content`\)"):
        shown(tokenizer, recipe("base", {"path": content}, "chat"))


def test_a_wrong_row_is_shown(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "a.jsonl", [chat("a", "b"), {"messages": [{"role": "narrator", "content": "\x1b[2J"}]}]
    )
    with pytest.raises(UserError, match=r"row 2, .*found 'narrator'.*The row: .*\"narrator\"") as caught:
        shown(tokenizer, recipe("base", {"path": path}, "chat"))
    assert "\x1b" not in str(caught.value)
    silent = write_rows(tmp_path / "b.jsonl", [chat("nobody answers")])
    with pytest.raises(UserError, match=r"expected conversations with answers, found none in 1 rows; .*nobody answers"):
        shown(tokenizer, recipe("base", {"path": silent}, "chat"))
    empty = write_rows(tmp_path / "c.jsonl", [{"text": ""}, {"text": None}])
    with pytest.raises(UserError, match="found no rows with text among 2"):
        shown(tokenizer, recipe("base", {"path": empty}))


def test_a_column_that_is_always_empty_is_not_read_to_its_end(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_rows, "_LOOKED_AT", 30)
    path = write_rows(tmp_path / "a.jsonl", [{"text": None if at < 29 else GERMAN[at % 9]} for at in range(40)])
    assert "the first 30 rows: 29 without text" in shown(tokenizer, recipe("base", {"path": path}))
    monkeypatch.setattr(check_rows, "_LOOKED_AT", 29)
    with pytest.raises(UserError, match="found no rows with text among 29"):
        shown(tokenizer, recipe("base", {"path": path}))


def test_no_control_character_reaches_the_terminal(tiny_base: Path, tmp_path: Path) -> None:
    """Of rows, column names and values, with colour and without; ours alone are sent."""
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\u202eabc\u2066\x00\r" + GERMAN[0]
    column = "spalte\x1b[31m"
    path = write_rows(tmp_path / "evil.jsonl", [{"text": evil, column: 1, "group": "g\x1b[5m"}] * 12)
    wanted = recipe(
        tiny_base, {"path": path}, data={"slicing": "by_column", "slicing_column": "group"}, bam={"slices": 2},
        evaluation={"target": [{"path": path}]}, output=str(tmp_path / "run"),
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(dump_recipe(wanted))
    ours = re.compile(r"\x1b\[(?:4;32|32;4|0)m")

    def harmless(text: str) -> bool:
        return not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)

    result = CliRunner().invoke(cli.app, ["check", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    assert harmless(result.output)
    assert r"\x1b]0;title\x07\x1b[2J\x9b31m\u202eabc\u2066\x00\r" in re.sub(r"[\s⟦⟧]+", "", result.output)
    assert r"spalte\x1b[31m (whole number)" in result.output
    from transformers import AutoTokenizer

    coloured = shown(AutoTokenizer.from_pretrained(tiny_base), wanted, colour=True)
    assert ours.search(coloured)
    assert harmless(ours.sub("", coloured))
    missing = write_rows(tmp_path / "missing.jsonl", [{column: "x"}])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe(tiny_base, {"path": missing})))
    result = CliRunner().invoke(cli.app, ["check", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 1
    assert harmless(result.output)
    assert r"found columns spalte\x1b[31m" in result.output


def test_template_findings(tokenizer: Any) -> None:
    note = settle_template(tokenizer)
    lines = template_lines(tokenizer, note)
    assert lines[0].startswith("chat        the base has no chat template; it gets one")
    assert "no {% generation %} markers" in lines[1]
    assert "answers end with '</s>', the tokenizer's EOS, which is trained" in lines[2]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHATML.replace(
        "message.content + '<|im_end|>", "message.content + '{% generation %}{% endgeneration %}<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    own = template_lines(tokenizer, None)
    assert own[0] == "chat        chat template: the base's own"
    assert "its {% generation %} markers say where" in own[1]
    assert "'<|im_end|>', which is trained" in own[2]
    assert "the tokenizer's EOS '</s>' is not trained in conversations" in own[2]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert "only plain prompts and completions can be trained" in template_lines(tokenizer, None)[1]


def test_long_rows_are_cut_and_lines_fit() -> None:
    pieces = [("Frage\n", False), ("wort " * 500, True), ("中" * 300, False)]
    lines = marked_text.draw(marked_text.shorten(pieces, 100, 40), colour=False, width=40)
    assert lines[0] == "Frage↵"
    assert "[…2,360 characters…]" in " ".join(lines)
    from rich.cells import cell_len

    assert all(cell_len(line.strip("⟦⟧")) <= 40 for line in lines)
    many = marked_text.draw([("\n" * 50, False), ("ende", True)], colour=False)
    assert len(many) == 16
    assert many[-1] == "⟦ende⟧"
    assert any(line.startswith("[…36 lines…]") for line in many)
    assert len(marked_text.shorten([("a", True), ("b", False)] * 20, 9, 9)) == 10


def test_brackets_of_the_data_are_not_taken_for_marks() -> None:
    assert marked_text.draw([("a⟧b", True)], colour=False) == ["⟦a\\u27e7b⟧"]
    assert escaped("a\u200cb\u200dc") == "a\u200cb\u200dc"  # Persian and Hindi are written with them


def test_columns_by_what_is_in_them() -> None:
    rows = [{"a": None, "b": 1, "c": [{"role": "user"}], "d": {}}, {"a": True, "b": 0.5, "c": [], "e": b""}]
    assert describe_columns(rows) == (
        "a (true or false), b (whole number or number), c (list of mapping of role or list), d (mapping), e (bytes)"
    )
    assert describe_columns([{f"c{i}": i for i in range(30)}]).endswith("c23 (whole number) and 6 more")


def test_what_the_encoding_of_stdout_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr(cli, "app", lambda **_: stdout.write("⟦Flüsse⟧"))
    cli.main()
    stdout.flush()
    assert stdout.buffer.getvalue() == rb"\u27e6Fl\xfcsse\u27e7"  # type: ignore[attr-defined]
