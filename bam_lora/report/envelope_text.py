"""The comparison at equal target scores in words: one row and one plain sentence for every recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bam_lora.report.format import MISSING, percent, signed, signless
from bam_lora.report.tables import Cell, Table

Entry = Mapping[str, Any]

_ALONE = (
    "Not compared: nothing here says whether another way of training would have forgotten less at the same target "
    "score. To find out: `bam-lora compare RUN OTHER` after `bam-lora shrink OTHER`, where OTHER is a run of another "
    "recipe with the same data and seed; or `bam-lora run RECIPE --baseline 0.05` (a probe on a twentieth of the "
    "tokens)."
)


def alone(reports: Sequence[Mapping[str, Any]]) -> str:
    """What stands in the report of a run on its own: that nothing was compared, or what a probe said."""
    probe = reports[0].get("baseline") if len(reports) == 1 else None
    if probe is None:
        return _ALONE
    said = _sentence(probe["envelope"], dict.fromkeys(probe["envelope"]["envelope_runs"], "a single run"))
    return (
        f"Not compared at full size. A probe on {percent(probe['share'])} of the tokens ({probe['tokens']:,}), in "
        f"baseline/: {said}{' ' + probe['note'] if probe['note'] else ''}"
    )


def envelope_table(comparison: Mapping[str, Any]) -> Table:
    """One row a recipe: its source score against the envelope's at the same target score."""
    rows = []
    for entry in comparison["envelope"]:
        scores = [Cell(signless(entry[key]), entry[key], number=True) for key in ("target", "source")]
        scores.append(Cell(signless(entry["envelope_source"]), entry["envelope_source"], number=True))
        difference = Cell(signed(entry["difference"]), entry["difference"], number=True)
        interval = Cell(_bounds(entry["interval"]) if entry["interval"] else MISSING, number=True)
        rows.append([Cell(entry["group"]), *scores, difference, interval, Cell(entry["verdict"], number=True)])
    columns = ["", "Target", "Source", "Envelope", "Difference", "95 % interval", "Verdict"]
    note = (
        "Envelope: the lowest source score that the other recipes' measured curves have at this target score. "
        "Difference = source − envelope, in bits per byte. Beyond: forgets less than the envelope; inside: more; "
        "on: cannot be told from it."
    )
    return Table("Forgetting at the same target score", columns, rows, note)


def _bounds(interval: list[float]) -> str:
    return f"{signed(interval[0])} to {signed(interval[1])}"


def envelope_sentences(comparison: Mapping[str, Any]) -> list[str]:
    """One sentence a recipe, with what limits it; plain text, not escaped: names of runs come from the file system."""
    group_of = {run: entry["group"] for entry in comparison["envelope"] for run in entry["runs"]}
    return [_sentence(entry, group_of) for entry in comparison["envelope"]]


def _sentence(entry: Entry, group_of: Mapping[str, str]) -> str:
    name = entry["group"]
    if entry["verdict"] == "not compared":
        return f"{name}: not compared: {entry['reason']}."
    rivals = " or ".join(dict.fromkeys(group_of[run] for run in entry["envelope_runs"]))
    place = f"at a target score of {signless(entry['target'])}"
    if entry["verdict"] == "on":
        text = f"{name} is on the envelope: {place} its forgetting cannot be told from that of {rivals}"
    else:
        amount, share = signless(abs(entry["difference"])), entry["less_forgetting"]
        relative = "" if share is None else f" ({percent(abs(share))})"
        less = "less" if entry["verdict"] == "beyond" else "more"
        text = f"{name} is {entry['verdict']} the envelope: {place} it forgets {amount} bits per byte{relative} {less}"
        text += f" than {rivals}"
    notes = f" But: {entry['reason']}." if entry["reason"] else ""
    return f"{text} (95 % interval of the difference {_bounds(entry['interval'])}, {_basis(entry)}).{notes}".replace(
        " %", "\N{NO-BREAK SPACE}%"
    )


def _basis(entry: Entry) -> str:
    if entry["interval_over"] == "seeds":
        return f"over {entry['n']} seeds"
    return f"over {entry['n']:,} documents of one seed: another seed may say otherwise"
