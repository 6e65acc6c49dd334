"""What a training step allocates on a GPU, counted without one, against what `bam-lora check` estimates.

    python benchmarks/allocations/run.py [--only TEXT] [--work DIR]

The branches of the GPU benchmark (benchmarks/gpu), at the real sizes, and some more: each runs in a process of its own
over fake tensors, which have sizes but no memory. Counted are the blocks that torch's allocator is asked for, and what
it would reserve for them. Not seen are CUDA's context and what kernels take for themselves: only a card shows these.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.extend([str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "gpu")])
from common.provenance import ROOT, provenance_of
from plan import branches

from bam_lora.memory import CONTEXT_BYTES

HERE = Path(__file__).resolve().parent
SHAPES = ("llama-3.1-8b", "mistral-7b-v0.3", "qwen3-4b", "qwen3-0.6b")
_GIB = 1 << 30
_CONTEXT = "GPU context"


def cases() -> dict[str, dict[str, Any]]:
    """Settings of step.py by name: the GPU benchmark's branches, then others, each with something else about it."""
    found = {}
    for shape in SHAPES:
        for job in branches(shape):
            rows = job.settings["step_tokens"] // job.settings["length"]
            found[job.name] = _case(shape, job.settings["length"], rows=rows, card_gib=job.card_gib)
    small, plain = "qwen3-0.6b", {"checkpointing": False}
    found |= {
        "8 B, rows of 512, four at once": _case("llama-3.1-8b", 512, training={"per_device_train_batch_size": 4}),
        "8 B, eager attention": _case("llama-3.1-8b", 1024, attention="eager"),
        "0.6 B, not quantised": _case(small, 2048, training=plain, quantization={"bits": 16}),
        "0.6 B, dropout": _case(small, 2048, training=plain, lora={"dropout": 0.05}),
        "0.6 B, dropout, checkpointing": _case(small, 2048, lora={"dropout": 0.05}),
        "0.6 B, rank 16, attention's layers only": _case(
            small, 4096, lora={"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        ),
        "4 B, all that backward needs": _case("qwen3-4b", 2048, training=plain),
        "7 B, all that backward needs": _case("mistral-7b-v0.3", 1024, training=plain),
    }
    return found


def _case(
    shape: str, length: int, *, rows: int = 8, card_gib: float | None = None, attention: str = "packed", **changes: Any
) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "base": shape,
        "output": "unused",
        "data": {"target": [{"path": "unused.jsonl"}], "sequence_length": length},
        "lora": {"r": 64},
        "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows, "warmup_steps": 0},
    }
    for part, values in changes.items():
        recipe[part] = {**recipe.get(part, {}), **values}
    return {"shape": shape, "card_gib": card_gib, "attention": attention, "recipe": recipe}


def main() -> None:
    options = parse()
    facts = provenance_of("make bench-allocations", 1, allow_dirty=options.allow_dirty)
    results: dict[str, Any] = {"provenance": facts, "cases": {}}
    chosen = {name: case for name, case in cases().items() if options.only in name}
    for name, case in chosen.items():
        results["cases"][name] = judged(case, attempt(case, options.work))
        print(table({name: results["cases"][name]}), flush=True)
    day = datetime.date.today().isoformat()
    target = options.work / "trial.json" if options.only else HERE / "results" / f"{day}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results["cases"]), target, sep="\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "allocations", help="for the compiled guard")
    parser.add_argument("--only", default="", help="cases with this in their names; their result is not recorded")
    parser.add_argument("--allow-dirty", action="store_true", help="count with uncommitted changes")
    options = parser.parse_args()
    options.work = options.work.resolve()
    return options


def attempt(case: dict[str, Any], work: Path) -> dict[str, Any]:
    """What step.py counts for one case."""
    work.mkdir(parents=True, exist_ok=True)
    settings = work / "settings.json"
    settings.write_text(json.dumps({**case, "work": str(work)}))
    command = [sys.executable, str(HERE / "step.py"), str(settings)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: a case failed:\n{done.stderr}")
    counted: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counted


def judged(case: dict[str, Any], counted: dict[str, Any]) -> dict[str, Any]:
    """The estimate beside what was counted, both without the context, and whether it would fit the case's card."""
    estimated = sum(one["bytes"] for one in counted["estimated"] if one["name"] != _CONTEXT)
    card = case["card_gib"]
    room = None if card is None else round(card * _GIB)
    return {
        **{name: case[name] for name in ("shape", "card_gib", "recipe")},
        **counted,
        "estimated_bytes": estimated,
        "estimated_over_allocated": estimated / counted["allocated"],
        "estimated_over_reserved": estimated / counted["reserved"],
        "free_with_context": None if room is None else room - counted["reserved"] - CONTEXT_BYTES,
    }


def table(found: dict[str, Any]) -> str:
    """Estimated, allocated, reserved, as Markdown."""
    lines = [
        "| case | batch, checkpointing | estimated | allocated | reserved | estimated / reserved | left of the card |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        sizes = (one["estimated_bytes"], one["allocated"], one["reserved"])
        left = "" if one["free_with_context"] is None else f"{one['free_with_context'] / _GIB:.1f} GiB"
        lines.append(
            f"| {name} | {one['batch']} x {one['length']:,}, {'yes' if one['checkpointing'] else 'no'} | "
            + " | ".join(f"{size / _GIB:.2f} GiB" for size in sizes)
            + f" | {one['estimated_over_reserved']:.3f} | {left} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
