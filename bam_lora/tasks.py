"""Benchmarks by lm-evaluation-harness, on a model that is loaded already.

Only this module, `task_model` and `task_quiet` import the harness. What is used of it: `TaskManager`, its `load` and
`all_tasks`; `HFLM` around a loaded model; `simple_evaluate`, and of its results what `task_results` reads; and, to keep
task files in a sandbox and the harness quiet, the names that `task_quiet` replaces. tests/test_task_files.py notices
when one of them is gone.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib.util
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bam_lora.errors import UserError, first_line
from bam_lora.gpu_memory import room_for
from bam_lora.recipe_paths import is_task_file
from bam_lora.store import digest
from bam_lora.task_files import read_task_file
from bam_lora.task_model import harness_model, own_randomness
from bam_lora.task_quiet import quiet_harness, sandboxed_templates
from bam_lora.task_results import TaskScores, read_results

_LESS = "Close what else uses the card, or lower the task's batch_size, which may be set on the way: the run goes on"


@dataclass(frozen=True)
class TaskSpec:
    """A benchmark as the user asks for it; see `recipe_tasks.EvaluationTask`."""

    task: str
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    role: str | None = None

    def wanted(self) -> dict[str, Any]:
        """What of it decides the score, as the recipe says it."""
        return {"task": self.task, "num_fewshot": self.num_fewshot, "limit": self.limit}


@dataclass(frozen=True)
class FoundTask:
    """A benchmark that is found: its name, what the harness is asked for, and what its scores are a function of."""

    spec: TaskSpec
    name: str
    request: str | dict[str, Any]
    content: list[Any]

    @property
    def local(self) -> bool:
        """Whether it is a file of the user's own."""
        return not isinstance(self.request, str)

    def key(self, model: str, how: dict[str, Any], template: str | None) -> str:
        """Hash of all that a score is a function of.

        Args:
            model: Hash of the model's weights and tokenizer.
            how: How it is held.
            template: Hash of its chat template, if prompts go through it.
        """
        own = {**self.spec.wanted(), "task": self.content}
        return digest(["task", own, harness_version(), how, template, model])


def harness_version() -> str:
    """Version of the harness.

    Raises:
        UserError: If it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError.of(
            "tasks", expected="the package lm-eval (EleutherAI's harness)", found="none installed",
            remedy="pip install 'bam-lora[eval]'",
        )  # fmt: skip
    return metadata.version("lm_eval")


def find_tasks(specs: Sequence[TaskSpec]) -> list[FoundTask]:
    """Finds benchmarks: files are read, names are taken as they are (`require_known` checks them).

    Raises:
        UserError: If the harness is not installed, a file is not as it should be, or one is named twice.
    """
    harness_version()
    found = [_find(spec) for spec in specs]
    seen: dict[Any, FoundTask] = {}
    for one in found:
        same = (one.name, one.spec.num_fewshot, one.spec.limit)
        if same in seen:
            raise UserError.of(
                f"task {one.name!r}", expected="each task once with the same num_fewshot and limit", found="two",
                remedy="Drop one of them, or give it another name",
            )  # fmt: skip
        seen[same] = one
    return found


def _find(spec: TaskSpec) -> FoundTask:
    if not is_task_file(spec.task):
        return FoundTask(spec, spec.task, spec.task, [spec.task])
    local = read_task_file(Path(spec.task))
    config = local.config if spec.num_fewshot is None else {**local.config, "num_fewshot": spec.num_fewshot}
    return FoundTask(spec, local.name, config, local.content)


@functools.cache
def _all_tasks() -> Any:
    """The harness's own tasks: reading the thousands of files takes seconds, so once a process."""
    from lm_eval.tasks import TaskManager

    with quiet_harness():
        return TaskManager()


def _manager(found: FoundTask) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False) if found.local else _all_tasks()


def require_known(found: FoundTask) -> None:
    """Checks that the harness has a task of this name.

    Raises:
        UserError: With names that are near, if there is none.
    """
    if found.local or found.name in (names := _all_tasks().all_tasks):
        return
    near = _nearest(found.name, names)
    remedy = f"Nearest: {', '.join(near)}" if near else "`lm-eval ls tasks` lists them; a file ends in .yaml"
    raise UserError.of(
        f"task {found.name!r}",
        expected="a name of the harness or a task file",
        found=f"no such task in lm-eval {harness_version()}",
        remedy=remedy,
    )


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    """Names like this one; first those that share its rare parts, such as the language in `belebele_bul_Latn`."""
    counts = Counter(part for one in names for part in one.lower().split("_"))
    parts = set(name.lower().split("_"))

    def rarity(one: str) -> float:
        return sum(1 / counts[part] for part in parts.intersection(one.lower().split("_")))

    alike = difflib.get_close_matches(name, names, n=300, cutoff=0.6)  # the likest first, which sorting keeps
    return sorted(alike, key=rarity, reverse=True)[:3]


