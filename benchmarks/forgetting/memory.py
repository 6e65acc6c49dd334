"""Peak memory of learning the merge weights beside that of training a branch: whole processes, one after the other.

    BAM_LORA_BENCH_DATA=folder python benchmarks/forgetting/memory.py [--hidden 1024] [--layers 8]

A random Llama of the given size (memory does not depend on its values) gets eight short branches in four iterations.
Then one process trains a single branch (`bam-lora run`) and one learns the weights of all eight at the last merge
(`bam-lora shrink --source-weight 1`), the most that any merge takes on. Both score the same few documents. On a GPU the
peak of torch's allocations counts, else the peak of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Runs one command of bam_lora and says on the last line what it took.
CHILD = """
import json, resource, sys, torch
from bam_lora.cli import app
app(sys.argv[1:], standalone_mode=False)
gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
print(json.dumps({"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "peak_gpu_bytes": gpu}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens of a training sequence")
    options = parser.parse_args()
    if not os.environ.get("BAM_LORA_BENCH_DATA"):
        sys.exit("error: set BAM_LORA_BENCH_DATA to a folder with data/ and models/ (benchmarks/README.md)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = random_base(folder / "base", options.hidden, options.layers, options.sequence_length)
        common = {
            "base": str(folder / "base"),
            "data.sequence_length": options.sequence_length,
            "data.target.0.tokens": 16 * options.sequence_length,
            "training.gradient_accumulation_steps": 1,
            "training.checkpointing": True,
            "evaluation.target.0.documents": 1,
            "evaluation.source.0.documents": 1,
        }
        recipe = str(HERE / "recipe.yaml")
        bam = ["run", recipe, "--output", str(folder / "bam"), *given({**common, "bam.slices": 8})]
        single = ["run", recipe, "--output", str(folder / "single"), *given({**common, "strategy": "single"})]
        child(bam)
        result = {
            "parameters": parameters,
            "train": child(single),
            "learn": child(["shrink", str(folder / "bam"), "--source-weight", "1"]),
        }
    kind = "peak_gpu_bytes" if result["train"]["peak_gpu_bytes"] else "peak_rss_bytes"
    result["ratio"] = result["learn"][kind] / result["train"][kind]
    print(json.dumps(result, indent=1))


def random_base(folder: Path, hidden: int, layers: int, positions: int) -> int:
    """Writes a random Llama with the tokenizer of the benchmark's base; returns its number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(Path(os.environ["BAM_LORA_BENCH_DATA"]) / "models" / "en-docs-8m")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=positions,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def given(settings: dict[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def child(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    taken: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return taken


if __name__ == "__main__":
    main()
