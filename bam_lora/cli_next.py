"""The last lines of a command: what can be done now."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path


def after_check(
    recipe: Path, overrides: Sequence[str], output: Path | None, *, fit: bool, written: Path | None, measured: bool
) -> str:
    """What to do with a recipe that can work.

    Args:
        recipe: The file that was checked.
        overrides: What `--set` said.
        output: What `--output` said.
        fit: Whether settings were chosen that the file does not have.
        written: The file that these settings were written to.
        measured: Whether steps were measured.
    """
    words = [str(written or recipe)]
    words += [] if written else [part for override in overrides for part in ("--set", override)]
    words += [] if output is None else ["--output", str(output)]
    command = shlex.join(words)
    if fit and written is None:
        again = shlex.join(["bam-lora", "check", *words, "--fit", "--write", f"fitted-{recipe.name}"])
        return f"It can work with the settings under fit. Next: {again}"
    lines = [f"Nothing stands in the way. Next: bam-lora run {command}"]
    if not measured:
        lines.append(f"For the hours it will take: bam-lora check {command} --measure")
    return "\n".join(lines)


def after_run(run: Path) -> str:
    """What there is of a run that has a model, and what can be done with it; else how it goes on."""
    name = shlex.quote(str(run))
    if not (run / "model").is_dir():
        return f"{run / 'report.html'}: the report so far. What is left: bam-lora status {name}"
    adapter = shlex.quote(f"{run.name}-lora")
    return "\n".join(
        [
            f"The report is {run / 'report.html'}, the model {run / 'model'}.",
            f"As an adapter: bam-lora export {name} --output {adapter}",
            f"On the Hub:    bam-lora export {name} --push NAME",
        ]
    )
