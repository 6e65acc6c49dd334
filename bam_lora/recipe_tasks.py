"""The part of a recipe that names benchmarks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from bam_lora.recipe_sources import Section


class EvaluationTask(Section):
    """One benchmark of lm-evaluation-harness: these keys, or its name alone."""

    task: str = Field(
        min_length=1,
        description="Name of a task, group or tag of the harness, such as `belebele_bul_Cyrl`, or a task file of one's "
        "own (`.yaml`), relative to the recipe that names it.",
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, description="Solved examples before each question; none: as the task has it, or 0."
    )
    limit: int | None = Field(
        default=None, ge=1, description="Only the first so many documents of each task; none: all."
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="Prompts scored at once at the most; none: `evaluation.batch_size`."
    )
    role: Literal["target", "source"] | None = Field(
        default=None, description="Whether it is in the language to learn or in what the base knew, for the report."
    )

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(core_schema)]}
