"""The recipe as models: every key, its type, its default and its meaning.

The descriptions here are the reference: `docs/recipe.md` and the JSON schema are made from them. Checks of one value
are the field's own; checks across fields are in `recipe_rules`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from bam_lora import recipe_chat, recipe_rules
from bam_lora.recipe_limits import Limits
from bam_lora.recipe_lora import Lora
from bam_lora.recipe_merge import LearnedWeights, Outer, SearchedWeights
from bam_lora.recipe_sources import EvaluationSource, Filters, Mode, Section, Source
from bam_lora.recipe_tasks import EvaluationTask
from bam_lora.recipe_training import Quantization, Training
from bam_lora.recipe_values import Weights, WeightsByModule, findings_error
from bam_lora.recipe_vocabulary import Vocabulary


class Data(Section):
    """The text to train on."""

    target: list[Source] = Field(min_length=1, description="Text in the language (or domain) to learn.")
    replay: list[Source] = Field(
        default=[], description="Text like the base's own training data, mixed in against forgetting."
    )
    replay_share: float = Field(default=0.0, ge=0, lt=1, description="Replay's share of all training tokens.")
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        description="Jinja file with the chat template, relative to the recipe; none: the base's own, or a plain one "
        "if it has none. It goes into the result.",
    )
    sequence_length: int = Field(default=2048, ge=8, description="Tokens in a training sequence.")
    slicing: Literal["random", "contiguous", "by_dataset", "by_column"] = Field(
        default="random",
        description="How the sequences are dealt out to the slices: shuffled by `seed` (`random`), in their order "
        "(`contiguous`), or shuffled within groups, each slice of one group, the groups taking turns: every target "
        "source is a group (`by_dataset`), or every value of a column (`by_column`). `bam.slices` is then a multiple "
        "of the number of groups.",
    )
    slicing_column: str | None = Field(
        default=None,
        min_length=1,
        description="Column of the target sources for `slicing: by_column`, such as `language`.",
    )
    filters: Filters = Field(default=Filters(), description="Which documents are left out.")
    deduplicate: Literal["none", "exact", "near"] = Field(
        default="none",
        description="Leave out copies, within and across all target and replay sources, the first being kept: `exact`, "
        "equal but for white space; `near`, also those that share four fifths of their runs of five words.",
    )
    contamination: Literal["warn", "drop", "error"] = Field(
        default="warn",
        description="What to do with training documents that hold text of the evaluation or selection sets: say so, "
        "leave them out, or stop.",
    )


Method = Literal["linear", "slerp", "karcher", "model_stock", "ties", "dare_linear", "dare_ties", "breadcrumbs"]


class Merge(Section):
    """How the branches' deltas become one."""

    method: Method = Field(
        default="linear",
        description="Merge method, weight by weight: `linear`, the weighted sum of the deltas; `slerp`, along the arc "
        "between two; `karcher`, the mean direction of any number, with their mean norm; `model_stock`, the average "
        "drawn towards the base as far as the branches disagree. Element by element, and so with a snapshot of whole "
        "weights an iteration: `ties`, `dare_linear`, `dare_ties`, `breadcrumbs`.",
    )
    density: float = Field(
        default=0.5, gt=0, le=1, description="Share of each delta's elements that ties, dare and breadcrumbs keep."
    )
    gamma: float = Field(default=0.01, ge=0, lt=1, description="Share of the largest elements that breadcrumbs drops.")
    weights: Weights = Field(
        default="uniform",
        description="Weight of each branch: `uniform` (1/K), `tokens` (as each branch's tokens), a list as it is, "
        "`learned`: trained at each merge on the `selection` sets, starting from 1/K; or `search`: the best of a few "
        "candidates by the same sets.",
    )
    weights_by_module: WeightsByModule = Field(
        default={},
        description="Other weights for some of the model's weights: a regular expression for their names, and "
        "`uniform`, `tokens` or a list; the first that is found in a name counts, `weights` for the rest.",
    )
    learned: LearnedWeights = Field(default=LearnedWeights(), description="How `weights: learned` does it.")
    search: SearchedWeights = Field(default=SearchedWeights(), description="How `weights: search` does it.")
    scale: float = Field(
        default=1.0, gt=0, description="Factor on the merged delta; on what learned and searched weights start from."
    )


class Bam(Section):
    """Branch-and-Merge: N slices, K branches per iteration, ceil(N/K) iterations."""

    slices: int = Field(default=8, ge=1, description="N: number of disjoint parts of the training data.")
    branches: int = Field(
        default=2, ge=1, description="K: number of slices trained apart, then merged, in one iteration."
    )
    merge: Merge = Field(default=Merge(), description="How the branches are merged.")
    outer: Outer = Field(default=Outer(), description="The step along what they merge to.")


