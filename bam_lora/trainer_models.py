"""The models of a `BamTrainer`: what it was given, and how each iteration's base is loaded in the same way."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bam_lora.base import Loading, device, load_model, settle_loaded
from bam_lora.documents_apart import unsettled
from bam_lora.errors import UserError


@dataclass(frozen=True)
class TrainerLoading(Loading):
    """How a `BamTrainer`'s base is held: as its caller said; `options` stands for that in hashes."""

    options: str = ""


@dataclass(frozen=True)
class ModelSource:
    """Where the base is and how it is loaded.

    Attributes:
        name: Folder or Hub id of the unmodified weights, or a finished run.
        revision: Commit, tag or branch on the Hub.
        arguments: Keyword arguments of `from_pretrained`.
        architecture: Its class, or None to go by the config.
        instance: The model as the caller loaded it, or None.
        use_cpu: Whether the caller's arguments say so, whatever else there is.
    """

    name: str
    revision: str | None
    arguments: Mapping[str, Any]
    architecture: Any = None
    instance: Any = None
    use_cpu: bool = False

    @classmethod
    def of(cls, model: Any, args: Any, quantization: Any, base: str | None) -> ModelSource:
        """From what a TRL trainer takes as `model`, `args.model_init_kwargs` and `quantization_config`.

        Raises:
            UserError: If a loaded model comes without the path of its weights, or with adapters.
        """
        if isinstance(model, str | Path):
            given = dict(args.model_init_kwargs or {})
            if quantization is not None and given.get("quantization_config") is not None:
                raise UserError.of(
                    "quantization_config", expected="one", found="another in args.model_init_kwargs",
                    remedy="Leave one of them out",
                )  # fmt: skip
            if quantization is not None:
                given["quantization_config"] = quantization
            given.setdefault("trust_remote_code", args.trust_remote_code)
            given.pop("device_map", None)
            revision = given.pop("revision", None)  # TRL's own script says "main" of folders, too
            commit = None if Path(model).is_dir() else revision
            return cls(str(model), commit, given, use_cpu=args.use_cpu)
        if hasattr(model, "peft_config"):
            raise UserError.of(
                "model", expected="a model without adapters: the branches get their own",
                found=type(model).__name__, remedy="Pass the base, and peft_config for the adapters",
            )  # fmt: skip
        if base is None:
            raise UserError.of(
                "model",
                expected="a Hub id or folder, or with a loaded model the path of its unmodified weights",
                found=f"a loaded {type(model).__name__}",
                remedy="Pass bam=BamConfig(base=...): each iteration's base is made from those full-precision files",
            )
        return cls(base, None, _arguments_of(model), type(model), model, args.use_cpu)

    def load(self, folder: Path, how: Loading) -> Any:
        """A model folder, loaded as the first one was; that one itself if it was passed loaded and `folder` is None."""
        arguments = dict(self.arguments)
        if how.bits == 16:
            arguments.pop("quantization_config", None)
        arguments["dtype"] = _dtype(arguments.get("dtype", "float32"))
        if self.use_cpu:
            arguments["device_map"] = {"": "cpu"}
        return load_model(folder, how, architecture=self.architecture, **arguments)

    def first(self) -> Any:
        """The model that was passed loaded, where it is trained.

        A trainer would move the view it is given: with it all weights of the base, but not the base's buffers.
        """
        where = "cpu" if self.use_cpu else device()
        if self.instance.device.type != where and not self.quantization():
            self.instance.to(where)
        return settle_loaded(self.instance)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Puts back, at the end, what a model that was passed loaded was: weights that are trained, mode, decoder."""
        if self.instance is None:
            yield
            return
        trained = {one: one.requires_grad for one in self.instance.parameters()}
        modes = {module: module.training for module in self.instance.modules()}
        try:
            with unsettled(self.instance):
                yield
        finally:
            for one, wanted in trained.items():
                one.requires_grad_(wanted)
            for module, mode in modes.items():
                module.training = mode

    def training_load(self, compute_dtype: str) -> TrainerLoading:
        """How the base is held under the branches. `compute_dtype`: of activations, as args.bf16 and fp16 say."""
        quantization = self.quantization()
        options = json.dumps({**self.arguments, "architecture": self.architecture}, default=_words, sort_keys=True)
        bits = 4 if quantization.get("load_in_4bit") else 8 if quantization.get("load_in_8bit") else 16
        return TrainerLoading(
            bits,
            quantization.get("bnb_4bit_quant_type", "nf4"),
            quantization.get("bnb_4bit_use_double_quant", False),
            compute_dtype,
            options,
        )

    def scoring_load(self, training: TrainerLoading) -> TrainerLoading:
        """How models are held that are scored: as for training, but 8-bit ones in full precision."""
        return replace(training, bits=16) if training.bits == 8 else training

    def quantization(self) -> dict[str, Any]:
        """The quantisation as plain values; empty if there is none."""
        config = self.arguments.get("quantization_config")
        if config is None:
            return {}
        return dict(config if isinstance(config, Mapping) else config.to_dict())


def compute_dtype(args: Any) -> str:
    """What activations are computed in."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def _arguments_of(model: Any) -> dict[str, Any]:
    """How a loaded model would be loaded again."""
    arguments: dict[str, Any] = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None:
        arguments["quantization_config"] = quantization
    return arguments


def _dtype(value: Any) -> Any:
    import torch

    return getattr(torch, value) if isinstance(value, str) and value != "auto" else value


def _words(value: Any) -> Any:
    """A value that JSON does not know, as text without addresses."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return getattr(value, "__qualname__", None) or str(value)


def require_sense(args: Any, others: Mapping[str, Any], trainer_cls: Any) -> None:
    """Refuses what a branch cannot be trained with in this version.

    Raises:
        UserError: Naming the argument.
    """
    known = inspect.signature(trainer_cls).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in known.values()):
        for name in others.keys() - known.keys():
            near = difflib.get_close_matches(name, [*known, "bam", "replay_dataset", "selection_dataset"], 1)
            raise UserError.of(
                name, expected=f"an argument of BamTrainer or {trainer_cls.__name__}", found="an unknown one",
                remedy=f"Perhaps {near[0]} is meant" if near else "Leave it out",
            )  # fmt: skip
    if "optimizers" in others:
        raise UserError.of(
            "optimizers", expected="args.optim or optimizer_cls_and_kwargs: every branch needs a new optimizer",
            found="one optimizer", remedy="Leave it out",
        )  # fmt: skip
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name, None):
            raise UserError.of(
                f"args.{name}", expected="none: a branch trains in one process", found="it set",
                remedy="Leave it out",
            )  # fmt: skip
    if args.world_size > 1:
        raise UserError.of(
            "the number of processes", expected="1", found=str(args.world_size),
            remedy="Start the script with `python`, not with torchrun or accelerate launch",
        )  # fmt: skip
    if args.n_gpu > 1:
        raise UserError.of(
            "the number of GPUs", expected="1: a branch trains on one", found=str(args.n_gpu),
            remedy="Start the script with CUDA_VISIBLE_DEVICES=0",
        )  # fmt: skip
    for name in ("load_best_model_at_end", "auto_find_batch_size"):
        if getattr(args, name, False):
            raise UserError.of(
                f"args.{name}", expected="False: a branch takes the steps of the plan, and ends with its last",
                found="True", remedy="Leave it out",
            )  # fmt: skip
