"""Rows of chat data as users have them, brought to one shape: messages with the answers to train on, or plain text.

Known shapes: `messages` (role, content), `conversations` (ShareGPT's from, value), `prompt` and `completion`,
Alpaca's `instruction`, `input`, `output`, and pairs of a question and its answer (`QUESTION_COLUMNS`); beside them
`tools`, `system` and `chat_template_kwargs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bam_lora.columns import chat_remedy, names
from bam_lora.errors import UserError

ASSISTANT = "assistant"
_ROLES = {
    **{name: name for name in ("system", "developer", "user", ASSISTANT, "tool", "function", "ipython")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "function_call"), ASSISTANT),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
QUESTION_COLUMNS = (  # a question and its answer, as Aya, MURI, MetaMathQA and others call them
    ("inputs", "targets"),
    ("input", "output"),
    ("query", "response"),
    ("question", "answer"),
)
_SHAPES = (
    "messages, conversations, prompt and completion, instruction and output, or a pair such as inputs and targets (a "
    "column of another name that holds messages goes into this source's `text:`)"
)
_JSON = (str, bool, int, float, list, dict)
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them.

    Attributes:
        messages: Mappings with "role" and "content", and whatever else the template may read.
        answers: Indices of the messages to train on, rising.
        tools: JSON schemas of the tools, or None.
        arguments: What else the template is given (`enable_thinking`, say).
    """

    messages: tuple[Message, ...]
    answers: tuple[int, ...]
    tools: list[Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """Whether there is an answer to train on."""
        return bool(self.answers)

    @property
    def text(self) -> str:
        """What is said in it, a message a paragraph."""
        return "\n\n".join(map(_said, self.messages))

    @property
    def answered(self) -> str:
        """What its answers say."""
        return "\n\n".join(_said(self.messages[index]) for index in self.answers)


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion as plain text, which no template touches."""

    prompt: str
    completion: str

    @property
    def trained(self) -> bool:
        """Whether there is a completion to train on."""
        return bool(self.completion.strip())

    @property
    def text(self) -> str:
        """All of it."""
        return self.prompt + self.completion

    @property
    def answered(self) -> str:
        """What the completion says."""
        return self.completion


def read_row(row: Mapping[str, Any], place: str, column: str | None = None) -> Conversation | Completion:
    """A row in its one shape.

    Args:
        row: Column names and values.
        place: Names the row in messages.
        column: The column that holds the messages, where its name is none of the usual ones.

    Raises:
        UserError: If the row has none of the known shapes, or is wrong in itself.
    """
    columns = {name for name, value in row.items() if value is not None}
    listed = column if column in columns else next((name for name in MESSAGE_COLUMNS if name in columns), None)
    if listed is not None:
        messages = _messages(_decoded(row[listed], list, f"{place}, {listed}"), f"{place}, {listed}")
        return _conversation(row, messages, range(len(messages)), place)
    if {"prompt", "completion"} <= columns:
        return _prompt_and_completion(row, place)
    if {"instruction", "output"} <= columns:
        parts = [_text(row, name, place) for name in ("instruction", "input") if row.get(name)]
        messages = [
            {"role": "user", "content": "\n\n".join(parts)},
            {"role": ASSISTANT, "content": _text(row, "output", place)},
        ]
        return _conversation(row, messages, [1], place)
    for question, answer in QUESTION_COLUMNS:
        if {question, answer} <= columns:
            asked = {"role": "user", "content": _text(row, question, place)}
            return _conversation(row, [asked, {"role": ASSISTANT, "content": _text(row, answer, place)}], [1], place)
    raise UserError.of(
        place,
        expected=f"chat data in columns {_SHAPES}",
        found=f"columns {names(row)}",
        remedy=chat_remedy(row),
    )


def _prompt_and_completion(row: Mapping[str, Any], place: str) -> Conversation | Completion:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(prompt, completion)
    lists = [value for value in (prompt, completion) if isinstance(value, Sequence) and not isinstance(value, str)]
    if len(lists) < 2:
        raise UserError.of(
            place,
            expected="prompt and completion both text, or both lists of messages",
            found=f"{type(prompt).__name__} and {type(completion).__name__}",
            remedy="Bring them to one kind",
        )
    before = _messages(prompt, f"{place}, prompt")
    after = _messages(completion, f"{place}, completion")
    return _conversation(row, before + after, range(len(before), len(before) + len(after)), place)


def _conversation(row: Mapping[str, Any], messages: list[Message], trained: Sequence[int], place: str) -> Conversation:
    """The messages with what stands beside them in the row; `trained` are the candidates for answers."""
    shift = 0
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages, shift = [{"role": "system", "content": system}, *messages], 1
    # What the assistant says before anyone asked is an answer to nothing: it is context.
    asked = next((index for index, message in enumerate(messages) if message["role"] == "user"), len(messages))
    answers = []
    for index in (number + shift for number in trained):
        message = messages[index]
        wanted = message["role"] == ASSISTANT and index > asked and _wanted(message, f"{place}, message {index + 1}")
        if wanted and (_has_text(message.get("content")) or message.get("tool_calls")):
            answers.append(index)
    clean = tuple({k: v for k, v in message.items() if k not in ("train", "weight")} for message in messages)
    tools = _decoded(row["tools"], list, f"{place}, tools") if row.get("tools") else None
    arguments = row.get("chat_template_kwargs") or {}
    return Conversation(
        clean,
        tuple(answers),
        [_without_none(tool) for tool in tools] if tools else None,
        _without_none(_decoded(arguments, Mapping, f"{place}, chat_template_kwargs")),
    )


def _wanted(message: Message, place: str) -> bool:
    """Whether the user wants a message trained: `train: false` and `weight: 0` leave it out."""
    for name, allowed in (("train", (True, False)), ("weight", (0, 1))):
        value = message.get(name)
        if value is not None and value not in allowed:
            raise UserError.of(
                f"{place}, {name}",
                expected=" or ".join(map(str, allowed)),
                found=repr(value),
                remedy="Answers are trained on or left out; nothing lies between",
            )
        if value is not None and not value:
            return False
    return True


def _said(message: Message) -> str:
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


def _has_text(content: Any) -> bool:
    return bool(content.strip()) if isinstance(content, str) else bool(content)


def _messages(values: Any, place: str) -> list[Message]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UserError.of(place, expected="a list of messages", found=type(values).__name__, remedy="Check the column")
    return [_message(value, f"{place}, message {number}") for number, value in enumerate(values, start=1)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping) or not {"role", "from"} & set(value):
        found = f"keys {', '.join(sorted(value))}" if isinstance(value, Mapping) else type(value).__name__
        raise UserError.of(
            place, expected="role and content (or from and value)", found=found, remedy="Check the column"
        )
    # Arrow gives every message the keys of all of them, with None where there is nothing. No template reads times.
    message = {name: v for name, v in value.items() if isinstance(v, _JSON) and name not in ("from", "value", "text")}
    said = value.get("role") if value.get("role") is not None else value.get("from")
    role = _ROLES.get(str(said).lower())
    if role is None:
        raise UserError.of(
            f"{place}, role",
            expected=f"one of {', '.join(sorted(_ROLES))}",
            found=repr(said),
            remedy="Rename it",
        )
    content = next((value[name] for name in ("content", "value", "text") if value.get(name) is not None), None)
    message["role"] = role
    message["content"] = _content(content, place)
    if message.get("tool_calls"):
        calls = _decoded(message["tool_calls"], list, f"{place}, tool_calls")
        message["tool_calls"] = [_tool_call(call, f"{place}, tool_calls") for call in calls]
    else:
        message.pop("tool_calls", None)
    return message


def _content(content: Any, place: str) -> str:
    """The text of a message; a list of text parts is joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UserError.of(
                f"{place}, content", expected="text", found=f"a part of type {kind}", remedy="Only text can be trained"
            )
    return "".join(part["text"] for part in parts)


def _tool_call(call: Any, place: str) -> Any:
    """A tool call with its arguments as a mapping: as a JSON string, templates would quote them twice."""
    call = _without_none(_decoded(call, Mapping, place))
    holder = call["function"] if isinstance(call.get("function"), dict) else call
    if isinstance(holder.get("arguments"), str):
        try:
            arguments = json.loads(holder["arguments"])
        except json.JSONDecodeError:
            return call
        if isinstance(arguments, dict):
            holder["arguments"] = arguments
    return call


def _decoded(value: Any, kind: type, place: str) -> Any:
    """A value that may have come as a JSON string; Arrow holds lists of unlike things best so."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError.of(place, expected="JSON", found=f"text that is not: {error}", remedy="Check it") from error
    if not isinstance(value, Sequence if kind is list else kind) or isinstance(value, str):
        what = "a list" if kind is list else "a mapping"
        raise UserError.of(place, expected=what, found=type(value).__name__, remedy="Check the column")
    return value


def _without_none(value: Any) -> Any:
    """The same without the keys that Arrow filled up with None."""
    if isinstance(value, Mapping):
        return {name: _without_none(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_none(entry) for entry in value]
    return value


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise UserError.of(f"{place}, {name}", expected="text", found=type(value).__name__, remedy="Check the column")
    return value
