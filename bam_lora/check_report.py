"""All that `bam-lora check` finds, put together: recipe, data, what it takes, what would fit, what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bam_lora.attention import BY_DOCUMENT
from bam_lora.cards import parse_card
from bam_lora.check import check_recipe
from bam_lora.check_base import PlannedBase, planned_base
from bam_lora.check_limits import limit_lines
from bam_lora.check_machine import Machine, find_machine
from bam_lora.check_plan import Resources, plan_resources, planned_attention, planned_kernels
from bam_lora.check_tokens import replay_findings
from bam_lora.compute_types import emulation_note
from bam_lora.errors import UserError
from bam_lora.fit import Fit, fit_recipe
from bam_lora.fit_text import fit_lines
from bam_lora.measure_steps import Measured, measure_run
from bam_lora.memory_host import model_room
from bam_lora.quiet import quiet_libraries
from bam_lora.recipe import Recipe


@dataclass(frozen=True)
class Checked:
    """What was found. `problems` are what keeps the run from working as it is."""

    recipe: Recipe
    text: str
    resources: Resources
    fit: Fit | None
    measured: Measured | None
    problems: tuple[UserError, ...]

    def lines(self) -> list[str]:
        """For the terminal."""
        lines = [*self.text.splitlines(), *self.resources.lines()]
        if self.measured is not None:
            lines += self.measured.lines(self.resources)
        lines += self._limit_lines()
        return lines + (fit_lines(self.recipe, self.fit) if self.fit is not None else [])

    def _limit_lines(self) -> list[str]:
        training, length = self.recipe.training, self.recipe.data.sequence_length
        per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * length
        tokens = training.max_steps * per_step if training.max_steps > 0 else None
        if tokens is None and self.resources.tokens is not None:
            tokens = round(self.resources.tokens * training.num_train_epochs)
        hours = {} if self.measured is None else self.measured.hours
        return limit_lines(self.recipe, tokens, 3600 * sum(hours.values()) if "train" in hours else None)

    def to_json(self) -> dict[str, Any]:
        """In plain JSON types."""
        found = [*self.text.splitlines(), *self._limit_lines()]
        labelled = [{"label": line[:12].strip(), "text": line[12:]} for line in found]
        return {
            "format": 1,
            "recipe": self.recipe.resolved(),
            "findings": labelled,
            **self.resources.to_json(),
            "problems": [str(error) for error in self.problems],
            "fit": None if self.fit is None else self.fit.to_json(),
            "measured": None if self.measured is None else self.measured.to_json(),
        }


def check_everything(
    recipe: Recipe, *, gpu_memory: str | None, fit: bool, measure: bool, colour: bool = False
) -> Checked:
    """Looks at everything that a recipe names and needs.

    Args:
        recipe: A valid recipe.
        gpu_memory: Plan for a GPU with so much, such as "12GB", or for an old one, "T4"; None: for this machine.
        fit: Choose settings that fit.
        measure: Take a few real steps.
        colour: Mark the trained tokens by colour, for a terminal, not by brackets.

    Raises:
        UserError: If the run could not work, or nothing fits.
    """
    machine = find_machine(None if gpu_memory is None else parse_card(gpu_memory))
    if measure and machine.assumed:
        raise UserError.of(
            "--measure", expected="this machine", found="--gpu-memory", remedy="Leave one of the two out"
        )
    quiet_libraries()
    base = planned_base(recipe)
    chosen = _fitted(recipe, base, machine) if fit else None
    recipe = chosen.applied(recipe) if chosen is not None else recipe
    apart = base.shape.hybrid or planned_attention(recipe, base, machine) in BY_DOCUMENT
    text = check_recipe(recipe, base.metadata, base.tokenizer, colour=colour, by_document=apart)
    resources = plan_resources(recipe, base, machine)
    short, notes = replay_findings(recipe, base.tokenizer, resources.tokens)
    emulated = _emulation(recipe, base, machine)
    notes = [*notes, *_hybrid_notes(base)]
    text = "\n".join([*emulated, text, *(f"{'note':12}{note}" for note in notes)])
    problems = (*short, *resources.problems())
    measured = None
    if measure and not problems:
        measured = measure_run(recipe, steps=resources.steps, tokens=resources.tokens)
    return Checked(recipe, text, resources, chosen, measured, problems)


def _emulation(recipe: Recipe, base: PlannedBase, machine: Machine) -> list[str]:
    """A line, before all others, where the card has not the format that is asked for."""
    if machine.bfloat16:
        return []
    kind = str(base.metadata.checkpoint.config.get("model_type", recipe.base))
    found = emulation_note(recipe.quantization.compute_dtype, kind, machine.name)
    return [f"{'note':12}{found}"] if found else []


def _hybrid_notes(base: PlannedBase) -> list[str]:
    if not base.shape.hybrid:
        return []
    return [
        f"some layers of a {base.shape.kind} model carry a state from token to token: documents of a packed row go "
        "through it apart, those of like length together, which is slower; its memory is estimated as if all attended"
    ]


def _fitted(recipe: Recipe, base: PlannedBase, machine: Machine) -> Fit:
    """What fits; where the device has no memory of its own, beside what the process takes anyway."""
    attention, kernels = planned_attention(recipe, base, machine), planned_kernels(recipe, base, machine)
    how: dict[str, Any] = {"attention": attention, "kernels": kernels}
    if not machine.unified:
        return fit_recipe(recipe, base.shape, machine.memory_bytes, device=machine.device, **how)
    room = model_room(machine.ram_bytes)
    return fit_recipe(recipe, base.shape, room, device="cpu", **how)
