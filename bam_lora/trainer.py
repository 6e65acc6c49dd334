"""`BamTrainer`: Branch-and-Merge for who has a script with TRL's `SFTTrainer`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from bam_lora.bam_config import BamConfig
from bam_lora.errors import UserError
from bam_lora.hub_pins import pinned
from bam_lora.limits import reached
from bam_lora.loop import is_finished, run
from bam_lora.machine import release_memory
from bam_lora.plan import Plan
from bam_lora.quiet import restored_libraries
from bam_lora.recipe import Recipe
from bam_lora.store import read_record
from bam_lora.trainer_branch import TrainerParts, evaluation_trainer, tracker_group
from bam_lora.trainer_data import TrlPreparation, prepared_sets
from bam_lora.trainer_events import log_merged
from bam_lora.trainer_front import TrainerFront, score_figures
from bam_lora.trainer_inputs import (
    check_resume,
    default_arguments,
    default_peft,
    find_processing_class,
    first_folder,
    one_example,
    prepares,
)
from bam_lora.trainer_models import ModelSource, compute_dtype, require_sense
from bam_lora.trainer_recipe import describe_run
from bam_lora.trainer_result import ResultMethods
from bam_lora.trainer_sets import named_sets, read_stream, training_sets
from bam_lora.trainer_slices import TrainerData
from bam_lora.trainer_words import script_words
from bam_lora.views import branch_view


class BamTrainer(ResultMethods):
    """Trains by Branch-and-Merge with the arguments of TRL's `SFTTrainer`.

    Every branch is trained by an `SFTTrainer` (or `trainer_cls`) with these very arguments on its own slice of the
    data; `args.output_dir` is the run directory, which `bam-lora status`, `report`, `compare` and `export` read.
    `max_steps`, `num_train_epochs`, `warmup_steps`, `eval_steps` and `save_steps` are of the whole run: each branch
    has its share. The adapters are trained in fp32.

    Args:
        model: Hub id or folder of the base, or of a finished run; or a loaded model, with its path in `bam.base`.
        args: `SFTConfig` (or what `trainer_cls` takes).
        bam: Slices, branches, merge and replay.
        train_dataset: Examples, as `SFTTrainer` takes them; a stream with `bam.tokens`; or a mapping of several.
        replay_dataset: Examples like the base's own training data, mixed in against forgetting.
        eval_dataset: Examples to score in bits per byte: a mapping such as {"target": ..., "source": ...}, names that
            begin with "source" being what the base knew; and what `args.eval_strategy` evaluates within a branch.
        selection_dataset: The same, for merge weights that are learned or searched.
        processing_class: Tokenizer or processor; None: the base's.
        peft_config: The adapter of each branch; None: LoRA of rank 64 on all linear layers.
        quantization_config: How the base is quantised under the adapters.
        formatting_func: Makes the text of an example.
        callbacks: Trainer callbacks; they also see `on_branch_begin`, `on_branch_end`, `on_merge`, `on_fold` and
            `on_iteration_end`.
        data_collator: As for `SFTTrainer`.
        trainer_cls: A TRL trainer class for the branches; None: `SFTTrainer`.
        **others: Further keyword arguments of that class.

    Raises:
        UserError: If something is missing or does not fit together.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        bam: BamConfig | Mapping[str, Any] | None = None,
        *,
        train_dataset: Any = None,
        replay_dataset: Any = None,
        eval_dataset: Any = None,
        selection_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
        callbacks: list[Any] | None = None,
        data_collator: Any = None,
        trainer_cls: Any = None,
        **others: Any,
    ) -> None:
        from trl import SFTTrainer

        self.bam = BamConfig.of(bam)
        self.args = default_arguments(args, model, trainer_cls)
        require_sense(self.args, others, trainer_cls or SFTTrainer)
        if train_dataset is None:
            raise UserError.of("train_dataset", expected="a data set", found="none", remedy="Pass one")
        self._model = ModelSource.of(model, self.args, quantization_config, self.bam.base)
        self._trainer_cls = trainer_cls or SFTTrainer
        with pinned(self.directory.hub, enter=False):  # what a run began with
            self.processing_class = find_processing_class(processing_class, self._model)
        self.peft_config = default_peft(peft_config)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks or []]
        self.state = TrainerState()
        self._loaded: tuple[Path, Any] | None = None
        self._sets = training_sets(train_dataset, "target", self.bam.tokens)
        self._sets += training_sets(replay_dataset, "replay", self.bam.tokens)
        self._formatting = formatting_func
        how = getattr(self.args, "dataset_text_field", "text"), formatting_func
        self._evaluation = named_sets(eval_dataset, "eval_dataset", self.bam.documents, *how)
        self._selection = named_sets(selection_dataset, "selection_dataset", None, *how)
        self._others = {**others, **({"data_collator": data_collator} if data_collator is not None else {})}
        self._how = self._model.training_load(compute_dtype(self.args))
        self._preparation = self._trl_preparation()
        self.recipe = self._recipe()

    def _trl_preparation(self) -> TrlPreparation | None:
        if not prepares(self._trainer_cls, self.args, self.processing_class, self._others):
            return None
        return TrlPreparation(self.args, self.processing_class, self._formatting)

    def _recipe(self) -> Recipe:
        return describe_run(
            model=self._model,
            how=self._how,
            args=self.args,
            peft=self.peft_config,
            bam=self.bam,
            trainer=self._trainer_cls.__name__,
            processing=self.processing_class,
            formatting=self._formatting,
            target=[one for one in self._sets if one.role == "target"],
            replay=[one for one in self._sets if one.role == "replay"],
            evaluation=[one for one in self._evaluation if one.mode is not None],  # of others the loss is all there is
            selection=self._selection,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Trains, merges and folds until the slices are used up, or goes on with what the run directory holds.

        Args:
            resume_from_checkpoint: None: go on with what is there, if anything; True: something must be there; False:
                nothing may be; a path: the run directory.

        Returns:
            Steps, mean training loss, and metrics: the result's bits per byte, run time.

        Raises:
            UserError: If anything the user can put right is wrong.
            Interrupted: After Ctrl-C or SIGTERM; calling it again goes on.
        """
        check_resume(self.directory, resume_from_checkpoint)
        front = self._front()
        self.state.log_history, self.state.global_step = [], 0
        self._loaded = None  # its memory is wanted
        with restored_libraries(), script_words(), tracker_group(self.args), self._model.lent():
            report = run(self.recipe, self.args.output_dir, front=front)
            self._log_run(front)
        if self.args.push_to_hub:
            self.push_to_hub()
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        metrics = {**(front.points[-1][1] if front.points else {}), "train_runtime": report["cost"]["wall_seconds"]}
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        return TrainOutput(self.state.global_step, sum(losses) / len(losses) if losses else float("nan"), metrics)

    def _log_run(self, front: TrainerFront) -> None:
        """State and trackers of the whole run."""
        plan = self._plan()
        if not front.points:  # the run was finished before: no iteration has come by
            self._take_up(front, plan)
        self.state.max_steps = sum(branch.steps for branch in plan.all_branches())
        self.state.epoch = self.args.num_train_epochs
        base = score_figures(read_record(self.directory.iteration(0) / "eval.json"))
        log_merged(self.args, None, [(0, base), *front.points] if base else [], self.directory.root)

    def _front(self) -> TrainerFront:
        parts = self._parts(self._branch_evaluation())
        data = TrainerData(self._sets, self.recipe, self._preparation)
        sets = [*self._evaluation, *self._selection]
        return TrainerFront(self.recipe, self._model, self._how, parts, data, sets, self._formatting, self.state)

    def _parts(self, evaluation: Any) -> TrainerParts:
        prepared = self._preparation is not None
        raw = {} if prepared or self._formatting is None else {"formatting_func": self._formatting}
        return TrainerParts(
            self._trainer_cls, self.args, self.processing_class, self.peft_config, self.callbacks, prepared,
            evaluation, {**self._others, **raw},
        )  # fmt: skip

    def _branch_evaluation(self) -> Any:
        """The evaluation sets as a branch's trainer takes them; None if it is not to evaluate."""
        if self.args.eval_strategy == "no" or not self._evaluation:
            return None
        return prepared_sets(self._preparation, self._evaluated())

    def _evaluated(self) -> Any:
        """What is evaluated by its loss: the set that was given alone (`eval_loss`), or the sets by name."""
        if not isinstance(self.eval_dataset, Mapping):
            return self._evaluation[0].rows if self._evaluation else None
        return {one.name: one.rows for one in self._evaluation}

    def _take_up(self, front: TrainerFront, plan: Plan) -> None:
        """Log and scores of a run that was finished before."""
        tokens = 0
        for iteration in plan.iterations:
            for branch in iteration.branches:
                front.branch_found(branch, self.directory.branch(branch.iteration, branch.branch))
                tokens += branch.tokens
            path = self.directory.iteration(iteration.iteration) / "eval.json"
            front.iteration_end(iteration.iteration, tokens, read_record(path))

    def _plan(self) -> Plan:
        record = read_record(self.directory.plan)
        assert record is not None
        return reached(self.directory.root, Plan.from_json(record))

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Evaluates the run's result (before training: the base) as the trainer class does, and in bits per byte.

        Args:
            eval_dataset: Other examples than the trainer was made with; they get no bits per byte.
            metric_key_prefix: First part of the metrics' names.

        Returns:
            The trainer class's metrics; for the trainer's own sets also `eval_target_bits_per_byte` and so on.

        Raises:
            UserError: If there are no examples.
        """
        sets = self._evaluated() if eval_dataset is None else eval_dataset
        if not sets:
            raise UserError.of("eval_dataset", expected="examples", found="none", remedy="Pass some")
        named = sets if isinstance(sets, Mapping) else {"": sets}
        held = {name: read_stream(rows) for name, rows in named.items()}
        with tempfile.TemporaryDirectory() as folder, self._model.lent():
            parts = self._parts(prepared_sets(self._preparation, held if isinstance(sets, Mapping) else held[""]))
            place, model = self._load()
            trainer = evaluation_trainer(parts, branch_view(model), Path(folder), one_example(self._sets[0].rows))
            metrics = dict(trainer.evaluate(metric_key_prefix=metric_key_prefix))
        if eval_dataset is None:
            done = len(self._plan().iterations) if place == self.directory.model else 0
            scores = score_figures(read_record(self.directory.iteration(done) / "eval.json"))
            metrics |= {name.replace("eval", metric_key_prefix, 1): value for name, value in scores.items()}
        return metrics

    @property
    def model(self) -> Any:
        """The run's result, loaded as the base is; before training, the base."""
        return self._load()[1]

    def _load(self) -> tuple[Path, Any]:
        """The folder of that model, and the model."""
        with pinned(self.directory.hub, enter=False):
            folder = self.directory.model if is_finished(self.directory) else first_folder(self._model)
        if self._loaded is None or self._loaded[0] != folder:
            self._loaded = None
            release_memory()  # the one before goes first: there may be room for one
            own = self._model.instance is not None and folder != self.directory.model
            self._loaded = (folder, self._model.first() if own else self._model.load(folder, self._how))
        return self._loaded

    def add_callback(self, callback: Any) -> None:
        """Adds a callback, an instance or a class, for the branches still to be trained."""
        self.callbacks.append(callback() if isinstance(callback, type) else callback)
