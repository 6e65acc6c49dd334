"""The harness without its messages, its bars and the reach of its templates."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator


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
    """The harness without its log and its bars: what matters of it is said by ours."""
    import datasets
    import lm_eval.api.task as harness_task

    log, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level, tqdm = log.level, harness_task.tqdm
    log.setLevel(logging.CRITICAL)
    harness_task.tqdm = functools.partial(tqdm, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        harness_task.tqdm = tqdm
        if not bars:
            datasets.enable_progress_bars()
