"""What of this machine a run needs, tried rather than asked for: `bam-lora doctor`.

Each check is a function that gives findings; one that fails in a way nobody thought of becomes a finding too, so that
the others are still told.
"""

from __future__ import annotations

import os
import shutil
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bam_lora.doctor_finding import NOTE, OK, PROBLEM, Finding
from bam_lora.errors import first_line

Check = Callable[[], Iterable[Finding]]


def diagnose(folder: Path) -> list[Finding]:
    """Looks at everything a run leans on.

    Args:
        folder: Where runs will be written.

    Returns:
        What was found, in the order of the report.
    """
    from bam_lora import doctor_device, doctor_disk, doctor_hub, doctor_software

    checks: list[tuple[str, Check]] = [
        ("python", doctor_software.python),
        ("packages", doctor_software.packages),
        ("text", doctor_software.text_encoding),
        ("environment", doctor_software.environment_variables),
        ("torch", doctor_device.torch_build),
        ("gpu", doctor_device.gpus),
        ("4-bit", doctor_device.four_bit),
        ("attention", doctor_device.flash_attention),
        ("kernels", doctor_device.fused_kernels),
        ("memory", doctor_disk.memory),
        ("disk", lambda: doctor_disk.space(folder)),
        ("files", lambda: doctor_disk.files(folder)),
        ("token", doctor_hub.token),
        ("hub", doctor_hub.reachable),
        ("token", doctor_hub.accepted),
    ]
    return [finding for name, check in checks for finding in _run(name, check)]


def _run(name: str, check: Check) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # a doctor that dies of what it should find helps nobody
        if os.environ.get("BAM_LORA_VERBOSE"):
            traceback.print_exc()
        return [
            Finding(
                name,
                PROBLEM,
                f"the check itself failed: {type(error).__name__}: {first_line(error)}",
                "Run it again with --verbose, and report it if this is a fault of ours",
            )
        ]


def render_text(findings: Sequence[Finding]) -> str:
    """One line a finding, remedies below them, and the verdict."""
    names = max(len(finding.name) for finding in findings)
    left = 7 + 2 + names + 2
    width = max(shutil.get_terminal_size((120, 24)).columns, left + 40)
    lines = []
    for finding in findings:
        start = f"{finding.status:7}  {finding.name:{names}}  "
        lines += _wrapped(finding.text, start, " " * left, width)
        if finding.remedy:
            lines += _wrapped(finding.remedy, " " * left + "-> ", " " * (left + 3), width)
    return "\n".join([*lines, "", _verdict(findings)])


def _wrapped(text: str, first: str, others: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def render_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The same as plain data: `{"format": 1, "ok": bool, "checks": [{name, status, text, remedy}]}`."""
    checks = [
        {"name": one.name, "status": one.status.lower(), "text": one.text, "remedy": one.remedy} for one in findings
    ]
    return {"format": 1, "ok": not has_problem(findings), "checks": checks}


def has_problem(findings: Sequence[Finding]) -> bool:
    """Whether something must be put right before a run can work."""
    return any(finding.status == PROBLEM for finding in findings)


def _verdict(findings: Sequence[Finding]) -> str:
    counts = {status: sum(one.status == status for one in findings) for status in (OK, NOTE, PROBLEM)}
    if counts[PROBLEM]:
        return f"{_many(counts[PROBLEM], 'problem')} to put right, {_many(counts[NOTE], 'note')}."
    return f"No problem, {_many(counts[NOTE], 'note')}. Next: bam-lora init, or bam-lora quickstart to see it work."


def _many(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
