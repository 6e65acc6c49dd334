"""The GPU benchmark's results as Markdown: `python benchmarks/gpu/tables.py RESULTS.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shows import speed_of

GIB = 1 << 30
_STAGES = ("base loaded", "adapter and trainer made", "after the first step")


def tables(values: Mapping[str, Any]) -> str:
    """All tables: what must be shown, memory and speed of branches, peers, fold, run, and what is missing."""
    jobs = {name: one for name, one in values["jobs"].items() if "result" in one}
    peak = values["machine"]["stated_peak_flops_per_second"]
    parts = [
        machine_line(values["machine"]),
        table(("must show", "verdict", "figures"), map(dict.values, values["must_show"])),
        branch_memory(jobs),
        branch_speed(jobs, peak, values["machine"]["product_flops_per_second"]),
        components(jobs),
        speeds(jobs),
        folds(jobs),
        runs(jobs),
        overhead_lines(values.get("overhead")),
        missing(values),
    ]
    return "\n\n".join(part for part in parts if part)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, or nothing if it has no rows."""
    head, lines = list(head), [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]) if lines else ""


def machine_line(machine: Mapping[str, Any]) -> str:
    """The device, what a product reaches on it, and the disk."""
    stated = machine["stated_peak_flops_per_second"]
    stated_text = f" of {stated / 1e12:.0f} stated" if stated else ""
    memory = f", {machine['total_bytes'] / GIB:.1f} GiB, CUDA {machine['cuda']}" if "total_bytes" in machine else ""
    return (
        f"{machine['name']}{memory}; a bf16 product reaches {machine['product_flops_per_second'] / 1e12:.3g} TFLOP/s"
        f"{stated_text}; the disk takes {machine['write_bytes_per_second'] / 1e9:.2f} GB/s"
    )


def branch_memory(jobs: Mapping[str, Any]) -> str:
    """Peaks of branches by stage, beside the estimate."""
    head = ("branch", "free, GiB", *_STAGES, "peak (driver)", "peak (torch)", "estimate", "estimate / peak")
    rows = []
    for name, one in of_kind(jobs, "branch"):
        memory = one["result"]["memory"]
        stages = {stage["name"]: stage["driver_bytes"] for stage in memory["stages"]}
        sizes = [*(stages[stage] for stage in _STAGES), memory["peak_driver_bytes"], memory["peak_torch_bytes"],
                 memory["estimated_bytes"]]  # fmt: skip
        ratio = number(memory["estimated_over_measured"], ".2f")
        rows.append([name.removeprefix("branch "), gib(one["card"]["free_bytes"]), *map(gib, sizes), ratio])
    return table(head, rows)


def branch_speed(jobs: Mapping[str, Any], stated: float | None, reached: float) -> str:
    """Tokens/s and model FLOP utilisation of branches, of the stated peak and of what a product reaches."""
    head = ("branch", "batch", "checkpointing", "attention", "tokens/s", "TFLOP/s", "MFU", "of a product", "load, s")
    rows = []
    for name, one in of_kind(jobs, "branch"):
        result = one["result"]
        used, flops = result["effective"], result["flops_per_second"]
        batch = f"{used['batch']} x {used['accumulation']} x {used['length']}"
        rows.append([
            name.removeprefix("branch "), batch, "yes" if used["checkpointing"] else "no", used["attention"],
            f"{result['tokens_per_second']:,.0f}", f"{flops / 1e12:.3g}",
            number(flops / stated if stated else None, ".1%"), f"{flops / reached:.1%}",
            f"{result['load_seconds']:.1f}",
        ])  # fmt: skip
    return table(head, rows)


def components(jobs: Mapping[str, Any]) -> str:
    """What the estimates say by component."""
    names: list[str] = []
    found: list[tuple[str, dict[str, int]]] = []
    for name, one in of_kind(jobs, "branch"):
        parts = {part["name"]: part["bytes"] for part in one["result"]["memory"]["estimated_components"]}
        names += [part for part in parts if part not in names]
        found.append((name, parts))
    rows = [[name.removeprefix("branch "), *(gib(parts.get(part)) for part in names)] for name, parts in found]
    return table(("estimated, GiB", *names), rows)


