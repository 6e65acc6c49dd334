"""A new recipe from a few answers: `bam-lora init`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bam_lora import init_answers as answers
from bam_lora import init_fit
from bam_lora.errors import UserError
from bam_lora.init_fragments import Base, default_base, language_data, language_folders, list_bases, recipes_folder
from bam_lora.init_questions import ask_again, on_terminal, show, show_list
from bam_lora.init_recipe import Choices, Draft, apply_fit, draft_recipe, recipe_name, shorten, suit_compute_type
from bam_lora.init_text import amounts, notes, render_recipe
from bam_lora.store import write_text


@dataclass(frozen=True)
class Flags:
    """What the command line said; None: not said.

    Attributes:
        language: Name or code.
        base: Name of a fragment, Hub id, folder or run.
        goal: Name of a fragment.
        gpu_memory: Of the card, such as `12GB`; or the name of an old one, such as `T4`.
        hours: The time there is.
    """

    language: str | None = None
    base: str | None = None
    goal: str | None = None
    gpu_memory: str | None = None
    hours: float | None = None


def new_recipe(flags: Flags, file: Path | None = None, *, force: bool = False, asking: bool = True) -> str:
    """Writes a recipe, asking for what the flags do not say where there is a terminal.

    Args:
        flags: What is known already.
        file: Where it goes; None: LANGUAGE.yaml in the current folder.
        force: Replace a file that is there.
        asking: Ask where there is a terminal; False takes the defaults.

    Returns:
        Lines for the screen: what was written, what to know of it, what to do next.

    Raises:
        UserError: If a flag is wrong or missing, the file is there, or no base fits the card.
    """
    if file is not None:
        answers.require_printable("FILE", str(file))
        _require_free(file, force)
    asking = asking and on_terminal()
    folder = recipes_folder()
    if not asking:
        _require_flags(flags)
    language = answers.language(flags.language, folder, asking)
    goal = answers.goal(flags.goal, folder, language, asking)
    name = recipe_name(language, goal, language_folders(folder).get(language.config))
    place = file or Path(f"{name}.yaml")
    _require_free(place, force)
    card = answers.card(flags.gpu_memory, asking)
    hours = answers.hours(flags.hours, asking)
    data = language_data(folder, language, chat=goal.chat)
    bases = list_bases(folder)
    first = answers.named_base(flags.base, bases, place) if flags.base else None
    choices = Choices(language, goal, first or bases[0], data, card, hours, place, name)
    if first is not None:
        draft = _fitted(choices)
    else:
        draft = _suitable(choices, _preferred(bases, default_base(folder, language), choices.gpu_bytes))
        if asking:
            draft = _ask_base(draft, bases)
    text = render_recipe(draft, folder / "_shared" / "datasets", _command(draft.choices))
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, text)
    return _next_steps(draft, text)


def _require_free(place: Path, force: bool) -> None:
    if place.exists() and not (force and place.is_file()):
        found = "a file" if place.is_file() else "a folder"
        remedy = "Name another file, or add --force to replace it" if place.is_file() else "Name a file"
        raise UserError.of(str(place), expected="nothing there yet", found=found, remedy=remedy)


def _require_flags(flags: Flags) -> None:
    """Without a terminal the language must be given, and the memory of the card where there is none to look at."""
    missing = ["--language NAME"] if flags.language is None else []
    if flags.gpu_memory is None and init_fit.detected_card() is None:
        missing.append("--gpu-memory SIZE (0: train on the CPU)")
    if missing:
        raise UserError.of(
            "init", expected=" and ".join(missing), found="no terminal to ask on", remedy="Give these flags"
        )


def _preferred(bases: Sequence[Base], own: str | None, gpu_bytes: int | None) -> list[Base]:
    """Bases to try, the largest first: for such a card, free to download, and of these those of many languages.

    Those of the same family as the language's own recipe takes come before all others.

    Args:
        bases: All there are.
        own: The one that the language's own recipe takes.
        gpu_bytes: Memory of the card.
    """
    family = own.partition("-")[0] if own else None  # chosen for the language by its tokenizer (docs/languages.md)
    kept = list(bases)
    for good in (
        lambda base: not base.gated,
        lambda base: base.card_bytes <= (gpu_bytes or 0) * 1.03,  # a card shows a little less than it is sold with
        lambda base: base.many_languages or base.family == family,
    ):
        kept = [base for base in kept if good(base)] or kept
    return sorted(kept, key=lambda base: (base.family != family, -base.parameters))


def _suitable(choices: Choices, bases: Sequence[Base]) -> Draft:
    """The recipe with the first of these bases that fits; on a CPU with the smallest."""
    if choices.gpu_bytes is None:
        return _fitted(replace(choices, base=min(bases, key=lambda base: base.parameters)))
    for number, base in enumerate(bases, 1):
        try:
            return _fitted(replace(choices, base=base))
        except UserError:
            if number == len(bases):
                raise
    raise AssertionError("there is no base at all")


def _fitted(choices: Choices) -> Draft:
    """A recipe with settings that fit the card, and a base's context and size, as far as they can be known."""
    draft, base, card = draft_recipe(choices), choices.base, choices.card
    if card is None and base.parameters:
        return draft
    found = init_fit.base_shape(draft.recipe().base, base.parameters, base.vocabulary)
    if found is None:
        return draft
    shape, exact = found
    if exact and not base.parameters:  # how much text a number of hours is goes by it
        draft = draft_recipe(replace(choices, base=base.sized(shape.parameters)))
    if exact:
        suit_compute_type(draft, shape.kind)
    if exact and shape.context is not None:
        shorten(draft, shape.context)
    if card is not None:
        apply_fit(draft, init_fit.fit(draft.recipe(), shape, card), exact=exact)
    return draft


def _ask_base(suggested: Draft, bases: Sequence[Base]) -> Draft:
    """Shows the bases, the suggested one as the default, and asks until one fits."""
    choices = suggested.choices
    show("Model to start from (a number, a name of the list, a Hub id or a folder):")
    show_list([(base.name, base.about) for base in bases])

    def read(text: str) -> Draft:
        if text == choices.base.name:
            return suggested
        number = int(text) if text.isdecimal() else 0
        base = bases[number - 1] if 0 < number <= len(bases) else answers.named_base(text, bases, choices.file)
        return _fitted(replace(choices, base=base))

    return ask_again("Base", read, choices.base.name)


def _command(choices: Choices) -> list[str]:
    """The command that writes the same again, anywhere."""
    memory = "0" if choices.card is None else choices.card.given
    words = ["bam-lora", "init", choices.file.name, "--language", choices.language.config, "--base", choices.base.name]
    words += ["--goal", choices.goal.name, "--gpu-memory", memory]
    return words + (["--hours", f"{choices.hours:g}"] if choices.hours is not None else [])


def _next_steps(draft: Draft, text: str) -> str:
    file = shlex.quote(str(draft.choices.file))
    title = " ".join(line.removeprefix("# ") for line in text.split("\n#\n", 1)[0].splitlines())
    lines = [f"{draft.choices.file}: {title}", *(f"note: {note}" for note in notes(draft, draft.recipe()))]
    lines += [f"{name.lower()}: {text}" for name, text in amounts(draft, draft.recipe())]
    lines.append("Next:")
    lines += [f"  bam-lora check {file}   what it takes, and whether it will work", f"  bam-lora run {file}"]
    return "\n".join(lines)
