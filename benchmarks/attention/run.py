"""What a training step costs by `sdpa` and by `packed`, over rows of packed documents of growing length, on a CPU.

    BAM_LORA_BENCH_DATA=folder python benchmarks/attention/run.py [--bits 4,16] [--lengths 512,1024,...]

Rows of German documents (those that are longer are split), forward and backward through the small base with an
adapter of rank 32, on one thread. Time: the best processor time a row of `ROUNDS`, both kinds in turn in one
process; each round has other rows, as new lengths may want compiling. Memory: the peak of the resident set above
what there was before the first step, each kind in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for common/, as scripts are run by path
from common.provenance import provenance_of

HERE = Path(__file__).resolve().parent
KINDS = ("sdpa", "packed")
ROUNDS = 3
RANK = 32
_LEAST = 2048  # tokens a round


def main() -> None:
    options = parse()
    if options.case:
        print(json.dumps(measure(*json.loads(options.case))))
        return
    command = f"python benchmarks/attention/run.py --bits {options.bits} --lengths {options.lengths}"
    provenance = provenance_of(command, 1, allow_dirty=options.allow_dirty)
    results: dict[str, Any] = {"provenance": provenance, "cases": []}
    options.result.parent.mkdir(parents=True, exist_ok=True)
    for length in numbers(options.lengths):
        for bits in numbers(options.bits):
            case = apart(KINDS, bits, length)
            peaks = {kind: apart((kind,), bits, length)["peak_above_start_bytes"] for kind in KINDS}
            results["cases"].append({**case, "peak_above_start_bytes": peaks})
            options.result.write_text(json.dumps(results, indent=2) + "\n")
            print(json.dumps(results["cases"][-1]), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="4,16")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--allow-dirty", action="store_true", help="measure a tree with uncommitted changes")
    parser.add_argument("--result", type=Path, default=HERE / "results" / f"{datetime.date.today().isoformat()}.json")
    return parser.parse_args()


def numbers(listed: str) -> list[int]:
    return [int(one) for one in listed.split(",")]


def apart(kinds: Sequence[str], bits: int, length: int) -> dict[str, Any]:
    case = json.dumps([kinds, bits, length])
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--case", case]
    found = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(found.stderr)
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


def measure(kinds: Sequence[str], bits: int, length: int) -> dict[str, Any]:
    """Seconds of the processor for a step over one row, by kind, and bytes above what there was before."""
    import torch
    from peft import LoraConfig, get_peft_model
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from bam_lora.attention import PACKED
    from bam_lora.base import Loading, load_model

    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = Path(os.environ["BAM_LORA_BENCH_DATA"])
    model = load_model(data / "models" / "en-docs-8m", Loading(bits, attention=PACKED))
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.02)
    model.train()
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    rounds = [[collate([row]) for row in some] for some in rows(data, length)]

    def step(batch: Any) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad()

    before = resident()
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for batches in rounds:
        for kind in kinds:
            model.set_attn_implementation(kind)
            begin = time.process_time()
            for batch in batches:
                step(batch)
            seconds[kind].append((time.process_time() - begin) / len(batches))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    every = [batch for batches in rounds for batch in batches]
    documents = sum(int((batch["position_ids"] == 0).sum()) for batch in every) / len(every)
    return {
        "bits": bits, "tokens": length, "documents": documents,
        "step_cpu_seconds": {kind: round(min(found[1:]), 4) for kind, found in seconds.items()},
        "peak_above_start_bytes": peak,
    }  # fmt: skip


def rows(data: Path, length: int) -> list[list[dict[str, list[int]]]]:
    """For every round, and one to warm up, packed rows of at least `_LEAST` tokens: one document after another."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(data / "models" / "en-docs-8m"))
    each = max(1, _LEAST // length)
    made: list[dict[str, list[int]]] = []
    ids: list[int] = []
    lengths: list[int] = []
    with (data / "data" / "de_docs.train.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            document = [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
            while document:
                part = document[: length - len(ids)]
                document = document[len(part) :]
                ids += part
                lengths.append(len(part))
                if len(ids) == length:
                    made.append({"input_ids": ids, "seq_lengths": lengths})
                    ids, lengths = [], []
            if len(made) >= each * (ROUNDS + 1):
                return [made[begin : begin + each] for begin in range(0, each * (ROUNDS + 1), each)]
    raise SystemExit("The text is too short")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    main()
