"""What a model folder needs to be talked to as it was trained: the chat template, and where to stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bam_lora.chat_template import ChatTemplate
from bam_lora.errors import UserError

TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
OTHER_TEMPLATES = "additional_chat_templates/"


def chat_files(folder: Path, start: Path, tokenizer: Any, *, trained: bool) -> dict[str, str]:
    """The files in which a result differs from the folded original base.

    Args:
        folder: The folded model, with the original base's files.
        start: The model the run started from: the same base, or the result of another run, which may have a chat
            template of its own.
        tokenizer: The run's, with the chat template that it used.
        trained: Whether the run trained on conversations.

    Returns:
        {name: text} of `chat_template.jinja` and `generation_config.json`, each where it differs. The generation config
        ends a text at the template's end-of-turn token, too.
    """
    files: dict[str, str] = {}
    template = tokenizer.chat_template if trained else _template_of(start)
    if isinstance(template, str) and template != _template_of(folder):
        files[TEMPLATE] = template
    config = _read(start / GENERATION) or _read(folder / GENERATION)
    end = _end_of_turn(tokenizer) if trained else None
    if end is not None:
        ends = config.get("eos_token_id", _read(folder / "config.json").get("eos_token_id", tokenizer.eos_token_id))
        known = ends if isinstance(ends, list) else [ends] if ends is not None else []
        if end not in known:
            config = {**config, "eos_token_id": [*known, end]}
    if config and config != _read(folder / GENERATION):
        files[GENERATION] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return files


def _end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an answer, or None where the template was of no use (to prompts and completions)."""
    try:
        return int(tokenizer.convert_tokens_to_ids(ChatTemplate(tokenizer).end_of_turn))
    except UserError:
        return None


def _template_of(folder: Path) -> Any:
    path = folder / TEMPLATE
    return (
        path.read_text(encoding="utf-8")
        if path.is_file()
        else _read(folder / "tokenizer_config.json").get("chat_template")
    )


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
