"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, PROBLEM = "OK", "note", "PROBLEM"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: What it is about, in a word.
        status: OK, NOTE (works, but worth knowing) or PROBLEM (a run cannot work).
        text: What was found.
        remedy: What to do about it, without a full stop; "" if nothing.
    """

    name: str
    status: str
    text: str
    remedy: str = ""


def gigabytes(count_bytes: float) -> str:
    """Bytes in GB, the way the other commands count them."""
    return f"{count_bytes / 1e9:.1f} GB" if count_bytes < 1e11 else f"{count_bytes / 1e9:,.0f} GB"
