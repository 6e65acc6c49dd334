"""What a `BamTrainer` makes of arguments that are left out, as TRL's trainers do."""

from __future__ import annotations

import copy
import inspect
import itertools
from pathlib import Path
from typing import Any

from bam_lora.base import find_base
from bam_lora.errors import UserError
from bam_lora.rundir import RunDirectory
from bam_lora.store import digest
from bam_lora.trainer_models import ModelSource


def default_arguments(args: Any, model: Any, trainer_cls: Any) -> Any:
    """The trainer's arguments; where there are none, TRL's own for `SFTTrainer`, in a folder named after the model.

    Raises:
        UserError: If another trainer class comes without arguments.
    """
    from transformers import TrainingArguments
    from trl import SFTConfig

    if args is None:
        if trainer_cls is not None:
            raise UserError.of(
                "args", expected=f"the arguments of {trainer_cls.__name__}", found="none", remedy="Pass them"
            )
        name = model if isinstance(model, str | Path) else getattr(model.config, "_name_or_path", "") or "model"
        return SFTConfig(f"{Path(str(name)).name}-BaM")
    if isinstance(args, TrainingArguments) and type(args) is TrainingArguments:
        values = args.to_dict()
        values["hub_token"] = args.hub_token  # to_dict hides it
        return SFTConfig(**values)
    if not isinstance(args, TrainingArguments):
        raise UserError.of(
            "args", expected="an SFTConfig, or the arguments of trainer_cls", found=type(args).__name__,
            remedy="Pass args=SFTConfig(...)",
        )  # fmt: skip
    return args


def default_peft(peft_config: Any) -> Any:
    """The adapters' configuration: by default LoRA of rank 64 on all linear layers.

    Raises:
        UserError: If it is not LoRA.
    """
    from peft import LoraConfig

    if peft_config is None:
        return LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
    if not isinstance(peft_config, LoraConfig):
        raise UserError.of(
            "peft_config", expected="a peft.LoraConfig", found=type(peft_config).__name__,
            remedy="Deltas of other adapters cannot be averaged and folded",
        )  # fmt: skip
    return copy.deepcopy(peft_config)


def find_processing_class(given: Any, model: ModelSource) -> Any:
    """The tokenizer or processor: the caller's, or that of the base."""
    if given is not None:
        return given
    from transformers import AutoTokenizer

    trust = bool(model.arguments.get("trust_remote_code", False))
    return AutoTokenizer.from_pretrained(str(first_folder(model)), trust_remote_code=trust)


def first_folder(model: ModelSource) -> Path:
    """The folder of the model that the run starts from: a finished run's result, or the base."""
    parent = RunDirectory(Path(model.name))
    return parent.model if parent.plan.is_file() else find_base(model.name, model.revision).folder


def prepares(trainer_cls: Any, args: Any, processing_class: Any, others: dict[str, Any]) -> bool:
    """Whether the examples are prepared once for all branches, as `SFTTrainer` does, and dealt out by tokens.

    Otherwise each branch's trainer prepares its own: other trainer classes, examples with images, and those that are
    prepared already or that a collator of the caller's reads raw.
    """
    from transformers import PreTrainedTokenizerBase
    from trl import SFTTrainer

    raw_collator = "data_collator" in others and not args.remove_unused_columns
    return (
        issubclass(trainer_cls, SFTTrainer)
        and isinstance(processing_class, PreTrainedTokenizerBase)
        and not (args.dataset_kwargs or {}).get("skip_prepare_dataset")
        and not raw_collator
    )


def one_example(rows: Any) -> Any:
    """The first example of a data set, as one: a trainer for evaluation wants some."""
    import datasets

    return datasets.Dataset.from_list(list(itertools.islice(rows, 1)))


def formatting_hash(function: Any, rows: Any) -> str | None:
    """Hash of a formatting function, so that another one makes another run: of its source and of what it makes.

    Its source alone does not show what it has from outside, such as a prompt. Its name, where there is no source.

    Args:
        function: It, or None.
        rows: Examples to try it on: the first few.
    """
    if function is None:
        return None
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = getattr(function, "__qualname__", type(function).__qualname__)
    made = [str(function(row)) for row in itertools.islice(rows, 4)]
    return digest([text, made])


def tokenizer_hash(processing: Any) -> str:
    """Hash of what a script may change in its tokenizer: template, added and special tokens."""
    tokenizer = getattr(processing, "tokenizer", processing)
    return digest([getattr(processing, "chat_template", None), len(tokenizer), tokenizer.special_tokens_map])


def check_resume(directory: RunDirectory, wanted: str | bool | None) -> None:
    """Checks what `train(resume_from_checkpoint=...)` says against what the run directory holds.

    Raises:
        UserError: If the two disagree.
    """
    root, there = directory.root, directory.plan.exists()
    if isinstance(wanted, str | Path):
        path = Path(wanted).expanduser().resolve()
        if root not in (path, *path.parents):
            raise UserError.of(
                f"resume_from_checkpoint={str(wanted)!r}", expected=f"the run directory {root}", found="another folder",
                remedy="Set args.output_dir to the run to go on with",
            )  # fmt: skip
    if wanted and not there:
        raise UserError.of(
            str(root), expected="a run to go on with", found="none", remedy="Leave out resume_from_checkpoint"
        )
    if wanted is False and there:
        raise UserError.of(
            str(root), expected="no run, as resume_from_checkpoint is False", found="one",
            remedy="Leave it out to go on with that run, or choose another args.output_dir",
        )  # fmt: skip