def describe_task(found: FoundTask) -> str:
    """Loads the data of a benchmark (fetching them if they are on the Hub and not in the cache) and says what it is.

    Raises:
        UserError: If there is no such task, its data cannot be had, or it fixes another number of examples.
    """
    require_known(found)
    with _loaded(found) as request:
        tasks = list(_load(found, request)["tasks"].values())
        counts = [len(task.eval_docs) for task in tasks]
        used = sum(min(count, found.spec.limit or count) for count in counts)
        shots = sorted({_shots(found, task.config.num_fewshot) for task in tasks})
        kinds = sorted({str(task.config.output_type) for task in tasks})
    several = f" in {len(tasks)} tasks" if len(tasks) > 1 else ""
    of = f" of {sum(counts):,}" if used < sum(counts) else ""
    shown = "/".join(map(str, shots))
    return f"{found.name}: {used:,}{of} documents{several}, {shown}-shot, {', '.join(kinds)}"


def _shots(found: FoundTask, configured: int | None) -> int:
    """How many examples a task is asked with. The harness does not change a 0 that a task sets for itself."""
    wanted = found.spec.num_fewshot
    if wanted is None or wanted == configured:
        return configured or 0
    if configured == 0 and not found.local:
        raise UserError.of(
            f"num_fewshot of task {found.name!r}", expected="0, which this task sets for itself", found=str(wanted),
            remedy="Leave it out, or copy the task into a file of your own",
        )  # fmt: skip
    return wanted


def score_task(
    model: Any, tokenizer: Any, found: FoundTask, *, batch_size: int, dtype: str, chat: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> TaskScores:  # fmt: skip
    """Scores a loaded model on one benchmark.

    Args:
        model: A causal language model, as it is held for scoring; it is not changed.
        tokenizer: Its tokenizer; a copy is used.
        found: The benchmark.
        batch_size: Prompts at once at the most; fewer where their logits would take too much memory.
        dtype: What activations are computed in: bfloat16, float16 or float32.
        chat: Put the prompts through the tokenizer's chat template.
        on_progress: Called with the prompts done and their number, after every batch.

    Returns:
        What `task_results.read_results` makes of it.

    Raises:
        UserError: If the task, its data or something that it needs is missing, or its template is not harmless.
    """
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate

    require_known(found)
    started = time.monotonic()
    with own_randomness(), room_for(f"task {found.name!r}", _LESS), _loaded(found) as request:
        loaded = _load(found, request)
        for task in loaded["tasks"].values():
            _shots(found, task.config.num_fewshot)
        group = loaded.get("groups", {}).get(found.name)
        lm = harness_model(model, tokenizer, found.spec.batch_size or batch_size, dtype, on_progress)
        try:
            results = simple_evaluate(
                model=lm, tasks=[group] if group is not None else list(loaded["tasks"].values()),
                num_fewshot=None if found.local else found.spec.num_fewshot, limit=found.spec.limit, log_samples=True,
                apply_chat_template=chat, task_manager=_manager(found),
            )  # fmt: skip
        except (  # the harness checks data by assertions
            AssertionError, ValueError, KeyError, ImportError, OSError, TemplateError,
        ) as error:  # fmt: skip
            raise _cannot(found, error) from error
    return read_results(
        results, name=found.name, limit=found.spec.limit, harness=harness_version(), truncated=lm.truncated,
        seconds=time.monotonic() - started,
    )  # fmt: skip


def _require_own_metrics(found: FoundTask) -> None:
    """Refuses metrics that the harness does not have: it would fetch and run what is on the Hub under that name."""
    import lm_eval.api.metrics  # noqa: F401 (fills the registry)
    from lm_eval.api.registry import metric_registry

    assert isinstance(found.request, dict)
    for entry in found.request.get("metric_list") or []:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if name not in metric_registry:
            near = difflib.get_close_matches(str(name), list(metric_registry), n=3)
            raise UserError.of(
                f"task file {found.spec.task}, metric {name!r}",
                expected="a metric of lm-eval's own",
                found="none of that name",
                remedy=f"Use {' or '.join(near or ['acc', 'acc_norm', 'exact_match'])}",
            )


def _load(found: FoundTask, request: Any) -> Any:
    try:
        return _manager(found).load([copy.deepcopy(request)])
    except Exception as error:  # whatever the data sets' library, the network or the templates call it
        raise _cannot(found, error) from error


def _cannot(found: FoundTask, error: Exception) -> UserError:
    from huggingface_hub.constants import is_offline_mode

    remedy = (
        "Check the task file and its data" if found.local else "Check the network and your access (`hf auth login`)"
    )
    if isinstance(error, ImportError):
        remedy = "Install what it asks for"
    elif is_offline_mode() and not found.local:
        remedy = "Its data are not in the cache: run `bam-lora check` once online (without HF_HUB_OFFLINE)"
    return UserError.of(
        f"task {found.name!r}", expected="one that can be done",
        found=f"{type(error).__name__}: {first_line(error).rstrip('.')}", remedy=remedy,
    )  # fmt: skip


@contextlib.contextmanager
def _loaded(found: FoundTask) -> Iterator[Any]:
    """What to ask the harness for, its messages off the screen; a task file's templates sandboxed, its data apart."""
    with quiet_harness(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        if isinstance(found.request, str):
            yield found.request
            return
        _require_own_metrics(found)
        kwargs = dict(found.request.get("dataset_kwargs") or {})
        if "data_files" in kwargs:  # else what was made of a file that has changed since could be found again
            kwargs["cache_dir"] = cache
        with sandboxed_templates():
            yield {**found.request, "dataset_kwargs": kwargs}
