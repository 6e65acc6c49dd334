"""Writes run directories as a run leaves them, with numbers of a likely size, for the tests of the report.

`python tests/report_runs.py` rewrites the golden file after a wanted change of the format.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import yaml

from bam_lora import store

GOLDEN = Path(__file__).parent / "golden" / "report.json"
BRANCH_TOKENS = 125_000
SETS = [("docs.de", "target", 120, 480_000), ("stories.de", "target", 80, 120_000), ("docs.en", "source", 150, 600_000)]
BASE_SCORES = {"docs.de": 2.4137, "stories.de": 2.6521, "docs.en": 1.1372}
FINAL = {
    "bam": {"docs.de": 1.4216, "stories.de": 1.6033, "docs.en": 1.1694},
    "single": {"docs.de": 1.3871, "stories.de": 1.5582, "docs.en": 1.2458},
}


def record(path: Path, value: dict[str, Any]) -> None:
    """Like `store.write_record`, without its fsync: hundreds of them would take most of the tests' time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {**value, "key": "k" * 64}
    path.write_text(json.dumps({**body, "sha256": store.digest(body)}, indent=2), encoding="utf-8")


def write_run(
    folder: Path,
    *,
    strategy: str = "bam",
    iterations: int = 2,
    branches: int = 2,
    done: int | None = None,
    final: dict[str, float] | None = None,
    stderr: float = 0.008,
    base: str = "example/en-docs-8m",
    sample: str = "Der Befehl schreibt die Datei in den Ordner.",
    source: str = "texts/de_docs.train.jsonl",
    total_tokens: int = 4 * BRANCH_TOKENS,
    precision: str = "4bit",
    paired: bool = False,
    seed: int = 7,
    rank: int = 64,
    shrink: dict[float, dict[str, float]] | None = None,
    layers: int = 3,
    others: bool = False,
    learned: int = 0,
) -> Path:
    """A run of `iterations` x `branches`, `done` of them carried out (all by default), its delta shrunk by each λ.

    `layers` of two weights each; `others` adds a curve, a checkpoint and an average; `learned` is the
    number of coefficients of a weight.
    """
    done = iterations if done is None else done
    final = final or FINAL["single" if strategy == "single" else "bam"]
    tokens = total_tokens // (iterations * branches)
    _recipe(folder, strategy, iterations * branches, branches, base, source, seed=seed, rank=rank)
    _plan(folder, strategy, iterations, branches, tokens, source)
    _around(folder, sample, done)
    how = {"stderr": stderr, "precision": precision, "paired": paired}
    _evaluation(folder / "iterations/00", 0, None, BASE_SCORES, **how)
    for t in range(1, done + 1):
        share = (t / iterations) ** 0.6
        _iteration(folder / f"iterations/{t:02d}", t, place_between(final, share, share), branches, tokens, how)
        _merge(folder / f"iterations/{t:02d}", t, branches, tokens, layers, learned)
    if done == iterations:
        record(folder / "result.json", {"delta_norm": 13.25 if strategy == "bam" else 17.5, "delta_relative": 0.0312})
    if shrink is not None:
        entries = {scale: _entries(scores, 2 + scale, stderr, paired) for scale, scores in shrink.items()}
        points = [
            {"kind": "shrink", "label": f"{scale:g}", "scale": scale, "delta_norm": 17.5 * scale, "scores": scores}
            for scale, scores in entries.items()
        ]
        record(folder / "shrink.json", {"format": 1, "evaluation": "e" * 64, "points": points})
    if others:
        write_shrink(folder, final, {"stderr": stderr, "paired": paired})
    return folder


def _iteration(path: Path, t: int, scores: dict[str, float], branches: int, tokens: int, how: dict[str, Any]) -> None:
    for k in range(1, branches + 1):
        off = {name: score + 0.006 * k + 0.004 for name, score in scores.items()}
        _branch(path / f"branch-{k}", t, k, tokens)
        _evaluation(path / f"branch-{k}", t, k, off, **how)
    _evaluation(path, t, None, scores, **how)


def place_between(final: dict[str, float], learned: float, forgotten: float) -> dict[str, float]:
    """Scores that have learned and forgotten these shares of what the final ones have."""
    shares = {"target": learned, "source": forgotten}
    return {name: BASE_SCORES[name] + shares[role] * (final[name] - BASE_SCORES[name]) for name, role, _, _ in SETS}


