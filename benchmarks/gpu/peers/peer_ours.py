"""A branch of bam_lora, trained by `train_branch` as a run does, over the rows that TRL packs of the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer_recording import Recorder, effective
from peer_settings import Settings
from peer_trl import SCHEDULE, adapter


def train(settings: Settings, recorder: Recorder, folder: Path) -> dict[str, Any]:
    """Trains, and returns what was really used."""
    from bam_lora.quiet import quiet

    quiet()
    from bam_lora.attention import AUTO
    from bam_lora.base import Loading, device, load_model, load_tokenizer
    from bam_lora.branch import BranchJob, train_branch
    from bam_lora.interrupt import StopRequest
    from bam_lora.kernels import choose_kernels
    from bam_lora.sft_branch import SftBranch

    base = Path(settings.base)
    how = Loading(bits=4, attention=settings.attention or AUTO)
    tokenizer = load_tokenizer(base)
    rows = packed_rows(settings, tokenizer)
    branch = SftBranch(
        how=how,
        tokenizer=tokenizer,
        rows=rows,
        adapter={key: value for key, value in adapter(settings).items() if key != "task_type"},
        arguments=_arguments(settings),
        steps=settings.steps,
        seed=settings.seed,
        sequence_length=settings.length,
    )
    made: list[Any] = []

    def make(view: Any, output: Path, callbacks: Any) -> Any:
        trainer = branch(view, output, callbacks)
        recorder.attach(trainer)
        made.append(trainer)
        return trainer

    tokens = sum(map(len, rows["input_ids"]))
    # As a run chooses them: `trl-best` has the same kernels wherever their package is installed.
    kernels = choose_kernels(AUTO, base, device())
    job = BranchJob(
        "branch", key="benchmark", steps=settings.steps, tokens=tokens, base_name=settings.base, kernels=kernels
    )
    train_branch(
        load_model(base, how), job, folder / "branch", make, on_step=lambda step, loss: None, stop=StopRequest()
    )
    return effective(made[0], packed_by="TRL", use_liger_kernel=kernels == "liger")


def _arguments(settings: Settings) -> dict[str, Any]:
    """What a run gives its branches for these settings."""
    from bam_lora.recipe_training import Training

    return Training(
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        optim=settings.optimizer,
        checkpointing=settings.checkpointing,
        **SCHEDULE,
    ).sft_arguments()


def packed_rows(settings: Settings, tokenizer: Any) -> Any:
    """The rows that TRL trains on: tokens with EOS, packed by its own function."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    tokens = [_ended(tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in settings.texts()]
    return pack_dataset(Dataset.from_dict({"input_ids": tokens}), settings.length, "bfd_split")


def _ended(ids: list[int], eos: int) -> list[int]:
    return ids if ids and ids[-1] == eos else [*ids, eos]
