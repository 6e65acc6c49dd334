"""The floor under a fold's time: its products alone, all factors in memory, no file touched.

    python arithmetic.py BASE ADAPTER ADAPTER WEIGHT WEIGHT

Prints {"product_seconds", "with_conversion_seconds", "threads"}: one fp32 addmm for each row block of each changed
weight, blocks and threads as `bam-lora fold` has them; the second with bf16 to fp32 before and back after it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from bam_lora.fold_blocks import exact_products, row_ranges
from bam_lora.merge import open_adapters


def main() -> None:
    _, first, second, *weights = sys.argv[1:]
    merged = open_adapters([first, second], [float(weight) for weight in weights], "linear", any_base=True)
    factors = [merged.stacked(name) for name in merged.names()]
    blocks = [
        (B_oR[start : start + count], A_Ri)
        for B_oR, A_Ri in (pair for pair in factors if pair is not None)
        for start, count in row_ranges(B_oR.shape[0], A_Ri.shape[1])
    ]
    with exact_products() as threads, ThreadPoolExecutor(threads) as pool:
        seconds = {
            key: timed(pool, blocks, convert)
            for key, convert in (("product_seconds", False), ("with_conversion_seconds", True))
        }
    print(json.dumps({**seconds, "threads": threads}))


def timed(
    pool: ThreadPoolExecutor, blocks: list[tuple[torch.Tensor, torch.Tensor]], convert: bool, repeats: int = 2
) -> float:
    """Seconds for all blocks, the better of two: the first finds cold buffers."""
    buffers = threading.local()

    def compute(block: tuple[torch.Tensor, torch.Tensor]) -> None:
        B_oR, A_Ri = block
        shape = (B_oR.shape[0], A_Ri.shape[1])
        if getattr(buffers, "shape", None) != shape:
            buffers.shape = shape
            buffers.stored = torch.zeros(shape, dtype=torch.bfloat16)
            buffers.original, buffers.result = torch.zeros(shape), torch.zeros(shape)
        if convert:
            buffers.original.copy_(buffers.stored)
        torch.addmm(buffers.original, B_oR, A_Ri, out=buffers.result)
        if convert:
            buffers.stored.copy_(buffers.result)

    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in pool.map(compute, blocks):
            pass
        taken.append(time.perf_counter() - started)
    return min(taken)


if __name__ == "__main__":
    main()
