"""Whether a difference between two runs is one between methods."""

from __future__ import annotations

from typing import Any

# Runs whose training tokens differ by more than this share are not compared: more data is not a better method.
TOKENS_TOLERANCE = 0.01


def reasons_against(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Why a difference between the two would not be one between methods; empty if they can be compared."""
    reasons = [f"{report['name']} is unfinished" for report in (a, b) if not report["status"]["finished"]]
    if (a["base"], a["revision"]) != (b["base"], b["revision"]):
        reasons.append(f"other base: {_base(a)} and {_base(b)}")
    tokens = [report["cost"]["train_tokens"] for report in (a, b)]
    if abs(tokens[0] - tokens[1]) > TOKENS_TOLERANCE * max(tokens):
        reasons.append(f"other training tokens: {tokens[0]:,} and {tokens[1]:,}")
    unmeasured = [report["name"] for report in (a, b) if report["summary"]["learned"] is None]
    unmeasured += [report["name"] for report in (a, b) if report["summary"]["forgotten"] is None]
    reasons += [f"{name} has not measured both languages" for name in dict.fromkeys(unmeasured)]
    if a["evaluation"] and b["evaluation"]:
        if _sets(a) != _sets(b):
            reasons.append("other evaluation sets, or other text under the same names")
        reasons += [
            f"other {key.replace('_', ' ')} in evaluation: {a['evaluation'][key]} and {b['evaluation'][key]}"
            for key in a["evaluation"]
            if a["evaluation"][key] != b["evaluation"][key]
        ]
    return reasons


def _base(report: dict[str, Any]) -> str:
    return f"{report['base']}" + (f" at {report['revision']}" if report["revision"] else "")


def _sets(report: dict[str, Any]) -> set[tuple[Any, ...]]:
    """What was measured on: names with their sizes, so that a file edited in between is noticed."""
    return {(s["set"], s["role"], s["documents"], s["bytes"]) for s in report["scores"] if s["branch"] is None}
