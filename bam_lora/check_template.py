"""What `bam-lora check` says of the chat template."""

from __future__ import annotations

from typing import Any

from bam_lora.chat_template import ChatTemplate
from bam_lora.errors import UserError

_OWN = "chat template: the base's own"
_MARKED = "its {% generation %} markers say where an answer begins"
_COMPARED = "it has no {% generation %} markers and needs none: an answer begins where the prompt of inference ends"


def template_lines(tokenizer: Any, note: str | None) -> list[str]:
    """Which template a run uses, how answers are found in it, and by which trained token they end.

    Args:
        tokenizer: With the template that the run uses.
        note: What `settle_template` said of it; None: it is the base's own.
    """
    lines = [f"chat        {note or _OWN}"]
    try:
        template = ChatTemplate(tokenizer)
    except UserError as error:  # plain prompts and completions need none; the first conversation would stop the run
        return [*lines, f"note        only plain prompts and completions can be trained: {error}"]
    found = _MARKED if template.has_markers() else _COMPARED
    end, eos = template.end_of_turn, tokenizer.eos_token
    if end == eos:
        stop = f"answers end with {end!r}, the tokenizer's EOS, which is trained"
    else:
        stop = (
            f"answers end with {end!r}, which is trained and ends texts in the result's generation config; "
            f"the tokenizer's EOS {eos!r} is not trained in conversations"
        )
    return [*lines, f"            {found}", f"            {stop}"]
