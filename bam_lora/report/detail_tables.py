"""The report's finer tables: every branch, and the texts that were scored."""

from __future__ import annotations

from collections.abc import Sequence

from bam_lora.report import format as fmt
from bam_lora.report.tables import Cell, Report, Table


def branches_table(reports: Sequence[Report]) -> Table:
    """One row a branch: what it was trained on, and what came of it."""
    rows = []
    for report in reports:
        for item in report["iterations"]:
            for branch in item["branches"]:
                name = f"iteration {item['iteration']}, branch {branch['branch']}"
                counts = [branch.get(key) for key in ("slice", "seed", "target_tokens", "replay_tokens", "steps")]
                losses = [branch.get(key) for key in ("loss_first", "loss_last")]
                seconds = [
                    branch.get(key) for key in ("seconds", "setup_seconds", "checkpoint_seconds", "evaluate_seconds")
                ]
                rows.append(
                    [
                        *([Cell(str(report["name"]))] if len(reports) > 1 else []),
                        Cell(name),
                        *(
                            _plain(value) if i < 2 else Cell(fmt.count(value), value, number=True)
                            for i, value in enumerate(counts)
                        ),
                        *(Cell(fmt.signless(value, 3), value, number=True) for value in losses),
                        *(Cell(fmt.duration(value), value, number=True) for value in seconds),
                    ]
                )
    columns = ["Branch", "Slice", "Seed", "Target tokens", "Replay tokens", "Steps", "Loss, first", "Loss, last"]
    columns += ["Training", "of it setting up", "of it checkpoints", "Evaluating"]
    note = "Loss: nats per token, at the first and the last logged step."
    return Table("Branches", [*(["Run"] if len(reports) > 1 else []), *columns], rows, note)


def _plain(value: int | None) -> Cell:
    return Cell(fmt.MISSING if value is None else str(value), value, number=True)


def sets_table(reports: Sequence[Report]) -> Table:
    """One row an evaluation set of each size: how much text it is."""
    sets = {
        (score["role"], score["set"], score["documents"], score["bytes"]): None
        for report in reports
        for score in report["scores"]
    }
    rows = [
        [
            Cell(str(name)),
            Cell(str(role)),
            Cell(fmt.count(documents), documents, number=True),
            Cell(fmt.size(size), size, number=True),
        ]
        for role, name, documents, size in sorted(sets, key=lambda one: one[0] != "target")
    ]
    return Table("Evaluation text", ["Set", "Role", "Documents", "Text"], rows)
