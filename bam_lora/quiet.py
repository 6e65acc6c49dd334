"""Keeps the libraries' own bars, notices and telemetry out of the user's way. Imported before any of them."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Each of these speaks of how a library is used by us, not of anything the user could change.
_IGNORED = [
    ("FutureWarning", r"transformers|trl|peft|accelerate|torch|bitsandbytes|huggingface_hub"),
    ("DeprecationWarning", r"transformers|trl|peft|accelerate|torch|bitsandbytes|datasets"),
]
# `pin_memory` without an accelerator; the Trainer asks for it by default.
# PEFT's advice on tied embeddings: folding takes care of both cases. Its check of shapes takes a bias for a damaged
# factor; adapters are checked again when they are merged. How bitsandbytes before 0.50 says what its 8-bit layers do.
_IGNORED_TEXTS = [
    r".*'pin_memory' argument is set as true but no accelerator.*",
    r".*`ensure_weight_tying`.*",
    r"MatMul8bitLt: inputs will be cast from",
    r"Adapter '[^']*': \d+ LoRA tensor\(s\) have invalid shape: \S+\.lora_B\.bias:",
]
# What `datasets` logs before it raises the same: our line says it.
_READERS = ("arrow", "csv", "json", "parquet")
_RAISED = ("Failed to load JSON from file", "Failed to read file", "Failed to read schema from")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_RAISED)


def quiet(*, verbose: bool = False) -> None:
    """Turns off telemetry, progress bars and advisory logging of the libraries underneath; lets idle threads sleep.

    Args:
        verbose: Leave warnings and logging as the libraries have them.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # OpenMP threads that spin while they wait bring a CPU run almost to a halt as soon as it shares the cores with
    # anything else (docs/log.md). Read when torch is first imported; without effect on a GPU.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if verbose:
        return
    for name in ("bitsandbytes", "accelerate", "peft", "trl", "datasets", "liger_kernel", "torch.utils.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in _READERS:
        logging.getLogger(f"datasets.packaged_modules.{name}.{name}").addFilter(_is_news)
    categories = {"FutureWarning": FutureWarning, "DeprecationWarning": DeprecationWarning}
    for category, modules in _IGNORED:
        warnings.filterwarnings("ignore", category=categories[category], module=modules)
    for text in _IGNORED_TEXTS:
        warnings.filterwarnings("ignore", message=text)


@contextmanager
def restored_libraries() -> Iterator[None]:
    """Puts back, at the end, what `quiet_libraries` changes: a script has settings of its own."""
    import datasets
    import transformers

    log = transformers.utils.logging
    bars = datasets.utils.are_progress_bars_disabled(), log.is_progress_bar_enabled()
    verbosity = log.get_verbosity()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if not bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            log.enable_progress_bar()


def quiet_libraries() -> None:
    """The part that needs the libraries imported: their progress bars and log levels."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
