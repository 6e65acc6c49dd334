"""The harness without its messages, its bars and the reach of its templates."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def sandboxed_templates() -> Iterator[None]:
    """Renders the harness's templates where they cannot reach into Python: a task file may be somebody else's."""
    import lm_eval.utils as utils
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    before = utils.env
    sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=before.keep_trailing_newline)
    sandbox.filters.update(before.filters)
    utils.env = sandbox
    try:
        yield
    finally:
        utils.env = before


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """The harness without its log and its bars: what matters of it is said by ours.

    Nor does it look at the machine and for a git checkout: that takes seconds, prints, and is not kept.
    """
    import datasets
    import lm_eval.api.task as harness_task
    import lm_eval.evaluator as evaluator

    log, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level = log.level
    changed: list[tuple[Any, str, Any]] = [(harness_task, "tqdm", functools.partial(harness_task.tqdm, disable=True))]
    changed += [(evaluator, name, lambda *_: None) for name in ("get_git_commit_hash", "add_env_info")]
    before = [(module, name, getattr(module, name)) for module, name, _ in changed]
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    for module, name, own in changed:
        setattr(module, name, own)
    try:
        yield
    finally:
        for module, name, found in before:
            setattr(module, name, found)
        log.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
