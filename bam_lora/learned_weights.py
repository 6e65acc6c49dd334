"""Learned merge weights: the weights of the delta average, trained on a little text with the deltas frozen.

Averaging treats all of a branch's delta alike, yet some of it carries what was learned and some of it only damage. Here
every branch's delta is split into its singular directions, these are put into a few groups per weight, and each group
gets one number c: ΔW = Σ_k Σ_g c_kg · U_kg S_kg V_kgᵀ. Only the numbers are trained, for a few steps of Adam on
target + μ · source bits per byte of a selection set, on the quantised base that the branches were trained on.
Relatives: learned anisotropic scaling of task vectors (aTLAS, arXiv 2407.02880), AdaMerging (arXiv 2310.02575).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from bam_lora.adapters import Factors
from bam_lora.coefficients import Coefficients
from bam_lora.directions import TrainableDelta
from bam_lora.errors import UserError
from bam_lora.evaluate import Window, pad_windows
from bam_lora.selection import ROLES, SelectionWindows
from bam_lora.views import assert_not_repacked, branch_view

_CHECKS = 4  # looks at what is held out, after the one at the start
CHECKING = 0.25  # share of the budget for them
# float16 gradients of a loss per byte would underflow; to Adam a constant factor is nothing.
_SCALE = {"float16": 4096.0}
# Every new shape of a batch costs the backend kernels and memory of its own, so there are few.
_MULTIPLE = 64
# A branch's loss never holds all of a batch's logits, so there may be no room for them: what they may take at most, for
# each of them (themselves, a copy, the gradient in 16 bits), and in fp32.
_LOGITS_BYTES, _LOGIT_BYTES, CHUNK_BYTES = 1 << 30, 6, 1 << 26
_FEWEST_STEPS = 8  # below which a step sees fewer windows


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How windows are scored: those that make `batch_tokens` with their padding at once, in `dtype`.

    `source_weight` is μ of the objective, `longest` the tokens of the longest window.
    """

    source_weight: float
    batch_tokens: int
    dtype: str
    longest: int = 0  # found once the windows are known


@dataclass(frozen=True, kw_only=True)
class LearningSettings(Scoring):
    """How the weights are learned.

    `windows` counts selection windows per role and step. `tokens` is about what all of it may cost, a forward pass
    alone counted as a third.
    """

    groups: int
    steps: int
    windows: int
    learning_rate: float
    tokens: int
    seed: int
    checkpointing: bool


@dataclass(frozen=True)
class LearnedWeights:
    """What was learned.

    `groups` are the coefficients by weight name, [branches][groups], None for a branch without a delta. `history` holds
    held-out bits per byte: [{"step", "target", "source", "objective"}]; entry `best` is the one that was kept.
    """

    coefficients: dict[str, Coefficients]
    groups: dict[str, list[list[float] | None]]
    history: list[dict[str, float]]
    best: int
    settings: LearningSettings

    def record(self) -> dict[str, Any]:
        """What `merge.json` keeps of it."""
        return {
            "source_weight": self.settings.source_weight,
            "groups": self.settings.groups,
            "steps": self.settings.steps,
            "windows": self.settings.windows,
            "best_step": self.history[self.best]["step"],
            "selection": self.history,
            "coefficients": self.groups,
        }


