"""The recipe as a JSON schema, for editors: completion, types and meanings while typing."""

from __future__ import annotations

from typing import Any

from bam_lora.recipe_models import Recipe
from bam_lora.sft_arguments import settable
from bam_lora.sft_fields import SftField, sft_fields

_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "dict": "object", "list": "array"}


def recipe_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe file.

    Nothing is required in it: a file may leave to the one that it extends, or to `--set`, what it does not say.

    Returns:
        The schema, with TRL's own fields under `training` as the installed version has them.
    """
    schema = Recipe.model_json_schema()
    training = schema["$defs"]["Training"]
    for name in settable():
        training["properties"].setdefault(name, _property(sft_fields()[name]))
    training["additionalProperties"] = False
    texts = {"type": "string"}
    schema["properties"]["extends"] = {
        "anyOf": [texts, {"type": "array", "items": texts}],
        "description": "Recipe or recipes to start from, relative to this file; what is said here wins.",
    }
    for optional in (
        schema["$defs"]["Lora"]["properties"]["alpha"],
        schema["$defs"]["EvaluationSource"]["properties"]["set"],
    ):
        described = {key: optional.pop(key) for key in ("description", "title", "default") if key in optional}
        plain = dict(optional)
        optional.clear()
        optional.update({**described, "anyOf": [plain, {"type": "null"}]})
    schema.pop("required", None)
    schema["$defs"]["Data"].pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "bam_lora recipe"}


def _property(field: SftField) -> dict[str, Any]:
    description = {"description": "A field of TRL's SFTConfig."}
    if field.choices:
        return {"enum": [*field.choices, *([None] if field.optional else [])], **description}
    if field.kinds is None:
        return description
    kinds = sorted({_TYPES[kind] for kind in field.kinds} | ({"null"} if field.optional else set()))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, **description}
