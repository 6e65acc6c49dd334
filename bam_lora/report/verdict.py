"""The one sentence (or two) that says what came out, and no more than the numbers carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bam_lora.report.format import signed, signless
from bam_lora.report.noise import NOISE_FACTOR


def verdict(reports: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None) -> str:
    """What was learned and forgotten, and by whom.

    Args:
        reports: Reports of runs, from `collect` or a comparison.
        comparison: What `compare` returned for them, or None.

    Returns:
        Plain text, not escaped: names of runs come from the file system.
    """
    if comparison is None:
        named = [f"{report['name']}: " if len(reports) > 1 else "" for report in reports]
        return " ".join(n + _alone(r) for n, r in zip(named, reports, strict=True))
    pairs = comparison["pairs"]
    text = _two(pairs[0], reports) if len(pairs) == 1 else _many(comparison)
    return f"{text} {_against_base(reports)}".rstrip()


def _alone(report: Mapping[str, Any]) -> str:
    summary, status = report["summary"], report["status"]
    prefix = ""
    if not status["finished"]:
        planned = status["iterations_planned"]
        prefix = f"Unfinished: {status['iterations_done']} of {planned or 'an unknown number of'} iterations merged. "
    target = _change("The target", "improved", "worsened", summary, "target", summary["learned"])
    forgotten = summary["forgotten"]
    source = _change("the source", "improved", "worsened", summary, "source", None if forgotten is None else -forgotten)
    if limits := report.get("limits"):
        prefix += f"limits.{limits['by']} ended the run after iteration {limits['iteration']} of {limits['planned']}. "
    return f"{prefix}{target}; {source}."


def _change(who: str, better: str, worse: str, summary: Mapping[str, Any], role: str, improvement: float | None) -> str:
    """Improvement is positive where fewer bits are needed."""
    if improvement is None:
        return f"{who} was not measured before and after"
    before, after = summary[f"{role}_before"], summary[f"{role}_after"]
    stderr = summary["learned_stderr" if role == "target" else "forgotten_stderr"]
    numbers = f"from {signless(before)} to {signless(after)} bits per byte"
    if improvement == 0:
        return f"{who} did not change ({signless(before)} bits per byte)"
    if stderr is not None and abs(improvement) < NOISE_FACTOR * stderr:
        return f"{who} changed by {signed(-improvement)}, {numbers}, which is within noise (± {signless(stderr)})"
    verb = better if improvement > 0 else worse
    doubt = "" if stderr is not None else " (no standard error: this may be noise)"
    return f"{who} {verb} by {signless(abs(improvement))}, {numbers}{doubt}"


def _by_name(reports: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return next(report for report in reports if report["name"] == name)


def _two(pair: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> str:
    """Two runs: names the better learner and the better keeper, or says that there is none."""
    if not pair["comparable"]:
        return f"{pair['a']} and {pair['b']} cannot be compared: {'; '.join(pair['reasons'])}."
    more, less = pair["learned_more"], pair["forgot_less"]
    learning = _side(pair, reports, more, "learned", "learned more", "learned the same within noise")
    forgetting = _side(pair, reports, less, "forgotten", "forgot less", "forgot the same within noise")
    if more in ("a", "b") and more == less:
        return f"{learning} and {forgetting.removeprefix(pair[more] + ' ')}: better on both counts."
    if {more, less} == {"a", "b"}:
        return f"{learning}; {forgetting}. Learning and forgetting trade off here: neither run dominates."
    return f"{learning}; {forgetting}."


def _side(
    pair: Mapping[str, Any], reports: Sequence[Mapping[str, Any]], winner: str | None, key: str, wins: str, ties: str
) -> str:
    a, b = (_by_name(reports, pair[side])["summary"][key] for side in ("a", "b"))
    if winner in ("a", "b"):
        own, other = (a, b) if winner == "a" else (b, a)
        return f"{pair[winner]} {wins} ({signless(own)} against {signless(other)} bits per byte)"
    numbers = f"({signless(a)} and {signless(b)} bits per byte)"
    if winner == "tie":
        return f"{pair['a']} and {pair['b']} {ties} {numbers}"
    doubt = "without standard errors the difference cannot be told from noise"
    return f"{pair['a']} and {pair['b']} {key} {numbers}, but {doubt}"


def _many(comparison: Mapping[str, Any]) -> str:
    """Three runs or more: the best learner and the best keeper, each with those it cannot be told from."""
    runs, pairs = comparison["runs"], comparison["pairs"]
    if not all(pair["comparable"] for pair in pairs):
        bad = [f"{pair['a']} and {pair['b']} ({'; '.join(pair['reasons'])})" for pair in pairs if pair["reasons"]]
        return f"Not all of these runs can be compared: {', '.join(bad)}."
    learned = max(runs, key=lambda run: run["summary"]["learned"])["name"]
    kept = min(runs, key=lambda run: run["summary"]["forgotten"])["name"]
    learners = [learned, *_not_worse(pairs, learned, "learned_more")]
    keepers = [kept, *_not_worse(pairs, kept, "forgot_less")]
    both = [name for name in learners if name in keepers]
    text = f"Of {len(runs)} runs, {_ranked(learners, 'learned most')}; {_ranked(keepers, 'forgot least')}."
    if not both:
        return text + " Learning and forgetting trade off here: no run dominates."
    return text


def _not_worse(pairs: Sequence[Mapping[str, Any]], best: str, key: str) -> list[str]:
    """The runs that differ from the best one by less than noise."""
    mine = [pair for pair in pairs if best in (pair["a"], pair["b"]) and pair[key] in ("tie", "unknown")]
    return [pair["b"] if pair["a"] == best else pair["a"] for pair in mine]


def _ranked(names: Sequence[str], what: str) -> str:
    if len(names) == 1:
        return f"{names[0]} {what}"
    return f"{', '.join(names[:-1])} and {names[-1]} {what} (a tie within noise)"


def _against_base(reports: Sequence[Mapping[str, Any]]) -> str:
    """Beating another run is worth little if both lost against the base: say so."""
    worse = [
        report["name"]
        for report in reports
        if report["summary"]["learned"] is not None and report["summary"]["learned"] <= 0
    ]
    if worse:
        return f"Against the base, {' and '.join(worse)} did not improve on the target at all."
    return ""