def write_shrink(folder: Path, final: dict[str, float], how: dict[str, Any]) -> None:
    """Two models along λ, the final one again, a checkpoint and an average, on a curve that forgets late."""
    models = [("shrink", str(scale), scale, scale**0.5, scale**2) for scale in (0.4, 0.8, 1.0)]
    models += [("checkpoint", "step 20", None, 0.6, 0.7), ("ema", "0.9", None, 0.9, 0.75)]
    points = [
        {
            "kind": kind,
            "label": label,
            "scale": scale,
            "delta_norm": 13.25 * (scale or 0.5),
            "scores": _entries(place_between(final, learned, forgotten), 2.0, **how),
        }
        for kind, label, scale, learned, forgotten in models
    ]
    record(folder / "shrink.json", {"format": 1, "evaluation": "e" * 64, "points": points})


def _recipe(
    folder: Path, strategy: str, slices: int, branches: int, base: str, source: str, *, seed: int, rank: int
) -> None:
    recipe = {
        "base": base,
        "revision": None,
        "strategy": strategy,
        "mode": "text",
        "data": {
            "target": [{"path": source, "name": "deu_Latn", "tokens": 400_000}],
            "replay": [{"path": "texts/en_docs.train.jsonl", "name": None, "tokens": 100_000}],
            "replay_share": 0.2,
        },
        "bam": {"slices": slices, "branches": branches, "merge": {"method": "linear", "weights": "uniform"}},
        "lora": {"r": rank, "alpha": 2 * rank},
        "seed": seed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def _plan(folder: Path, strategy: str, iterations: int, branches: int, tokens: int, source: str) -> None:
    total = iterations * branches * tokens
    planned = []
    for t in range(1, iterations + 1):
        items = []
        for k in range(1, branches + 1):
            index = (t - 1) * branches + k - 1
            item = {"branch": k, "slice": index + 1, "rows": [61 * index, 61 * (index + 1)], "seed": 700 + index}
            shares = {"target_tokens": tokens * 4 // 5, "replay_tokens": tokens // 5, "tokens": tokens}
            items.append({**item, **shares, "sequences": 61, "steps": 40})
        planned.append({"iteration": t, "branches": items})
    sources = [
        {
            "path": source,
            "role": "target",
            "documents": 1840,
            "tokens": 612_000,
            "used_tokens": 400_000,
            "bytes": 2_410_000,
        },
        {
            "path": "texts/en_docs.train.jsonl",
            "role": "replay",
            "documents": 990,
            "tokens": 300_000,
            "used_tokens": 100_000,
            "bytes": 1_190_000,
        },
    ]
    counts = {"target_tokens": total * 4 // 5, "replay_tokens": total // 5, "train_tokens": total}
    plan = {"format": 1, "strategy": strategy, "slices": iterations * branches, "branches": branches, "threads": 2}
    data = {**counts, "sources": sources}
    record(folder / "plan.json", {**plan, "sequence_length": 2048, "data": data, "iterations": planned})


def _around(folder: Path, sample: str, done: int) -> None:
    versions = {"bam_lora": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    machine = {"device": "cpu", "threads": 2, "python": "3.11.9", "platform": "Linux x86_64"}
    record(folder / "environment.json", {"versions": versions, **machine, "command": "bam-lora run recipe.yaml"})
    session = {"started": "2026-01-05T10:00:00Z", "ended": "2026-01-05T10:09:40Z", "seconds": 580.5}
    stages = {"data": 11.75, "load": 7.5, "train": 417.0, "evaluate": 66.5, "merge": 2.0, "fold": 3.25}
    session |= {"seconds_by_stage": stages, "first_load_seconds": 4.5}
    record(
        folder / "sessions.json", {"sessions": [{**session, "peak_rss_bytes": 1_480_000_000, "peak_gpu_bytes": None}]}
    )
    record(folder / "data/facts.json", {"seconds": 11.75})
    prompt = "Der Befehl"
    samples = [{"iteration": 0, "prompt": prompt, "text": " the command die of the file is"}]
    if done:
        samples.append({"iteration": done, "prompt": prompt, "text": sample})
    record(folder / "samples.json", {"samples": samples})


def _evaluation(
    folder: Path,
    iteration: int,
    branch: int | None,
    scores: dict[str, float],
    *,
    stderr: float | None,
    precision: str,
    paired: bool,
) -> None:
    entries = _entries(scores, iteration + 2, stderr, paired)
    settings = {"format": 1, "precision": precision, "window_bytes": 8192, "overlap_bytes": 2048, "seconds": 9.5}
    record(folder / "eval.json", {**settings, "iteration": iteration, "branch": branch, "scores": entries})


def _entries(scores: dict[str, float], phase: float, stderr: float | None, paired: bool) -> list[dict[str, Any]]:
    """The scores of one model, as in eval.json."""
    entries = []
    for name, role, count, size in SETS:
        entry = {"set": name, "role": role, "bits_per_byte": scores[name], "stderr": stderr}
        entry |= {"documents": count, "bytes": size}
        if paired:
            # Documents differ by a bit either way, the same in every model, and by a thousandth from model to model.
            wobble = [(1 if i % 2 else -1) * 1.0 + 0.001 * math.sin(i * phase) for i in range(count)]
            bits = [(scores[name] + w) * size / count for w in wobble]
            entry["per_document"] = {"bits": bits, "bytes": [size // count] * count}
        entries.append(entry)
    return entries


def _branch(folder: Path, iteration: int, branch: int, tokens: int) -> None:
    lines = []
    for step in range(1, 41):
        loss = 2.0 / iteration + 1.8 * math.exp(-step / 12) + 0.05 * math.sin(step * (branch + 1))
        lines.append({"step": step, "loss": round(loss, 4), "learning_rate": 2e-4, "tokens": step * tokens // 40})
    text = "\n".join(json.dumps(line) for line in lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(text + "\n", encoding="utf-8")
    setup = 5.25 if (iteration, branch) == (1, 1) else 0.5
    facts = {
        "seconds": 104.25,
        "setup_seconds": setup,
        "checkpoint_seconds": 1.5,
        "steps": 40,
        "tokens": tokens,
        "loss_first": lines[0]["loss"],
    }
    facts |= {"loss_last": lines[-1]["loss"], "peak_gpu_bytes": None}
    record(folder / store.MANIFEST, {"format": 1, "facts": facts, "files": {}})


def _merge(folder: Path, iteration: int, branches: int, tokens: int, layers: int, learned: int) -> None:
    weights, norms = [1 / branches] * branches, [11.5 + 0.25 * k for k in range(branches)]
    cosine = 0.412 if branches > 1 else None
    names = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("mlp.up_proj", "self_attn.q_proj")]
    tensors = {
        name: {
            "norms": [norm / 4 for norm in norms],
            "cosine": None if cosine is None else cosine + 0.01 * i - 0.1 * iteration,
            "merged_norm": 2.5,
        }
        for i, name in enumerate(names)
    }
    merge = {"iteration": iteration, "method": "linear", "weights": weights, "tokens": [tokens] * branches}
    statistics = {"delta_norms": norms, "merged_norm": 9.75, "cosine": cosine, "tensors": tensors}
    if learned:
        merge["learned"] = learned_weights(names, branches, learned, iteration)
    record(folder / "merge.json", {**merge, "seconds": 0.75, **statistics})
    norm = {"weight_norm": 424.5, "delta_norm": 9.75 * iteration**0.5}
    record(folder / "fold.json", {"iteration": iteration, "seconds": 1.25, "bytes": 16_800_000, **norm})


def learned_weights(names: list[str], branches: int, groups: int, iteration: int) -> dict[str, Any]:
    """What a merge that learned its weights says of it: coefficients around 1/K, smaller in later groups."""
    coefficients = {
        name: [
            [(1 + 0.1 * (k - 0.5) + 0.02 * i - 0.05 * g - 0.01 * iteration) / branches for g in range(groups)]
            for k in range(branches)
        ]
        for i, name in enumerate(names)
    }
    selection = []
    for step in (0, 12, 24, 36):
        target, source = 2.4 + 0.00125 * step, 1.3 - 0.004 * step
        selection.append({"step": step, "target": target, "source": source, "objective": target + source})
    settings = {"source_weight": 1.0, "groups": groups, "steps": 36, "best_step": 24}
    return {**settings, "selection": selection, "coefficients": coefficients}


if __name__ == "__main__":
    from bam_lora.report import collect

    with tempfile.TemporaryDirectory() as root:
        store.write_json(GOLDEN, collect(write_run(Path(root) / "bam")))
