"""What the benchmark must show, each PASS, FAIL or "not measured" with its figures; measured is what ran on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from holding import DESKTOP_GIB, GIB
from measuring import WARM_UP_STEPS
from peers.curves import NotComparable, compare, tolerance_of
from plan import LEAST

SHAPE = "llama-3.1-8b"
LEAST_SPEED = 0.97
LOSS_TOLERANCE = 0.01  # mean difference over mean loss
DISK_TOLERANCE = 1.1  # of a plain copy's time
LEAST_IDENTICAL = 0.9999
ESTIMATE_TOLERANCE = 0.1
LARGEST_OVERHEAD = 0.05
_GRAIN = 4 << 20
NOT_MEASURED = "not measured"


def must_show(values: Mapping[str, Any]) -> list[dict[str, str]]:
    """[{"claim", "verdict", "figures"}] in the issue's order."""
    machine = values["machine"] or {}
    jobs = values["jobs"] if "total_bytes" in machine else {}  # on a CPU nothing of it is measured
    return [
        _fits(jobs, 2048, 12),
        _fits(jobs, 8192, 24),
        *speeds(jobs),
        *_folds(jobs),
        _estimates(jobs),
        _overhead(values.get("overhead") if jobs else None),
    ]


def _line(claim: str, holds: bool | None, figures: str) -> dict[str, str]:
    verdict = NOT_MEASURED if holds is None else "PASS" if holds else "FAIL"
    return {"claim": claim, "verdict": verdict, "figures": figures}


def _fits(jobs: Mapping[str, Any], length: int, card: int) -> dict[str, str]:
    claim = f"8 B, NF4, r=64, length {length} packed, trains within {card} GB"
    name, note = f"branch {SHAPE}, length {length}, {card} GB", ""
    one = jobs.get(name)
    if one is None:
        return _line(claim, None, "")
    if "error" in one and "result" in jobs.get(name + LEAST, {}):
        note = f"{LEAST.removeprefix(',')}; with what check --fit chooses: {one['error']}"
        one = jobs[name + LEAST]
    if "error" in one:
        return _line(claim, False, one["error"])
    memory, free = one["result"]["memory"], one["card"]["free_bytes"]
    room = round((card - DESKTOP_GIB) * GIB)
    figures = f"peak {memory['peak_driver_bytes'] / GIB:.2f} GiB by the driver, {free / GIB:.2f} GiB were free"
    used = one["result"]["effective"]["length"]
    holds = used == length and free <= room + _GRAIN and memory["peak_driver_bytes"] <= room + _GRAIN
    return _line(claim, holds, figures + ("" if used == length else f"; only at length {used}") + note)


def speed_of(result: Mapping[str, Any]) -> float:
    """Tokens a second, padding not counted, over all steps but the first ones."""
    seconds, tokens = result["step_seconds"][WARM_UP_STEPS:], result["tokens"][WARM_UP_STEPS:]
    return float(sum(tokens) / sum(seconds))


def speeds(jobs: Mapping[str, Any]) -> list[dict[str, str]]:
    """Our branch beside the peers, all with the same settings."""
    entries = {one["way"]: one for name, one in jobs.items() if name.startswith(f"speed {SHAPE}, ")}
    found = {way: speed_of(one["result"]) for way, one in entries.items() if "result" in one}
    return [
        _faster(entries, found, "trl-best", LEAST_SPEED, f"tokens/s at least {LEAST_SPEED} of TRL's at its best"),
        _faster(entries, found, "unsloth", 1.0, "tokens/s not below unsloth's"),
        _faster(entries, found, "trl-defaults", 1.0, "gain over TRL's defaults"),
        _equal_losses(entries),
        _near_losses(entries),
    ]


def _faster(
    entries: Mapping[str, Any], found: Mapping[str, float], way: str, least: float, claim: str
) -> dict[str, str]:
    failed = [f"{one}: {entries[one]['error']}" for one in ("ours", way) if "error" in entries.get(one, {})]
    if "ours" in entries and "error" in entries["ours"]:
        return _line(claim, False, "; ".join(failed))
    if "ours" not in found or way not in found:
        return _line(claim, None, "; ".join(failed))
    ratio = found["ours"] / found[way]
    return _line(claim, ratio >= least, f"{found['ours']:,.0f} / {found[way]:,.0f} = {ratio:.3f}")


