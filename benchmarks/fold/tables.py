"""The fold benchmark's numbers as Markdown."""

from __future__ import annotations

from typing import Any

_HEAD = "| | seconds (min, max) | / cp | / bam-lora | anonymous above torch | file-backed | identical | ulp | kept |"


def table(results: dict[str, Any]) -> str:
    """One table a model, the floor under each, and who is not in it."""
    lines = []
    for name, model in results["models"].items():
        lines += [f"{name}, {model['bytes'] / 1e9:.2f} GB, {model['rounds']} rounds", "", _HEAD, "|---" * 9 + "|"]
        lines += [_row(key, one) for key, one in model["contenders"].items()]
        mine, floor = model["contenders"]["bam-lora"], model["arithmetic"]
        lines += [
            "",
            f"`import torch` {mine['import_torch_seconds']['median']:.2f} s, "
            f"{mine['import_torch_anonymous_bytes'] / 1e6:.0f} MB; the products alone {floor['product_seconds']:.2f} s "
            f"on {floor['threads']} threads ({floor['with_conversion_seconds']:.2f} s with bf16 to fp32 and back)",
            "",
        ]
    lines += [f"{name}: {reason}" for name, reason in results["absent"].items()]
    return "\n".join(lines)


def _row(name: str, one: dict[str, Any]) -> str:
    seconds, error = one["seconds"], one["error"]
    cells = [
        name,
        f"{seconds['median']:.2f} ({seconds['min']:.2f}, {seconds['max']:.2f})",
        f"{one['over_copy']:.2f}",
        f"{one['over_bam_lora']:.2f}",
        f"{max(one['anonymous_above_import_bytes'], 0) / 1e6:.0f} MB",
        f"{one['peak_file_bytes']['max'] / 1e6:.0f} MB",
        *([f"{error['identical']:.4%}", f"{error['largest_ulp']:.3g}", f"{error['kept']:.2%}"] if error else [""] * 3),
    ]
    return f"| {' | '.join(cells)} |"
