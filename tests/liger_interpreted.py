"""Trains with Liger's real kernels on a CPU, in Triton's interpreter: `python liger_interpreted.py kinds|branch ...`.

Prints one line of JSON. A process of its own, as the interpreter is chosen before Triton is imported. It cannot do all
that a GPU can: numbers of a kernel's arguments are given to it as tensors here, functions of CUDA's library are written
out, and in bfloat16 it multiplies bit patterns, so that only fp32 and fp16 can be compared.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
CUTS = (5, 9, 1, 7)


def interpreted() -> None:
    """Has Triton's interpreter take what these kernels need beyond it."""
    import liger_kernel.ops.geglu
    import liger_kernel.ops.rms_norm
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    own: Callable[[Any], Any] = interpreter._implicit_cvt

    def convert(argument: Any) -> Any:
        if type(argument) is not float:
            return own(argument)
        return tl.tensor(interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = convert
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    liger_kernel.ops.geglu.tanh = lambda x: 2 / (1 + tl.exp(-2 * x)) - 1


def compare(kinds: list[str]) -> dict[str, Any]:
    """The largest relative errors of a step's gradients, and of its loss, against transformers' own arithmetic."""
    import torch
    from test_packed_attention import adapted, model_of, places, step, tokens

    from bam_lora import packed_attention
    from bam_lora.kernels import LIGER, fused

    packed_attention.register()
    found: dict[str, Any] = {}
    for kind in kinds:
        for dtype in (torch.float32, torch.float16):
            model = adapted(model_of(kind))
            with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
                expected = step(model, "packed", tokens(1, sum(CUTS)), places(CUTS))
                with fused(model, LIGER):
                    loss, _, gradients = step(model, "packed", tokens(1, sum(CUTS)), places(CUTS))
                again = step(adapted(model_of(kind)), "packed", tokens(1, sum(CUTS)), places(CUTS))
            errors = [float((gradients[name] - one).norm() / one.norm()) for name, one in expected[2].items()]
            found[f"{kind} {str(dtype).removeprefix('torch.')}"] = {
                "loss": abs(loss / expected[0] - 1),
                "gradients": max(errors),
                "later_models_as_before": again[0] == expected[0],
            }
    return found


def branches(base: Path, folder: Path) -> dict[str, Any]:
    """Adapters' hashes and losses of branches of four steps, by what is asked of them."""
    import torch
    from datasets import Dataset

    from bam_lora.base import Loading, load_model, load_tokenizer
    from bam_lora.branch import BranchJob, train_branch
    from bam_lora.errors import Interrupted
    from bam_lora.interrupt import StopRequest
    from bam_lora.kernels import LIGER
    from bam_lora.sft_arguments import checkpointing_name
    from bam_lora.sft_branch import SftBranch
    from bam_lora.store import hash_file

    how = Loading(4, compute_dtype="float32", attention="packed")
    ids = torch.randint(3, 380, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "seq_lengths": [[5, 11], [16], [3, 3, 10], [8, 8]]})
    model, tokenizer = load_model(base, how), load_tokenizer(base)

    def train(
        name: str, kernels: str | None, *, checkpointing: bool = False, stop_at: int | None = None, **lora: Any
    ) -> Any:
        stop = StopRequest()

        def on_step(step: int, loss: float | None) -> None:
            if step == stop_at:
                stop.signal_name = "SIGTERM"

        arguments = {
            "per_device_train_batch_size": 1, "learning_rate": 1e-2, "save_steps": 1, "logging_steps": 1,
            checkpointing_name(): checkpointing,
        }  # fmt: skip
        adapter = {"r": 4, "target_modules": "all-linear", **lora}
        make = SftBranch(how, tokenizer, rows, adapter, arguments, 4, 0, 16)
        job = BranchJob("branch", key="key", steps=4, tokens=64, base_name="tiny", kernels=kernels)
        train_branch(model, job, folder / name, make, on_step=on_step, stop=stop)
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        return {
            "losses": [json.loads(line)["loss"] for line in lines],
            "adapter": hash_file(folder / name / "adapter" / "adapter_model.safetensors"),
        }

    found = {
        "plain": train("plain", None),
        "liger": train("liger", LIGER),
        "checkpointing": train("checkpointing", LIGER, checkpointing=True),
        "dora": train("dora", LIGER, use_dora=True, lora_dropout=0.1),
        "plain again": train("plain again", None),
        "plain dora": train("plain dora", None, use_dora=True, lora_dropout=0.1),
    }
    try:
        train("cut", LIGER, stop_at=2)
    except Interrupted:
        found["cut"] = train("cut", LIGER)
    return found


def main() -> None:
    from bam_lora.quiet import quiet

    quiet()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    interpreted()
    asked, *rest = sys.argv[1:]
    print(json.dumps(compare(rest) if asked == "kinds" else branches(*map(Path, rest))))


if __name__ == "__main__":
    main()