def _equal_losses(entries: Mapping[str, Any]) -> dict[str, str]:
    """Beside TRL with fp32 adapters, as ours are: but for rounding, the same numbers."""
    claim = "loss curve equal to TRL's at its best with fp32 adapters"
    results = {way: one["result"] for way, one in entries.items() if "result" in one}
    if "ours" not in results or "trl-best-fp32" not in results:
        return _line(claim, None, "")
    repeats = [results[way] for way in ("ours", "ours-again") if way in results]
    try:
        tolerance = tolerance_of(results["trl-best-fp32"], repeats)
        verdict = compare(results["trl-best-fp32"], results["ours"], tolerance)
    except NotComparable as error:
        return _line(claim, False, str(error))
    return _line(claim, verdict.equal, verdict.reason)


def loss_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two curves over the mean of the second.

    Raises:
        ValueError: If one has more steps than the other.
    """
    differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return statistics.mean(differences) / statistics.mean(other)


def _near_losses(entries: Mapping[str, Any]) -> dict[str, str]:
    """Beside TRL as it is, whose adapters are bf16."""
    claim = f"loss curve as TRL's at its best, whose adapters are bf16, to {LOSS_TOLERANCE:.0%}"
    curves = {way: entries[way]["result"]["losses"] for way in ("ours", "trl-best") if "result" in entries.get(way, {})}
    if len(curves) < 2 or not all(curves.values()):
        return _line(claim, None, "")
    if len({len(curve) for curve in curves.values()}) > 1:
        return _line(claim, False, "; ".join(f"{way}: {len(curve)} losses" for way, curve in curves.items()))
    difference = loss_difference(curves["ours"], curves["trl-best"])
    last = f"last {curves['ours'][-1]:.4f} and {curves['trl-best'][-1]:.4f}"
    return _line(claim, difference <= LOSS_TOLERANCE, f"mean difference {difference:.3%}, {last}")


def _folds(jobs: Mapping[str, Any]) -> list[dict[str, str]]:
    claims = (
        f"8 B fold on the GPU at disk speed: at most {DISK_TOLERANCE} of a plain copy's time",
        f"8 B fold on the GPU: {LEAST_IDENTICAL:.2%} of the numbers as on the CPU",
    )
    one = jobs.get(f"fold {SHAPE}")
    if one is None or "error" in one:
        return [_line(claim, None if one is None else False, "" if one is None else one["error"]) for claim in claims]
    result = one["result"]
    ratio, same = result["device_over_copy"], result["identical"]
    copied = min(result["copy_seconds"], result.get("copy_again_seconds", result["copy_seconds"]))
    times = f"{result['device_seconds']:.1f} s / {copied:.1f} s = {ratio:.2f}"
    return [
        _line(claims[0], ratio <= DISK_TOLERANCE, f"{times}; on the CPU {result['cpu_seconds']:.1f} s"),
        _line(claims[1], same >= LEAST_IDENTICAL, f"{same:.5%}: {result['different']:,} of {result['elements']:,}"),
    ]


def _estimates(jobs: Mapping[str, Any]) -> dict[str, str]:
    claim = f"check's estimate of GPU memory within {ESTIMATE_TOLERANCE:.0%} of each measured peak"
    ratios = {
        name: one["result"]["memory"]["estimated_over_measured"]
        for name, one in jobs.items()
        if one["kind"] in ("branch", "run") and "result" in one
    }
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    if not known:
        return _line(claim, None, "")
    worst = max(known, key=lambda name: abs(known[name] - 1))
    off = [name for name, ratio in known.items() if abs(ratio - 1) > ESTIMATE_TOLERANCE]
    return _line(claim, not off, f"{len(known) - len(off)} of {len(known)}; furthest off {known[worst]:.2f} ({worst})")


def _overhead(found: Mapping[str, Any] | None) -> dict[str, str]:
    claim = f"overhead of the loop at 8 B below {LARGEST_OVERHEAD:.0%} for branches of 10 M tokens"
    if found is None:
        return _line(claim, None, "")
    if found["shape"] != SHAPE:
        return _line(claim, None, f"only {found['shape']} was run")
    figures = f"{found['added_seconds']:.1f} s / {found['plain_seconds']:.0f} s = {found['share']:.2%}"
    figures += f"; {found['share_beside_a_script']:.2%} beside a script that loads, sets up and writes, too"
    return _line(claim, found["share"] < LARGEST_OVERHEAD, figures)
