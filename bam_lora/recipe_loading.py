"""Reading recipes (files, what they extend, what the command line sets), writing and comparing them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bam_lora.errors import UserError, some
from bam_lora.recipe_models import Recipe
from bam_lora.recipe_paths import settle_paths
from bam_lora.recipe_problems import find_problems, report
from bam_lora.recipe_values import Path as KeyPath
from bam_lora.recipe_yaml import Located, Place, dump_yaml, read_yaml

_EXTENDS = "extends"
_MISSING = object()


def load_recipe(path: str | Path, overrides: Sequence[str] = (), output: str | None = None) -> Recipe:
    """Reads a recipe.

    A file may say `extends: other.yaml`, or a list of files, relative to itself: mappings are merged key by key, later
    files and the file itself win, lists are replaced as a whole. Relative paths of sources and of a local base are
    relative to the file that names them, or to the current folder where an override does.

    Args:
        path: The YAML file.
        overrides: Texts such as `bam.slices=4` or `data.target.0.path=x.jsonl`; the value is YAML.
        output: Folder of the run, instead of the recipe's.

    Returns:
        The recipe, complete, with its local paths absolute.

    Raises:
        UserError: With everything that is wrong, each with its line and what could have been meant.
    """
    main = Path(path).absolute()
    located = _read_file(main, ())
    for override in overrides:
        _override(located, override)
    if output is not None:
        _put(located, ("output",), Located(str(output)))
    return _build(located, title=str(path), main=main)


def recipe_from_dict(values: Mapping[str, Any], *, origin: str = "recipe", folder: Path | None = None) -> Recipe:
    """Makes a recipe of plain data.

    Args:
        values: Keys and values as in a file, without `extends`.
        origin: What errors call it.
        folder: What relative paths are relative to; None: the current folder.

    Returns:
        The recipe, complete, with its local paths absolute.

    Raises:
        UserError: With everything that is wrong.
    """
    return _build(Located(copy.deepcopy(dict(values))), title=origin, folder=folder)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every value, defaults included; `load_recipe` reads it back as the same recipe."""
    return dump_yaml(recipe.resolved())


_ORDERED = "bam.merge.weights_by_module"  # the one mapping whose order has a meaning


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two resolved recipes, such as `data.target.0.tokens`.

    Args:
        before: `Recipe.resolved()` of one, or the same read from JSON or YAML.
        after: The other's.

    Returns:
        The keys, sorted. A list that grew or shrank is named as a whole; 1 and 1.0 are equal, 1 and true are not.
    """
    return sorted(_differences(before, after, ""))


def _differences(before: Any, after: Any, place: str) -> list[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        if place == _ORDERED and list(before) != list(after):
            return [place]
        names = {*before, *after}
        pairs = [(name, before.get(name, _MISSING), after.get(name, _MISSING)) for name in names]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(str(number), *pair) for number, pair in enumerate(zip(before, after, strict=True))]
    else:
        same = before == after and isinstance(before, bool) == isinstance(after, bool)
        return [] if same else [place]
    return [key for name, a, b in pairs for key in _differences(a, b, f"{place}.{name}" if place else str(name))]


def _build(located: Located, *, title: str, main: Path | None = None, folder: Path | None = None) -> Recipe:
    def folder_of(place: KeyPath) -> Path:
        written = located.place(place)
        return written.file.parent if written and written.file else folder or Path.cwd()

    findings = settle_paths(located.value, folder_of)
    try:
        recipe = Recipe.model_validate(located.value)
    except ValidationError as error:
        findings += find_problems(located.value, error)
        raise report(title, findings, located, main) from None
    if findings:
        raise report(title, findings, located, main)
    return recipe


def _read_file(path: Path, chain: tuple[Path, ...]) -> Located:
    """A file merged onto those that it extends.

    Args:
        path: The file, absolute.
        chain: The files that led here, each extending the next, to find circles.
    """
    identity = path.resolve()
    if identity in chain:
        names = " -> ".join(str(file) for file in (*chain[chain.index(identity) :], identity))
        raise UserError.of(
            str(path), expected="files that end somewhere", found=f"a circle: {names}", remedy="Drop one `extends`"
        )
    own = read_yaml(_text(path, chain), path)
    if not isinstance(own.value, dict):
        found = "nothing" if own.value is None else f"a {type(own.value).__name__}"
        raise UserError.of(str(path), expected="a mapping of keys", found=found, remedy="Start with `base: ...`")
    merged = Located({})
    for name in _extended(path, own):
        _merge(merged, _read_file(path.parent / Path(name).expanduser(), (*chain, identity)), ())
    _merge(merged, own, ())
    return merged


def _instead(path: Path, chain: tuple[Path, ...]) -> str:
    """Where a recipe may be had that is not where it was looked for."""
    if chain:
        return "Check the path: it is relative to the file that names it"
    for parent in (Path(__file__).parent, Path(__file__).parents[1]):  # installed; a checkout
        packaged = parent.joinpath("recipes", *path.parts[-2:])
        if path.parent.parent.name == "recipes" and packaged.is_file():
            return f"bam_lora's own recipe of that name is {packaged}"
    here = sorted(one.name for one in path.parent.glob("*.yaml"))
    if here:
        return f"Recipes in that folder: {some(here)}"
    return "Check the path, or write a recipe with `bam-lora init`"


def _text(path: Path, chain: tuple[Path, ...]) -> str:
    what = f"{path}, which {chain[-1]} extends" if chain else str(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError.of(what, expected="UTF-8 text", found=str(error), remedy="Save it as UTF-8") from None
    except FileNotFoundError:
        raise UserError.of(what, expected="a recipe", found="no such file", remedy=_instead(path, chain)) from None
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise UserError.of(what, expected="a recipe", found=found, remedy="Check the path") from None


def _extended(path: Path, own: Located) -> list[str]:
    """Takes `extends` out of a file's values."""
    place = own.place((_EXTENDS,))
    value = own.value.pop(_EXTENDS, [])
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        line = f" line {place.line}" if place else ""
        raise UserError.of(
            f"{path}{line}, {_EXTENDS}", expected="a file or a list of files", found=repr(value), remedy="Name a file"
        )
    return names


