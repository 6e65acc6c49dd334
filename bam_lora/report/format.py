"""Numbers for people: the same rounding in the page, the terminal and the model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

MISSING = "–"
MINUS = "−"
_KIB = 1024


def signless(value: float | None, digits: int = 4) -> str:
    """0.1234; only negative numbers carry a sign."""
    return MISSING if value is None else _minus(f"{value:.{digits}f}")


def signed(value: float | None, digits: int = 4) -> str:
    """+0.1234 or −0.1234."""
    return MISSING if value is None else _minus(f"{value:+.{digits}f}")


def with_error(value: float | None, stderr: float | None, digits: int = 4) -> str:
    """0.1234 ± 0.0012: one standard error."""
    return signless(value, digits) + (f" ± {stderr:.{digits}f}" if value is not None and stderr is not None else "")


def percent(value: float | None) -> str:
    """A share of one as a percentage."""
    return MISSING if value is None else _minus(f"{_three_digits(100 * value)} %")


def count(value: float | None) -> str:
    """1,234,567."""
    return MISSING if value is None else f"{value:,.0f}"


def short_count(value: float) -> str:
    """1.2M, for the ticks of an axis."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return _minus(f"{value / limit:.4g}{unit}")
    return _minus(f"{value:.4g}")


def duration(seconds: float | None) -> str:
    """3.2 s, 4 min 05 s, 2 h 07 min."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 59.95 else "1 min 00 s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def size(value: float | None) -> str:
    """1.23 GiB."""
    if value is None:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < _KIB:
            return f"{value:.0f} B" if unit == "B" else f"{_three_digits(value)} {unit}"
        value /= _KIB
    return f"{_three_digits(value)} TiB"


def _three_digits(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _minus(text: str) -> str:
    """A true minus sign, and none before a zero."""
    return text.replace("-", MINUS) if text.strip("-+0.% ") else text.replace("-", "")


def scores_line(scores: Iterable[Mapping[str, Any]]) -> str:
    """The scores of one model as one line, such as "german 1.9801, english 1.2064 bits per byte"."""
    return ", ".join(f"{score['set']} {score['bits_per_byte']:.4f}" for score in scores) + " bits per byte"
