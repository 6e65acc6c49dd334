"""Trains one adapter in one way, measured: what our branch training is timed beside, with one contract for all.

    python benchmarks/gpu/peers/job.py SETTINGS.json

Run it with the Python that `environments.python_for(way, ...)` names. SETTINGS.json is what `peer_settings.Settings`
says; the last line of standard output is JSON: {"way", "losses", "step_seconds", "tokens", "peak_driver_bytes",
"peak_torch_bytes", "effective", "versions"}, and besides "step_cpu_seconds", "checksums" (of each step's rows) and
"memory_source". Per step, in order; the first steps are slower (kernels are chosen and compiled): leave them out.

The ways, each over the same documents with the same adapter, precision, batch, learning rate and seed:
- trl-defaults: `SFTTrainer` with QLoRA as TRL's documentation has it, all else left alone: rows padded, cut off at the
  length, checkpointing on whatever the settings say.
- trl-best: the settings that a knowing user gives TRL (peer_trl.py). Packed.
- trl-best-fp32: the same with fp32 adapters, as our branches have them; TRL makes those of a quantised base bf16.
- ours: a branch of bam_lora, as a run trains it, over the very rows of trl-best.
- unsloth, axolotl: each with what its documentation says is fastest, in an environment of its own.
What a library could not be given stands in "effective", with what it used instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from peer_settings import BadSettings, Settings

HERE = Path(__file__).resolve().parent
MODULES = {"ours": "peer_ours", "unsloth": "peer_unsloth", "axolotl": "peer_axolotl"}
# No look-ups, no telemetry: nobody's time should hang on the network.
QUIET = {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def run(settings: Settings) -> dict[str, Any]:
    """Does a job in this process, and returns the result."""
    from peer_recording import Recorder, versions

    measuring = _measuring()
    way = importlib.import_module(MODULES.get(settings.way, "peer_trl"))
    recorder = Recorder(lambda: measuring.settle(settings.device))
    with tempfile.TemporaryDirectory() as folder, measuring.DevicePeak(settings.device) as peak:
        effective = way.train(settings, recorder, Path(folder))
    return {
        "way": settings.way,
        "losses": recorder.losses,
        "step_seconds": recorder.step_seconds,
        "step_cpu_seconds": recorder.step_cpu_seconds,
        "tokens": recorder.tokens,
        "checksums": recorder.checksums,
        "peak_driver_bytes": peak.driver_bytes,
        "peak_torch_bytes": peak.torch_bytes,
        "memory_source": peak.source,
        "effective": effective,
        "versions": versions(),
    }


def _measuring() -> Any:
    """benchmarks/gpu/measuring.py, by its path: other benchmarks have a module of that name."""
    name = "benchmarks_gpu_measuring"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE.parent / "measuring.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} SETTINGS.json")
    try:
        settings = Settings.read(Path(sys.argv[1]))
    except BadSettings as error:
        sys.exit(f"error: {error}")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    print(json.dumps(run(settings)))


if __name__ == "__main__":
    main()
