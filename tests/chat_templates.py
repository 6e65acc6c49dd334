"""Small chat templates in the formats of models in use, tokenizers with the tokens they need, and conversations."""

from __future__ import annotations

import copy
from typing import Any

from bam_lora.chat_encoder import ChatEncoder, ChatRow

_LOOP = "{%- for message in messages %}"
_CHATML_PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
_CALLS = """\
{%- for call in message.tool_calls or [] %}
    {{- '\\n<tool_call>\\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson)
        + '\\n</tool_call>' }}
{%- endfor %}
"""

CHATML = f"""\
{_LOOP}
    {{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}}}
{{%- endfor %}}
{_CHATML_PROMPT}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + (tools | tojson) + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {{- {'name': message.tool_calls[0].function.name, 'parameters': message.tool_calls[0].function.arguments}
            | tojson }}
        {{- '<|eom_id|>' }}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# The system prompt goes into the first user turn, and the answer begins with the space after [/INST].
MISTRAL = """\
{{- bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""

# Thoughts are kept after the last question only, where an answer without them gets empty ones.
QWEN3 = f"""\
{{%- set found = namespace(last=0) %}}
{_LOOP}
    {{%- if message.role == 'user' %}}{{%- set found.last = loop.index0 %}}{{%- endif %}}
{{%- endfor %}}
{_LOOP}
    {{%- if message.role == 'assistant' %}}
        {{%- set thought = '' %}}
        {{%- set said = message.content %}}
        {{%- if '</think>' in said %}}
            {{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}}
            {{%- set said = said.split('</think>')[-1].lstrip('\\n') %}}
        {{%- endif %}}
        {{{{- '<|im_start|>assistant\\n' }}}}
        {{%- if loop.index0 > found.last %}}{{{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}}}{{%- endif %}}
        {{{{- said }}}}
        {_CALLS}
        {{{{- '<|im_end|>\\n' }}}}
    {{%- elif message.role == 'tool' %}}
        {{{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}}}
    {{%- else %}}
        {{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}}}
    {{%- endif %}}
{{%- endfor %}}
{_CHATML_PROMPT}
"""

# It closes the conversation with EOS when no answer is asked for.
PHI3 = """\
{%- for message in messages %}{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}
"""

MARKED = f"""\
{_LOOP}
    {{{{- '<|im_start|>' + message.role + '\\n' }}}}
    {{%- if message.role == 'assistant' %}}
        {{%- generation %}}{{{{- message.content + '<|im_end|>' }}}}{{%- endgeneration %}}
    {{%- else %}}
        {{{{- message.content + '<|im_end|>' }}}}
    {{%- endif %}}
    {{{{- '\\n' }}}}
{{%- endfor %}}
{_CHATML_PROMPT}
"""

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "marked": MARKED,
}
END = {
    **dict.fromkeys(("chatml", "qwen3", "marked"), "<|im_end|>"),
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
}
_SPECIAL = {
    **{name: ["<|im_start|>", "<|im_end|>"] for name in ("chatml", "qwen3", "marked")},
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"],
    "mistral": ["[INST]", "[/INST]"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
}


def with_template(tokenizer: Any, name: str) -> Any:
    """A copy of a tokenizer with one of these templates and its tokens; Phi-3's take white space after them along."""
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(tokenizer)
    tokens = [AddedToken(token, rstrip=name == "phi3", normalized=False, special=True) for token in _SPECIAL[name]]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


QUESTION = "Wo fließt die Donau? Ça va – где?"
ANSWER = "Sie fließt durch Österreich: „Donau“, 多瑙河 🙂."
SECOND = "Ja, natürlich.\n\nBis morgen!"
SYSTEM = "Du bist höflich."
TURNS = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "Auch in Köln?"},
    {"role": "assistant", "content": SECOND},
]
CALL = {"type": "function", "function": {"name": "wetter", "arguments": '{"ort": "Köln", "tage": 2}'}}
TOOL_TURNS = [
    {"role": "user", "content": "Wie ist das Wetter in Köln?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "Es regnet.", "tool_calls": None},
    {"role": "assistant", "content": "Es regnet in Köln."},
]
TOOLS = [{"type": "function", "function": {"name": "wetter", "description": "Wetter", "parameters": {}}}]


def trained(row: ChatRow, tokenizer: Any) -> list[list[str]]:
    """Per sequence the text of every run of trained tokens."""
    found = []
    for sequence in row.sequences:
        runs: list[list[int]] = []
        before = 0
        for token, mark in zip(sequence.input_ids, sequence.mask, strict=True):
            if mark and not before:
                runs.append([])
            if mark:
                runs[-1].append(token)
            before = mark
        found.append([tokenizer.decode(run) for run in runs])
    return found


def encode(tokenizer: Any, **row: Any) -> ChatRow:
    return ChatEncoder(tokenizer).row(row, "row 1")


def said(name: str, text: str) -> str:
    """An answer as a template renders it."""
    return {"mistral": " " + text, "qwen3": "<think>\n\n</think>\n\n" + text}.get(name, text) + END[name]
