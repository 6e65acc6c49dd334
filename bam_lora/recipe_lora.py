"""The recipe's section about the adapter: LoRA's own settings, and what is trained beside its factors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from bam_lora.recipe_sources import Section
from bam_lora.recipe_values import Modules, TokenRows


class Lora(Section):
    """The adapter that a branch trains."""

    r: int = Field(default=64, ge=1, description="Rank.")
    alpha: int = Field(
        default=None, ge=1, validate_default=True, description="The delta is alpha/r · B·A; none: twice the rank."
    )
    target_modules: Modules = Field(
        default="all-linear",
        description="Which layers get an adapter: `all-linear` (all but the output head) or their names.",
    )
    exclude_modules: list[str] = Field(
        default=[], description="Layers of those that get none, by the end of their names."
    )
    target_parameters: list[str] = Field(
        default=[],
        description="Parameters that are no layer's weight and get an adapter, such as `mlp.experts.gate_up_proj`.",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default={},
        description="Other ranks for some layers: the end of a layer's name, or a regular expression for it.",
    )
    alpha_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default={}, description="Other alphas for some layers, as `rank_pattern`."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    rslora: bool = Field(default=False, description="Scale by alpha/√r instead of alpha/r (rank-stabilised LoRA).")
    init: Literal["default", "gaussian", "loftq"] = Field(
        default="default",
        description="How the factors begin: `default` (Kaiming) or `gaussian`, with a second factor of zero; `loftq`: "
        "as a correction of the base's 4-bit error, which is taken off again when the branch is saved (at rank 2r). "
        "PEFT's others (PiSSA, OLoRA, CorDA, ...) change the base itself.",
    )
    dora: bool = Field(
        default=False,
        description="Weight-decomposed LoRA: a magnitude for every row beside the factors. Each iteration keeps the "
        "fp32 weights of all adapted layers in the ledger.",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Biases of the base that are trained: none, all, or those of adapted layers."
    )
    lora_bias: bool = Field(default=False, description="A bias on the adapter's second factor, for layers with a bias.")
    modules_to_save: list[str] = Field(
        default=[],
        description="Modules that are trained whole, such as `embed_tokens` or `lm_head`, by the end of their names; "
        "not quantised ones. Each iteration keeps their fp32 weights in the ledger.",
    )
    trainable_token_indices: TokenRows = Field(
        default=[],
        description="Tokens whose rows of the input embedding are trained as they are: their numbers, or a mapping "
        "from a module's name to them.",
    )
    ensure_weight_tying: bool = Field(
        default=True,
        description="Where the base ties its output head to its embedding and `modules_to_save` trains them: they stay "
        "tied; false: training parts them.",
    )

    @field_validator("alpha", mode="before")
    @classmethod
    def _double_rank(cls, value: Any, info: ValidationInfo) -> Any:
        return 2 * info.data.get("r", 1) if value is None else value

    @property
    def beside_factors(self) -> str | None:
        """The first key by which more is trained than low-rank factors, or None."""
        keys = ("dora", "modules_to_save", "trainable_token_indices")
        return "bias" if self.bias != "none" else next((key for key in keys if getattr(self, key)), None)

    def arguments(self) -> dict[str, Any]:
        """All of it as keyword arguments of PEFT's `LoraConfig`."""
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "target_modules": self.target_modules,
            "exclude_modules": self.exclude_modules or None,
            "target_parameters": self.target_parameters or None,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "init_lora_weights": "gaussian" if self.init == "gaussian" else True,
            "use_dora": self.dora,
            "bias": self.bias,
            "lora_bias": self.lora_bias,
            "modules_to_save": self.modules_to_save or None,
            "trainable_token_indices": self.trainable_token_indices or None,
            "ensure_weight_tying": bool(self.modules_to_save) and self.ensure_weight_tying,
        }
