"""The Hugging Face Hub, for `bam-lora doctor`: whether there is a token, and whether the Hub answers and takes it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from bam_lora.doctor_finding import NOTE, OK, PROBLEM, Finding
from bam_lora.errors import first_line
from bam_lora.in_time import in_time

_SECONDS = 5.0
_REFUSED = (401, 403)


def token() -> Iterator[Finding]:
    """Whether there is a token, and from where; never what it is."""
    from huggingface_hub import constants, get_token

    if not get_token():
        yield Finding(
            "token", NOTE, "none: enough for what is open; gated models (Llama, Gemma) need one", "hf auth login"
        )
        return
    named = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
    yield Finding("token", OK, f"found in {named[0] if named else constants.HF_TOKEN_PATH}")


def reachable() -> Iterator[Finding]:
    """Whether the Hub answers within a few seconds; offline is worth a note, for the cache may hold all there is to."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    name = parts.hostname or constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", NOTE, f"{name} is not asked: HF_HUB_OFFLINE is set")
        return
    begun = time.monotonic()
    try:
        status = in_time(lambda: _ask(constants.ENDPOINT), _SECONDS)
    except Exception as error:  # whatever the network's libraries raise
        yield _away(name, first_line(error))
        return
    if status >= 500:
        yield _away(name, f"it answers with status {status}")
    else:  # 401 and 404 are answers too
        yield Finding("hub", OK, f"{name} answers in {time.monotonic() - begun:.1f} s")


def accepted() -> Iterator[Finding]:
    """Whether the Hub takes the token, where there is one and the Hub answers: with a wrong one it refuses all."""
    from huggingface_hub import constants, get_token

    given = get_token()
    if not given or constants.HF_HUB_OFFLINE:
        return
    try:
        status = in_time(lambda: _ask_who(constants.ENDPOINT, given), _SECONDS)
    except Exception:  # `reachable` has said so
        return
    if status in _REFUSED:
        yield Finding(
            "token",
            PROBLEM,
            "the Hub refuses it: expired, revoked or mistyped, and with it not even open models can be downloaded",
            "hf auth login with a new one, or unset HF_TOKEN and hf auth logout",
        )


def _ask_who(endpoint: str, given: str) -> int:
    """The status that the Hub answers with when it is asked whose token this is."""
    from huggingface_hub.utils import build_hf_headers, get_session

    headers = build_hf_headers(token=given)
    return int(get_session().get(f"{endpoint}/api/whoami-v2", headers=headers, timeout=_SECONDS).status_code)


def _ask(endpoint: str) -> int:
    """The status that the Hub answers with."""
    from huggingface_hub.utils import get_session

    return int(get_session().head(f"{endpoint}/api/models", timeout=_SECONDS).status_code)


def _away(name: str, reason: str) -> Finding:
    return Finding(
        "hub",
        NOTE,
        f"{name} is out of reach ({reason}): only what is in the cache or on this disk can be used",
        "Look at network, proxy and HF_ENDPOINT, if you want to download",
    )