def learn_weights(
    model: Any,
    branches: Mapping[str, Sequence[Factors | None]],
    start: Sequence[float],
    selection: SelectionWindows,
    settings: LearningSettings,
    *,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> LearnedWeights:
    """Trains the coefficients and keeps those that are best on the held-out windows.

    Args:
        model: The frozen base that the branches were trained on; it is left as it was.
        branches: Factors of each branch by weight name; a name is that of a linear module, plus ".weight".
        start: (K,) weights to start from.
        selection: Windows of both roles.
        settings: See there.
        on_step: Called with the step that begins and the number of steps.

    Raises:
        UserError: If the loss is not finite.
    """
    settings, selection = _within_budget(settings, selection)
    settings = replace(settings, batch_tokens=fitting_tokens(model, settings.batch_tokens))
    view = branch_view(model)
    if settings.checkpointing:
        view.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        view.train()  # without it nothing is recomputed; frozen layers have nothing else to train
    dtype = getattr(torch, settings.dtype)
    deltas = {
        name: TrainableDelta(factors, start, settings.groups, dtype, model.device) for name, factors in branches.items()
    }
    parameters = [parameter for delta in deltas.values() for parameter in delta.coefficients]
    with added_deltas(view, deltas):
        history, best = _descend(view, parameters, selection, settings, on_step)
    assert_not_repacked(view)
    coefficients = {name: delta.resolved() for name, delta in deltas.items()}
    return LearnedWeights(
        coefficients, {name: delta.values() for name, delta in deltas.items()}, history, best, settings
    )


def _within_budget(
    settings: LearningSettings, selection: SelectionWindows
) -> tuple[LearningSettings, SelectionWindows]:
    """Fewer steps, then smaller ones, and fewer held-out windows, so that all of it costs about `settings.tokens`."""
    for_checks = settings.tokens * CHECKING / (_CHECKS + 1) * 3 / len(ROLES)
    held_out = {role: first_windows(windows, for_checks) for role, windows in selection.held_out.items()}
    pair = sum(_mean_length(windows) for windows in selection.train.values())
    pairs = settings.tokens * (1 - CHECKING) / pair
    windows = min(settings.windows, max(1, int(pairs / _FEWEST_STEPS)))
    steps = min(settings.steps, max(_FEWEST_STEPS, int(pairs / windows)))
    parts = (*selection.train.values(), *selection.held_out.values())
    longest = max(window.length for part in parts for window in part)
    fitting = LearningSettings(**{**vars(settings), "windows": windows, "steps": steps, "longest": longest})
    return fitting, SelectionWindows(selection.train, held_out)


def first_windows(windows: Sequence[Window], tokens: float) -> Sequence[Window]:
    """The first windows that make about so many tokens, at least one."""
    total, count = 0, 0
    while count < len(windows) and (count == 0 or total + windows[count].length <= tokens):
        total += windows[count].length
        count += 1
    return windows[:count]


def _mean_length(windows: Sequence[Window]) -> float:
    return sum(window.length for window in windows) / len(windows)


@contextlib.contextmanager
def added_deltas(view: Any, deltas: Mapping[str, TrainableDelta]) -> Iterator[None]:
    """The model with the deltas added to its linear modules, for as long as this lasts."""
    handles = [
        view.get_submodule(name.removesuffix(".weight")).register_forward_hook(delta) for name, delta in deltas.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _descend(
    view: Any,
    parameters: Sequence[torch.Tensor],
    selection: SelectionWindows,
    settings: LearningSettings,
    on_step: Callable[[int, int], None],
) -> tuple[list[dict[str, float]], int]:
    """Adam with a linearly falling rate; looks now and then at what is held out and puts the best back at the end."""
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, betas=(0.9, 0.95))
    draws = {role: _draw(windows, settings, role) for role, windows in selection.train.items()}
    looks = {max(1, round(settings.steps * (i + 1) / _CHECKS)) for i in range(_CHECKS)}
    history = [{"step": 0, **score_roles(view, selection.held_out, settings)}]
    best, kept = 0, [parameter.detach().clone() for parameter in parameters]
    for step in range(1, settings.steps + 1):
        on_step(step, settings.steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - (step - 1) / settings.steps)
        for role, weight in zip(ROLES, (1.0, settings.source_weight), strict=True):
            _backward(view, next(draws[role]), weight, settings)
        optimizer.step()
        optimizer.zero_grad()
        if step in looks:
            history.append({"step": step, **score_roles(view, selection.held_out, settings)})
            if history[-1]["objective"] < history[best]["objective"]:
                best, kept = len(history) - 1, [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return history, best


def _draw(windows: Sequence[Window], settings: LearningSettings, role: str) -> Iterator[list[Window]]:
    """Windows for one step after the other, every one once before any comes again."""
    random = np.random.default_rng([settings.seed, ROLES.index(role), 1])
    queue: list[int] = []
    while True:
        while len(queue) < settings.windows:
            queue += random.permutation(len(windows)).tolist()
        yield [windows[i] for i in queue[: settings.windows]]
        queue = queue[settings.windows :]


def _backward(view: Any, windows: Sequence[Window], weight: float, settings: LearningSettings) -> None:
    """Adds the gradient of weight · bits per byte over the windows."""
    size = sum(window.size_bytes for window in windows)
    for rows in _batches(windows, settings):
        bits = _bits(view, rows, settings)
        if not bool(torch.isfinite(bits)):
            raise UserError.of(
                "learning the merge weights",
                expected="a finite loss",
                found="NaN or infinity",
                remedy="Lower bam.merge.learned.learning_rate",
            )
        (_SCALE.get(settings.dtype, 1.0) * weight * bits / size).backward()


def score_roles(view: Any, text: Mapping[str, Sequence[Window]], settings: Scoring) -> dict[str, float]:
    """Bits per byte of a model on windows by role, and target + μ · source: {"target", "source", "objective"}."""
    values = {}
    with torch.no_grad():
        for role, windows in text.items():
            bits = sum(float(_bits(view, rows, settings)) for rows in _batches(windows, settings))
            values[role] = bits / sum(window.size_bytes for window in windows)
    return {**values, "objective": values["target"] + settings.source_weight * values["source"]}


def _padded(length: int, longest: int) -> int:
    """What the longest window of a batch is padded to; never more than the longest window of all, which fits."""
    return min(longest, -(-length // _MULTIPLE) * _MULTIPLE)


def _batches(windows: Sequence[Window], settings: Scoring) -> Iterator[Sequence[Window]]:
    """Windows of like length together, the longest first, at most so many tokens with their padding, at least one."""
    rows: list[Window] = []
    for window in sorted(windows, key=lambda window: -window.length):
        if rows and (len(rows) + 1) * _padded(rows[0].length, settings.longest) > settings.batch_tokens:
            yield rows
            rows = []
        rows.append(window)
    yield rows


def _bits(view: Any, rows: Sequence[Window], settings: Scoring) -> torch.Tensor:
    """Bits of the scored tokens of a batch of windows."""
    ids, mask = pad_windows(rows, 0, _padded(rows[0].length, settings.longest))
    labels = torch.full_like(ids, -100)
    for row, window in enumerate(rows):
        labels[row, len(window.context) : window.length] = torch.tensor(window.scored)
    where = view.device
    with torch.autocast(where.type, dtype=getattr(torch, settings.dtype), enabled=settings.dtype != "float32"):
        logits = view(input_ids=ids.to(where), attention_mask=mask.to(where), use_cache=False).logits
    return _nats(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(where)) / math.log(2)


def _nats(logits_tv: torch.Tensor, labels_t: torch.Tensor) -> torch.Tensor:
    """The sum of the losses; in fp32 are only the logits of some tokens at a time, in the backward pass too."""
    step = max(1, CHUNK_BYTES // (4 * logits_tv.shape[1]))
    if len(labels_t) <= step:
        return _cross_entropy(logits_tv, labels_t)
    parts = zip(logits_tv.split(step), labels_t.split(step), strict=True)
    chunks = [checkpoint(_cross_entropy, logits, labels, use_reentrant=False) for logits, labels in parts]
    return torch.stack(chunks).sum()


def _cross_entropy(logits_tv: torch.Tensor, labels_t: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits_tv.float(), labels_t, ignore_index=-100, reduction="sum")


def fitting_tokens(model: Any, batch_tokens: int) -> int:
    """How many tokens of a batch have logits that fit: so many, or fewer with a large vocabulary."""
    return fitting(int(model.config.get_text_config().vocab_size), batch_tokens)


def fitting(vocabulary: int, batch_tokens: int) -> int:
    """The same for a vocabulary of so many tokens."""
    return min(batch_tokens, max(1, _LOGITS_BYTES // (_LOGIT_BYTES * vocabulary)))
