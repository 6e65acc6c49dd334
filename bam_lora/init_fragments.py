"""The fragments that recipes are made of: bases, goals, languages, as recipes/README.md describes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bam_lora.commented_yaml import Commented, Tree, look_up, merge_trees, read_commented
from bam_lora.errors import UserError
from bam_lora.languages import DATASET, Language

_PARAMETERS = re.compile(r"([\d.]+) ([BM]) parameters")
_VOCABULARY = re.compile(r"vocabulary ([\d,]+)")
_CARD = re.compile(r"(?:for|from) (\d+) GB")
_DATA, _CHAT_DATA = "data.yaml", "instruct-data.yaml"
_EXTENDS = "extends"


def recipes_folder() -> Path:
    """The recipes: beside the package's modules in an installation, beside the package in a checkout.

    Raises:
        UserError: If there are none.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "_shared" / "bases").is_dir():
            return folder
    raise UserError.of(str(package / "recipes"), expected="the recipes", found="none", remedy="Install bam-lora again")


@dataclass(frozen=True)
class Fragment:
    """A file with a part of a recipe.

    Attributes:
        name: Its file's, without the ending.
        file: What is said of it, and its keys, with those of the files it extends.
    """

    name: str
    file: Commented

    @property
    def title(self) -> str:
        """What its first line says, up to the colon."""
        return self.file.title.partition(":")[0]

    @property
    def about(self) -> str:
        """What its first line says after the colon."""
        return self.file.title.partition(":")[2].strip()


@dataclass(frozen=True)
class Base(Fragment):
    """A base with its settings."""

    @property
    def family(self) -> str:
        """Which it is one size of: `qwen3` of `qwen3-8b`."""
        return self.name.partition("-")[0]

    @cached_property
    def model(self) -> str:
        """Its id on the Hub."""
        return look_up(self.file.tree, "base") or self.name

    @cached_property
    def parameters(self) -> int:
        """How many numbers it has, as its notes say; 0 if they do not."""
        match = _PARAMETERS.search(self.file.notes)
        return round(float(match[1]) * (1e9 if match[2] == "B" else 1e6)) if match else 0

    @cached_property
    def vocabulary(self) -> int:
        """Rows of its embedding, as its notes say; 0 if they do not."""
        match = _VOCABULARY.search(self.file.notes)
        return int(match[1].strip(",").replace(",", "")) if match else 0

    @cached_property
    def card_bytes(self) -> int:
        """Memory of the card that its title is written for; 0 if it names none."""
        match = _CARD.search(self.about)
        return int(match[1]) * 2**30 if match else 0

    def sized(self, parameters: int) -> Base:
        """The same, with its size in its notes."""
        unit, name = (1e9, "B") if parameters >= 1e9 else (1e6, "M")
        return Base(
            self.name, Commented([*self.file.head, f"{parameters / unit:.3g} {name} parameters."], self.file.tree)
        )

    @property
    def gated(self) -> bool:
        """Whether its terms must be accepted on its page first."""
        return "not gated" not in self.file.notes and "gated" in self.file.notes

    @property
    def many_languages(self) -> bool:
        """Whether its title says that it knows many languages."""
        return "many languages" in self.about


@dataclass(frozen=True)
class Goal(Fragment):
    """What the training is for."""

    @property
    def chat(self) -> bool:
        """Whether it learns from conversations."""
        return look_up(self.file.tree, "mode") == "chat"


def list_bases(folder: Path) -> list[Base]:
    """The bases, smallest first."""
    bases = [Base(path.stem, read_fragment(path)) for path in sorted((folder / "_shared" / "bases").glob("*.yaml"))]
    return sorted(bases, key=lambda base: (base.parameters, base.name))


def list_goals(folder: Path) -> list[Goal]:
    """The goals: continued pretraining first, the baseline last."""
    goals = [Goal(path.stem, read_fragment(path)) for path in (folder / "_shared" / "goals").glob("*.yaml")]
    return sorted(goals, key=lambda goal: (goal.name == "single", not goal.name.startswith("pretrain"), goal.name))


def fragment_names(kind: str) -> list[str]:
    """Names of the fragments of a kind, `bases` or `goals`, without reading them."""
    return sorted(path.stem for path in (recipes_folder() / "_shared" / kind).glob("*.yaml"))


def read_fragment(path: Path) -> Commented:
    """A fragment with the keys of those that it extends; its head is its own."""
    own = read_commented(path)
    extended = own.tree.pop(_EXTENDS, None)
    tree: Tree = {}
    if extended is not None:
        assert isinstance(extended.value, str)
        for name in re.findall(r"[^\s,\[\]\"'-][^\s,\[\]\"']*", extended.value):
            merge_trees(tree, read_fragment(path.parent / name).tree)
    merge_trees(tree, own.tree)
    return Commented(own.head, tree)


def language_folders(folder: Path) -> dict[str, Path]:
    """Folders of the languages that have one, by the FineWeb-2 configuration they learn from."""
    found = {}
    named = re.compile(rf"path:\s*{re.escape(DATASET)}\s*,\s*name:\s*(\w+)")
    for path in sorted(folder.glob(f"*/{_DATA}")):
        match = named.search(path.read_text(encoding="utf-8"))
        if match:
            found[match[1]] = path.parent
    return found


def language_data(folder: Path, language: Language, *, chat: bool) -> Commented | None:
    """A language's own fragment, or None if it has none.

    Args:
        folder: The recipes.
        language: The language.
        chat: Its conversations, not its text.
    """
    place = language_folders(folder).get(language.config)
    if place is None or not (place / (_CHAT_DATA if chat else _DATA)).is_file():
        return None
    return read_fragment(place / (_CHAT_DATA if chat else _DATA))


def default_base(folder: Path, language: Language) -> str | None:
    """The name of the base that a language's own recipe takes, if it has one."""
    place = language_folders(folder).get(language.config)
    recipe = place / "pretrain.yaml" if place else None
    if recipe is None or not recipe.is_file():
        return None
    match = re.search(r"_shared/bases/([\w.-]+)\.yaml", recipe.read_text(encoding="utf-8"))
    return match[1] if match else None