def speeds(jobs: Mapping[str, Any]) -> str:
    """Our branch and the peers."""
    entries = of_kind(jobs, "speed")
    ours = next((speed_of(one["result"]) for _, one in entries if one["way"] == "ours"), None)
    rows = []
    for name, one in entries:
        result = one["result"]
        speed = speed_of(result)
        losses = (
            [f"{loss:.4f}" for loss in (result["losses"][0], result["losses"][-1])] if result["losses"] else ["", ""]
        )
        memory = [gib(result["peak_driver_bytes"]), gib(result["peak_torch_bytes"])]
        ratio = number(ours / speed if ours else None, ".3f")
        rows.append([name.removeprefix("speed "), f"{speed:,.0f}", ratio, *memory, *losses])
    return table(("way", "tokens/s", "ours / it", "peak (driver)", "peak (torch)", "first loss", "last loss"), rows)


def folds(jobs: Mapping[str, Any]) -> str:
    """The fold beside a copy."""
    rows = []
    for name, one in of_kind(jobs, "fold"):
        result = one["result"]
        times = [f"{result[key]:.2f}" for key in ("copy_seconds", "device_seconds", "cpu_seconds", "device_over_copy")]
        rows.append([name, f"{result['bytes'] / 1e9:.2f} GB", *times, f"{result['identical']:.5%}"])
    return table(("", "weights", "copy, s", "GPU, s", "CPU, s", "GPU / copy", "identical"), rows)


def runs(jobs: Mapping[str, Any]) -> str:
    """Stages of whole runs."""
    rows = []
    for name, one in of_kind(jobs, "run"):
        result = one["result"]
        change, scored = result["setup_seconds"] + result["write_seconds"], result["evaluation"]
        stages = {**result["seconds_by_stage"], "first load, quantised": result["load_seconds"],
                  "change of branch: an adapter written, a trainer set up": change,
                  f"scoring {scored['bytes']:,} bytes": scored["seconds"], "all": result["wall_seconds"]}  # fmt: skip
        rows += [[name, stage, f"{seconds:.2f}"] for stage, seconds in stages.items()]
        memory = result["memory"]
        rows.append([name, "peak memory (driver), GiB", gib(memory["peak_driver_bytes"])])
        rows.append([name, "estimate / peak", number(memory["estimated_over_measured"], ".2f")])
    return table(("run", "stage", "seconds"), rows)


def overhead_lines(found: Mapping[str, Any] | None) -> str:
    """The arithmetic of the loop's overhead, in words and numbers."""
    if found is None:
        return ""
    once = [f"{name} {seconds:.2f}" for name, seconds in found["per_iteration_seconds"].items()]
    each = [f"{name} {seconds:.2f}" for name, seconds in found["per_branch_seconds"].items()]
    return (
        f"Overhead of the loop ({found['shape']}), {found['branches']} branches of {found['branch_tokens']:,} tokens: "
        f"{' + '.join(once)} + {found['branches']} x ({' + '.join(each)}) = {found['added_seconds']:.2f} s; plain "
        f"training {found['branches']} x {found['branch_tokens']:,} / {found['tokens_per_second']:,.0f} tokens/s = "
        f"{found['plain_seconds']:,.0f} s; {found['share']:.2%}, {found['share_beside_a_script']:.2%} beside a script "
        "that loads, sets up and writes, too. Scoring and the preparing of data aside."
    )


def missing(values: Mapping[str, Any]) -> str:
    """Who failed and who was passed over, and why."""
    failed = [f"failed: {name}: {one['error']}" for name, one in values["jobs"].items() if "error" in one]
    return "\n".join([*failed, *(f"skipped: {name}: {why}" for name, why in values["skipped"].items())])


def of_kind(jobs: Mapping[str, Any], kind: str) -> list[tuple[str, Any]]:
    """Jobs of a kind with their names."""
    return [(name, one) for name, one in jobs.items() if one["kind"] == kind]


def gib(size: int | None) -> str:
    """GiB with two digits; nothing if it is not known."""
    return "" if size is None else f"{size / GIB:.2f}"


def number(value: float | None, form: str) -> str:
    """A number in a format; nothing if it is not known."""
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    sys.stdout.write(tables(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))) + "\n")
