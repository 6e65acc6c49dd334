"""Which chat template a run uses: a given one, the base's own, or one of plain text for a base that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bam_lora.errors import UserError, first_line

# Headers are plain text, so that no token is needed which the base has never seen; the EOS token ends an answer.
_TURNS = """\
{%- if messages[0].role in ('system', 'developer') %}
    {%- set system = messages[0].content %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- if system or tools %}
    {{- OPEN('system') + system }}
    {%- if tools %}
        {{- ('\\n\\n' if system else '') + 'Tools, each called by '
            '{"name": ..., "arguments": {...}} between <tool_call> and </tool_call>:' }}
        {%- for tool in tools %}
            {{- '\\n' + (tool | tojson) }}
        {%- endfor %}
    {%- endif %}
    {{- CLOSE }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {{- OPEN('assistant') + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- ('\\n' if message.content or not loop.first else '') + '<tool_call>\\n'
                + ({'name': call.name, 'arguments': call.arguments} | tojson) + '\\n</tool_call>' }}
        {%- endfor %}
        {{- END }}
    {%- else %}
        {{- OPEN(message.role) + (message.content or '') + CLOSE }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- OPEN('assistant') }}
{%- endif %}
"""
_PLAIN = (
    "{%- macro open(role) -%}{{ '### ' + role.capitalize() + ':\\n' }}{%- endmacro %}\n",
    {"OPEN": "open", "CLOSE": "'\\n\\n'", "END": "eos_token + '\\n\\n'"},
)
_CHATML = (
    "{%- macro open(role) -%}{{ '<|im_start|>' + role + '\\n' }}{%- endmacro %}\n",
    {"OPEN": "open", "CLOSE": "'<|im_end|>\\n'", "END": "'<|im_end|>\\n'"},
)


def default_template(tokenizer: Any) -> str:
    """A chat template for a base that has none, out of tokens that its tokenizer has.

    ChatML where `<|im_start|>` and `<|im_end|>` are tokens; else headers in plain text, with answers that end with EOS,
    so that no embedding has to be added or learned.
    """
    added = tokenizer.get_added_vocab()
    head, parts = _CHATML if {"<|im_start|>", "<|im_end|>"} <= set(added) else _PLAIN
    text = _TURNS
    for name, value in parts.items():
        text = text.replace(name, value)
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return head + ("{{- bos_token }}\n" if begins else "") + text


def settle_template(tokenizer: Any, path: str | Path | None = None) -> str | None:
    """Gives the tokenizer the chat template that a run uses: the one in a file, its own, or else the default one.

    Args:
        tokenizer: A transformers tokenizer; its `chat_template` is set.
        path: A Jinja file, or None.

    Returns:
        What to tell the user, or None where the tokenizer's own template is used.

    Raises:
        UserError: If the file cannot be read.
    """
    if path is not None:
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError.of(
                f"data.chat_template {path}", expected="a Jinja file", found=first_line(error), remedy="Check the path"
            ) from error
        return f"chat template: {path}"
    if tokenizer.chat_template is None:
        tokenizer.chat_template = default_template(tokenizer)
        kind = "ChatML" if "<|im_end|>" in tokenizer.chat_template else "plain-text headers, answers ended by EOS"
        return f"the base has no chat template; it gets one ({kind}), which needs no new tokens"
    return None