class Evaluation(Section):
    """What learning and forgetting are measured on, in bits per byte. Without sets nothing is measured."""

    target: list[EvaluationSource] = Field(default=[], description="Sets in the language to learn.")
    source: list[EvaluationSource] = Field(default=[], description="Sets of what the base knew: forgetting shows here.")
    precision: Literal["4bit", "16bit"] = Field(default="4bit", description="Precision of every model that is scored.")
    window_bytes: int | None = Field(
        default=None,
        ge=16,
        description="Text is read in windows of so many bytes, overlap included; "
        "none: as the base's context length allows.",
    )
    overlap_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Bytes at the start of a window that are context, scored in the one before; none: a quarter of it.",
    )
    branches: bool = Field(default=True, description="Score every branch too, not only what their merges give.")
    batch_size: int = Field(default=8, ge=1, description="Windows scored at once.")
    tasks: list[EvaluationTask] = Field(
        default=[], description="Benchmarks of lm-evaluation-harness, scored at `precision`, too (docs/evaluation.md)."
    )
    task_when: Literal["ends", "iterations"] = Field(
        default="ends", description="Which models do the tasks: base and result, or every merged one, too."
    )
    samples: list[str] = Field(
        default=[],
        description="Prompts that base and result continue (in `mode: chat`, questions they answer), for the report.",
    )


class Selection(Section):
    """Text that choices are made by, such as `bam.merge.weights: learned`; never text of the evaluation sets."""

    target: list[EvaluationSource] = Field(default=[], description="Sets in the language to learn.")
    source: list[EvaluationSource] = Field(default=[], description="Sets of what the base knows.")


class Keep(Section):
    """What stays on disk."""

    bases: Literal["last", "all", "none"] = Field(
        default="last",
        description="The iterations' folded models: only the newest, all, or none once the result is written. "
        "Any of them can be rebuilt.",
    )
    checkpoints: bool = Field(
        default=False,
        description="Keep the adapter of every checkpoint inside a branch, for `bam-lora shrink --checkpoints`.",
    )


class Recipe(Section):
    """A run, as its user describes it."""

    base: str = Field(min_length=1, description="Model to start from: Hub id, folder, or the folder of a finished run.")
    revision: str | None = Field(
        default=None, description="Commit, tag or branch of a base on the Hub; none: the newest."
    )
    output: str = Field(min_length=1, description="Folder of the run, relative to the current one (or `--output`).")
    strategy: Literal["bam", "single", "sequential"] = Field(
        default="bam",
        description="`bam`; or the baselines over the same data: `single` (one adapter, one slice) "
        "and `sequential` (one branch at a time, folded in before the next).",
    )
    mode: Mode = Field(
        default="text",
        description="`text`: plain documents, of which every token is trained; `chat`: conversations, of which the "
        "assistant's answers are. A source can have a mode of its own.",
    )
    data: Data = Field(description="The text to train on.")
    bam: Bam = Field(default=Bam(), description="Slices, branches and how they are merged.")
    vocabulary: Vocabulary = Field(default=Vocabulary(), description="New tokens for the target language.")
    lora: Lora = Field(default=Lora(), description="The adapter that a branch trains.")
    quantization: Quantization = Field(default=Quantization(), description="The frozen base under the adapter.")
    training: Training = Field(default=Training(), description="How a branch is trained.")
    evaluation: Evaluation = Field(default=Evaluation(), description="What the models are scored on.")
    selection: Selection = Field(default=Selection(), description="What choices are made by.")
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Seed of everything random: slicing, adapters, order of the data."
    )
    keep: Keep = Field(default=Keep(), description="What stays on disk.")
    limits: Limits = Field(default=Limits(), description="How much the run may take.")
    script: dict[str, Any] | None = Field(
        default=None,
        description="What a `BamTrainer` was given, if one wrote this recipe; only its script can go on with the run.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_modes(cls, values: Any) -> Any:
        return recipe_chat.with_modes(values)

    @model_validator(mode="after")
    def _check_rules(self) -> Recipe:
        if findings := recipe_rules.check({name: getattr(self, name) for name in type(self).model_fields}):
            raise findings_error(findings)
        return self

    @property
    def slices(self) -> int:
        """N as the strategy makes it: `single` trains on one slice, whatever `bam.slices` says."""
        return 1 if self.strategy == "single" else self.bam.slices

    @property
    def branches(self) -> int:
        """K as the strategy makes it: 1 for the baselines."""
        return self.bam.branches if self.strategy == "bam" else 1

    @property
    def beside_factors(self) -> str | None:
        """The first key by which branches train more than low-rank factors, or None."""
        if self.lora.beside_factors is not None:
            return f"lora.{self.lora.beside_factors}"
        return None if self.vocabulary.tokens is None else "vocabulary.tokens"

    def resolved(self) -> dict[str, Any]:
        """Every value, defaults included, in plain JSON types; without `script` where there is none."""
        return self.model_dump(mode="json", exclude=None if self.script is not None else {"script"})
