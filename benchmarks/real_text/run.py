"""German on a small real base: what the loop costs beside a plain SFTTrainer script, what it learns and forgets.

    BAM_LORA_BENCH_DATA=folder python benchmarks/real_text/run.py [--output runs/benchmark] [--pairs N]

Runs, one after the other, each in a process of its own: the plain script (plain_sft.py), Branch-and-Merge, and
Branch-and-Merge with replay. Writes `results/<date>.json` with provenance. Finished parts are kept, so an interrupted
benchmark goes on; a time is only taken from a part that ran in one piece, and only the first two are timed.

`--pairs N` times the first two N times instead, one first and then the other, into `results/<date>-pairs.json`: on a
machine that drifts one pair says little.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for common/, as scripts are run by path
from common.provenance import ROOT, provenance_of

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmark")
    parser.add_argument(
        "--allow-dirty", action="store_true", help="measure a tree with uncommitted changes (for trying)"
    )
    parser.add_argument("--pairs", type=int, default=0, metavar="N", help="only time plain and ours, N times in turn")
    options = parser.parse_args()
    if not os.environ.get("BAM_LORA_BENCH_DATA"):
        sys.exit("error: set BAM_LORA_BENCH_DATA to a folder with data/ and models/ (benchmarks/README.md)")
    provenance = provenance_of("make bench", len(os.sched_getaffinity(0)), allow_dirty=options.allow_dirty)
    if options.pairs:
        write({"provenance": provenance, "pairs": pairs(options.pairs, options.output)}, "-pairs")
        return
    parts = {
        "plain": lambda folder: plain(folder),
        "bam": lambda folder: bam(HERE / "recipe.yaml", folder),
        "replay": lambda folder: bam(HERE / "replay.yaml", folder, timed=False),
    }
    results: dict[str, Any] = {}
    for name, part in parts.items():
        done = options.output / f"{name}.json"
        if not done.exists():
            print(f"== {name}", flush=True)
            result = part(options.output / name)
            done.write_text(json.dumps(result, indent=2) + "\n")
        results[name] = json.loads(done.read_text())
    check_model(options.output / "bam" / "model")
    ours = results["bam"]["seconds_without_evaluation"]
    results["ratio"] = ours / results["plain"]["seconds"] if ours else None  # None: the run was interrupted
    print(f"bam / plain, evaluation aside: {results['ratio'] or 'not timed'}")
    write({"provenance": provenance, **results})


def write(results: dict[str, Any], suffix: str = "") -> None:
    target = HERE / "results" / f"{datetime.date.today().isoformat()}{suffix}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    print(target)


def pairs(count: int, output: Path) -> list[dict[str, float]]:
    """Both in turn, the one that goes first changing; evaluation is not counted in ours."""
    timed = []
    for number in range(count):
        seconds: dict[str, float] = {}
        for name in ("bam", "plain") if number % 2 == 0 else ("plain", "bam"):
            folder = output / f"pair-{number + 1}-{name}"
            if folder.exists():
                sys.exit(f"error: {folder} is there; a time is taken from an empty folder only")
            part = plain(folder) if name == "plain" else bam(HERE / "recipe.yaml", folder)
            seconds[name] = part["seconds" if name == "plain" else "seconds_without_evaluation"]
        timed.append({**seconds, "ratio": seconds["bam"] / seconds["plain"]})
        print(
            f"pair {number + 1}: plain {seconds['plain']:.0f} s, bam {seconds['bam']:.0f} s, {timed[-1]['ratio']:.3f}"
        )
    return timed


def plain(folder: Path) -> dict[str, Any]:
    out = subprocess.run(
        [sys.executable, str(HERE / "plain_sft.py"), str(HERE / "recipe.yaml"), str(folder)],
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    tokens, seconds = out.splitlines()[-1].split()
    return {"train_tokens": int(tokens), "seconds": float(seconds)}


def bam(recipe: Path, folder: Path, *, timed: bool = True) -> dict[str, Any]:
    started = time.time()
    command = [sys.executable, "-m", "bam_lora", "run", str(recipe), "--output", str(folder)]
    subprocess.run(command, check=True)
    wall = time.time() - started
    report = json.loads((folder / "report.json").read_text())
    stages = report["cost"]["seconds_by_stage"]
    aside = stages["evaluate"]
    one_piece = timed and len(json.loads((folder / "sessions.json").read_text())["sessions"]) == 1
    return {
        "train_tokens": report["cost"]["train_tokens"],
        "seconds": wall if one_piece else None,
        "seconds_without_evaluation": wall - aside if one_piece else None,
        "seconds_by_stage": stages if one_piece else None,
        "peak_rss_bytes": report["cost"]["peak_rss_bytes"],
        "summary": report["summary"],
        "scores": report["scores"],
        "cosine": [one["cosine"] for one in report["iterations"]],
        "samples": report["samples"],
    }


def check_model(folder: Path) -> None:
    """The result is a model like any other: plain transformers loads it and it writes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer("Die Datenbank", return_tensors="pt")
    out = model.generate(inputs["input_ids"], max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(out[0]))


if __name__ == "__main__":
    main()
