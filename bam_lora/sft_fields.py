"""The fields of TRL's `SFTConfig`, read from the source files of the installed packages.

Importing `SFTConfig` imports torch and takes seconds; a recipe is checked in milliseconds. So the class and the ones it
inherits from are looked up in their files with `ast`: names, the plain types an annotation allows, and the values of
an enum such as the names of the optimizers.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError

# Where a name that a package's top level re-exports is defined.
_EXPORTED = {("transformers", "TrainingArguments"): "training_args.py"}
_PLAIN = {"int", "float", "bool", "str", "dict", "list"}
_MOST_CHOICES = 8  # there are some forty optimizers
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
    "list": "a list",
}


@dataclass(frozen=True)
class SftField:
    """One field of `SFTConfig`.

    Attributes:
        name: Its name.
        annotation: Its annotation as written in the source.
        kinds: Names of the plain types that it allows ("int", "str", ...), or None where it says more.
        optional: Whether it may be null.
        choices: The texts that an enum allows, or none.
    """

    name: str
    annotation: str
    kinds: frozenset[str] | None
    optional: bool
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """What it takes, in words."""
        if self.choices:
            shown = ", ".join(self.choices[:_MOST_CHOICES])
            return f"one of {shown}" + (", ..." if len(self.choices) > _MOST_CHOICES else "")
        words = [_WORDS[kind] for kind in _WORDS if kind in (self.kinds or ())]
        return " or ".join([*words, "nothing (null)"] if self.optional else words) or self.annotation

    def allows(self, value: Any) -> bool:
        """Whether a value (of plain JSON types) has a type that the field takes."""
        if value is None:
            return self.optional
        if self.choices:
            return value in self.choices
        if self.kinds is None:
            return True
        kind = type(value).__name__
        return kind in self.kinds or (kind == "int" and "float" in self.kinds)


@functools.cache
def sft_fields() -> dict[str, SftField]:
    """All fields that the installed `SFTConfig` takes, by name.

    Raises:
        UserError: If TRL or transformers is not installed, or keeps the class where this version does not look.
    """
    fields: dict[str, SftField] = {}
    for file, node in reversed(list(_classes(_package("trl") / "trainer" / "sft_config.py", "SFTConfig"))):
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                name = statement.target.id
                fields[name] = _field(name, statement.annotation, file)
    return fields


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError.of(
            f"package {name}", expected="it to be installed", found="nothing", remedy=f"Run pip install {name}"
        )
    return Path(spec.origin).parent


@functools.cache
def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise _unknown_layout(file, str(error)) from None


def _unknown_layout(file: Path, found: str) -> UserError:
    return UserError.of(
        str(file),
        expected="the fields of SFTConfig as TRL 1.x and transformers 5.x write them down",
        found=found,
        remedy="Install the versions that pyproject.toml names",
    )


def _classes(file: Path, name: str) -> Iterator[tuple[Path, ast.ClassDef]]:
    """The class and those it inherits its fields from, the class itself first, each with its file."""
    for node in _parse(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield file, node
            for base in node.bases:
                if isinstance(base, ast.Name):
                    yield from _classes(_defining_file(file, base.id), base.id)
            return
    raise _unknown_layout(file, f"no class {name}")


def _defining_file(file: Path, name: str) -> Path:
    """The file that defines a name used in `file`: that file, a neighbour, or another package's."""
    for node in _parse(file).body:
        if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
            if node.level:
                return (file.parents[node.level - 1] / node.module.replace(".", "/")).with_suffix(".py")
            exported = _EXPORTED.get((node.module, name))
            if exported is None:
                raise _unknown_layout(file, f"{name} from {node.module}")
            return _package(node.module) / exported
    return file


def _field(name: str, annotation: ast.expr, file: Path) -> SftField:
    kinds: set[str] | None = set()
    choices: tuple[str, ...] = ()
    optional = False
    for part in _alternatives(annotation):
        text = ast.unparse(part)
        plain = text.split("[")[0]
        if text == "None":
            optional = True
        elif plain in _PLAIN:
            if kinds is not None:
                kinds.add(plain)
        else:
            kinds = None
            if isinstance(part, ast.Name):
                choices = _enum_values(file, part.id)
    return SftField(name, ast.unparse(annotation), frozenset(kinds) if kinds is not None else None, optional, choices)


def _alternatives(annotation: ast.expr) -> Iterator[ast.expr]:
    """The parts of `A | B | None`, `Optional[A]` and `Union[A, B]`, quoted or not."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield from _alternatives(ast.parse(annotation.value, mode="eval").body)
    elif isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        yield from _alternatives(annotation.left)
        yield from _alternatives(annotation.right)
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in ("Optional", "Union"):
        inner = annotation.slice
        for part in inner.elts if isinstance(inner, ast.Tuple) else [inner]:
            yield from _alternatives(part)
        if ast.unparse(annotation.value) == "Optional":
            yield ast.Constant(None)
    else:
        yield annotation


def _enum_values(file: Path, name: str) -> tuple[str, ...]:
    """The texts of an enum imported or defined in `file`; none if it is not an enum of texts."""
    try:
        classes = _parse(_defining_file(file, name)).body
    except UserError:
        return ()  # a type of another package, such as accelerate's: its values are not checked here
    for node in classes:
        if isinstance(node, ast.ClassDef) and node.name == name and "Enum" in "".join(map(ast.unparse, node.bases)):
            return tuple(
                str(statement.value.value)
                for statement in node.body
                if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
            )
    return ()