def _merge(onto: Located, new: Located, path: KeyPath) -> None:
    """Merges the value of `new` at a path into `onto`, which has a mapping there."""
    target, source = _at(onto.value, path), _at(new.value, path)
    for key, value in source.items():
        place = (*path, key)
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(onto, new, place)
        else:
            _forget(onto, place)
            target[key] = value
            onto.places.update({inner: at for inner, at in new.places.items() if inner[: len(place)] == place})


def _at(value: Any, path: KeyPath) -> Any:
    for key in path:
        value = value[key]
    return value


def _forget(located: Located, path: KeyPath) -> None:
    for inner in [inner for inner in located.places if inner[: len(path)] == path]:
        del located.places[inner]


def _override(located: Located, override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UserError.of(
            f"--set {override}", expected="key=value, such as bam.slices=4", found="no such pair", remedy="Write one"
        )
    path: list[str | int] = []
    holder = located.value
    for name in names:
        holder = _step_into(holder, path, override)
        path.append(_key_of(holder, name, path, override))
        holder = holder.get(path[-1]) if isinstance(holder, dict) else holder[int(path[-1])]
    _put(located, tuple(path), read_yaml(text, None))


def _step_into(holder: Any, path: Sequence[str | int], override: str) -> Any:
    if isinstance(holder, dict | list):
        return holder
    if holder is None:
        return {}
    raise UserError.of(
        f"--set {override}",
        expected=f"{'.'.join(map(str, path))} to hold keys",
        found=repr(holder),
        remedy="Set that itself, or another key",
    )


def _key_of(holder: dict[str, Any] | list[Any], name: str, path: Sequence[str | int], override: str) -> str | int:
    if isinstance(holder, dict):
        return name
    if name.isdecimal() and int(name) < len(holder):
        return int(name)
    raise UserError.of(
        f"--set {override}",
        expected=f"an item of {'.'.join(map(str, path))} (0 to {len(holder) - 1})" if holder else "a list with items",
        found=repr(name),
        remedy="Set an item that is there, or the whole list",
    )


def _put(located: Located, path: KeyPath, new: Located) -> None:
    """Puts a value from the command line at a path, making the mappings on the way."""
    holder = located.value
    for key in path[:-1]:
        inner = holder.get(key) if isinstance(holder, dict) else holder[key]
        if inner is None:
            inner = holder[key] = {}
        holder = inner
    holder[path[-1]] = new.value
    _forget(located, path)
    located.places[path] = Place(None)
    located.places.update({(*path, *inner): Place(None) for inner in new.places})
