"""A tokenizer's chat template: what it renders, and where in that an answer begins and ends.

No template says so by itself, so an answer is found by comparing: it begins where the prompt that inference would show
ends (or where the template's generation markers say), and ends with the end-of-turn token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bam_lora.chat_rows import ASSISTANT, Conversation, Message
from bam_lora.errors import UserError, first_line

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "probeanswer"


@dataclass(frozen=True)
class Answer:
    """One answer in the rendering of its conversation up to it; offsets are in characters.

    `stop` is the end of what the answer says, `end` that of its end-of-turn token.
    """

    text: str
    start: int
    stop: int
    end: int


class ChatTemplate:
    """The chat template of a tokenizer, applied.

    Raises:
        UserError: When it is made: if there is none, or it does not end an answer with one of the tokenizer's tokens,
            so that a model could not learn to stop.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Takes the template from `tokenizer.chat_template`."""
        self._tokenizer = tokenizer
        self.name = f"chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        if tokenizer.chat_template is None:
            raise UserError.of(
                self.name, expected="one", found="none", remedy="Give one (`data.chat_template` in a recipe)"
            )
        self.end_of_turn = self._find_end_of_turn()
        self._header = self._find_header()

    def has_markers(self, tools: list[Any] | None = None) -> bool:
        """Whether the template marks answers itself, by `{% generation %}`."""
        return _MARKERS.search(self._tokenizer.get_chat_template(None, tools)) is not None

    @cached_property
    def _tokens(self) -> list[str]:
        """Tokens that stand by themselves in a text, the longest first."""
        names = {*self._tokenizer.get_added_vocab(), *self._tokenizer.all_special_tokens}
        return sorted((name for name in names if name.strip()), key=len, reverse=True)

    def _find_end_of_turn(self) -> str:
        probe: list[Message] = [{"role": "user", "content": "probe"}, {"role": ASSISTANT, "content": _PROBE}]
        tail = self.render(probe, None, {}, "a probe").rpartition(_PROBE)[2].lstrip()
        token = next((name for name in self._tokens if tail.startswith(name)), None)
        if token is None:
            raise UserError.of(
                self.name,
                expected="answers that end with a token of the tokenizer, by which the model learns to stop",
                found=repr(tail.split()[0]) + ", which is none" if tail.strip() else "nothing after the answer",
                remedy="End the answer with {{ eos_token }} in the template, or leave the template out for a plain one",
            )
        return token

    def _find_header(self) -> str:
        """The header of an answer, in a template that leaves it out of the prompt when it is asked for one.

        White space is not counted: it is the answer's own, as in `[/INST] answer`.
        """
        user: list[Message] = [{"role": "user", "content": "probe"}]
        before = self.render(user, None, {}, "a probe", prompt=True)
        text = self.render([*user, {"role": ASSISTANT, "content": _PROBE}], None, {}, "a probe")
        if before != self.render(user, None, {}, "a probe") or not text.startswith(before):
            return ""
        header = text[len(before) : text.rfind(_PROBE)]
        return header if header.strip() else ""

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        arguments: Mapping[str, Any],
        place: str,
        *,
        prompt: bool = False,
    ) -> str:
        """The conversation as text; with `prompt`, up to where an answer is to begin.

        Raises:
            UserError: If the template refuses it.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tools=tools, add_generation_prompt=prompt, tokenize=False, **arguments
                )
            )
        except Exception as error:  # whatever a template raises
            raise self._refused(place, error) from error

    def _refused(self, place: str, error: Exception) -> UserError:
        return UserError.of(
            f"{self.name}, {place}",
            expected="a conversation that it can render",
            found=f"{type(error).__name__}: {first_line(error)}",
            remedy="Change the row (roles, order, system prompt), or give another template as data.chat_template",
        )

    def answer(self, conversation: Conversation, index: int, place: str) -> Answer:
        """Where message `index` lies in the rendering of the messages up to and with it.

        Raises:
            UserError: If the template renders the answer otherwise than after the prompt it shows at inference.
        """
        messages, tools, arguments = conversation.messages, conversation.tools, conversation.arguments
        before = self.render(messages[:index], tools, arguments, place, prompt=True)
        if self.has_markers(tools):
            text, start = self._marked(conversation, index, place)
            shown = self._shown(conversation, index, place, before)
            start = max(start, len(shown)) if text.startswith(shown) else start
        else:
            text = self.render(messages[: index + 1], tools, arguments, place)
            if not text.startswith(before):
                raise UserError.of(
                    f"{self.name}, {place}, message {index + 1}",
                    expected=f"an answer after the prompt it shows at inference, …{before[-40:]!r}",
                    found=f"{text[_common(text, before) :][:40]!r} in its place",
                    remedy="Give data.chat_template one that renders both alike, or `chat_template_kwargs` in the rows",
                )
            start = len(before) + (len(self._header) if text[len(before) :].startswith(self._header) else 0)
        end, stop = self._end(text, start, f"{place}, message {index + 1}")
        self._require_calls(messages[index], text[start:stop], f"{place}, message {index + 1}")
        return Answer(text, start, stop, end)

    def _shown(self, conversation: Conversation, index: int, place: str, before: str) -> str:
        """The prompt before an answer without the thought that some templates begin in it; some markers take it in."""
        earlier = self.render(conversation.messages[:index], conversation.tools, conversation.arguments, place)
        if not before.startswith(earlier):
            return before
        return earlier + before[len(earlier) :].partition("<think>")[0]

    def _require_calls(self, message: Message, said: str, place: str) -> None:
        """Raises a UserError if the template leaves out a tool call: silence would be trained in its place."""
        for call in message.get("tool_calls", []):
            name = call.get("function", call).get("name") if isinstance(call, dict) else None
            if name is None or str(name) not in said:
                raise UserError.of(
                    f"{self.name}, {place}",
                    expected=f"the call of the tool {name!r} in the answer",
                    found=repr(said[:40]),
                    remedy="Give data.chat_template one that has tool calls, or `weight: 0` to the message",
                )

    def _marked(self, conversation: Conversation, index: int, place: str) -> tuple[str, int]:
        """The rendering up to an answer, and where the template's own markers say that the answer begins."""
        text, spans = self._render_marked(conversation, index + 1, place)
        before = len(self._render_marked(conversation, index, place)[1])
        spans = spans[min(before, len(spans)) :]
        if not spans or spans[0][0] == spans[-1][1]:
            raise UserError.of(
                f"{self.name}, {place}, message {index + 1}",
                expected="its {% generation %} markers around the answer",
                found="nothing between them",
                remedy="Put them right, or take them out: answers are found without them, too",
            )
        return text, spans[0][0]

    def _render_marked(self, conversation: Conversation, count: int, place: str) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{k: v for k, v in m.items() if v is not None} for m in conversation.messages[:count]]
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=conversation.tools,
                chat_template=self._tokenizer.get_chat_template(None, conversation.tools),
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **conversation.arguments},
            )
        except Exception as error:  # whatever a template raises
            raise self._refused(place, error) from error
        return texts[0], list(spans[0])

    def _end(self, text: str, start: int, place: str) -> tuple[int, int]:
        """Where the answer from `start` on ends, with its end-of-turn token and without."""
        said = text[start:]
        at = said.rfind(self.end_of_turn)
        rest = said[at + len(self.end_of_turn) :].strip() if at >= 0 else ""
        if at >= 0 and (not rest or rest in self._tokens):  # some close the whole conversation, too
            return start + at + len(self.end_of_turn), start + at
        said = said.rstrip()
        token = next((name for name in self._tokens if said.endswith(name)), None)
        if token is None:
            raise UserError.of(
                f"{self.name}, {place}",
                expected=f"an answer that ends with {self.end_of_turn!r} or another special token",
                found=f"…{said[-40:]!r}",
                remedy="Give another template as data.chat_template",
            )
        return start + len(said), start + len(said) - len(token)


def _common(first: str, second: str) -> int:
    """Characters that two texts begin with in common."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
