"""The recipe: one YAML file that describes a run.

The models are in `recipe_models`, the checks across them in `recipe_rules`, reading files in `recipe_loading`; this is
the door to all of them. None of it loads torch.
"""

from __future__ import annotations

from bam_lora.recipe_loading import changed_keys, dump_recipe, load_recipe, recipe_from_dict
from bam_lora.recipe_lora import Lora
from bam_lora.recipe_merge import LearnedWeights, Outer, SearchedWeights
from bam_lora.recipe_models import (
    Bam,
    Data,
    Evaluation,
    Keep,
    Merge,
    Recipe,
    Selection,
)
from bam_lora.recipe_schema import recipe_schema
from bam_lora.recipe_sources import EvaluationSource, Source
from bam_lora.recipe_training import Quantization, Training

__all__ = [
    "Bam",
    "Data",
    "Evaluation",
    "EvaluationSource",
    "Keep",
    "LearnedWeights",
    "Lora",
    "Merge",
    "Outer",
    "Quantization",
    "Recipe",
    "SearchedWeights",
    "Selection",
    "Source",
    "Training",
    "changed_keys",
    "dump_recipe",
    "load_recipe",
    "recipe_from_dict",
    "recipe_schema",
]
