"""Checks across a recipe's fields: what each value alone cannot show.

Every rule takes whole sections, and runs if those sections are right in themselves, so that one mistake is reported
once and others are not hidden by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from bam_lora import recipe_chat
from bam_lora.recipe_values import Finding

if TYPE_CHECKING:
    from bam_lora.recipe_lora import Lora
    from bam_lora.recipe_models import Bam, Data, Evaluation, Selection
    from bam_lora.recipe_sources import EvaluationSource, Source
    from bam_lora.recipe_training import Quantization
    from bam_lora.recipe_vocabulary import Vocabulary

SELECTED = ("learned", "search")  # merge weights that the selection sets choose
# Those whose merged delta stays in the span of the branches' factors, with one number a branch.
LOW_RANK_METHODS = ("linear", "slerp", "karcher", "model_stock")


def _revision(base: str, revision: str | None) -> list[Finding]:
    if revision is not None and PurePath(base).is_absolute():
        return [(("revision",), "only a base on the Hub has revisions; leave it out for a folder")]
    return []


def _replay(data: Data) -> list[Finding]:
    if data.replay and data.replay_share == 0:
        message = "expected a share above 0, since there is replay data, found 0; say how much, such as 0.2"
        return [(("data", "replay_share"), message)]
    if data.replay_share > 0 and not data.replay:
        message = (
            f"expected replay data for a share of {data.replay_share}, found none; name some, or set the share to 0"
        )
        return [(("data", "replay"), message)]
    return []


def _sources(data: Data) -> list[Finding]:
    findings: list[Finding] = []
    for role, sources in (("target", data.target), ("replay", data.replay)):
        findings += _local_revisions(("data", role), sources)
        unweighted = [number for number, source in enumerate(sources) if source.weight is None]
        if 0 < len(unweighted) < len(sources):
            message = "expected a weight, since others in this list have one, found none; weigh all of them or none"
            findings.append((("data", role, unweighted[0], "weight"), message))
    return findings


def _slicing(data: Data) -> list[Finding]:
    place = ("data", "slicing_column")
    if data.slicing == "by_column" and data.slicing_column is None:
        return [(place, "expected the column to slice by, found none; name it, such as language")]
    if data.slicing != "by_column" and data.slicing_column is not None:
        message = f"expected none, since slicing is {data.slicing}, found {data.slicing_column!r}"
        return [(place, f"{message}; say `slicing: by_column`, or leave it out")]
    return []


def _filters(data: Data) -> list[Finding]:
    places: list[tuple[tuple[str | int, ...], Any]] = [(("data", "filters"), data.filters)]
    for role, sources in (("target", data.target), ("replay", data.replay)):
        places += [(("data", role, number, "filters"), source.filters) for number, source in enumerate(sources)]
    findings: list[Finding] = []
    for place, filters in places:
        for unit in ("characters", "words") if filters is not None else ():
            least, most = getattr(filters, f"min_{unit}"), getattr(filters, f"max_{unit}")
            if least is not None and most is not None and least > most:
                message = f"expected at least min_{unit} ({least}), found {most}; no document could pass"
                findings.append(((*place, f"max_{unit}"), message))
    return findings


def _local_revisions(place: tuple[str, str], sources: Sequence[Source | EvaluationSource]) -> list[Finding]:
    message = "only data on the Hub has revisions; leave it out for files"
    return [
        ((*place, number, "revision"), message)
        for number, source in enumerate(sources)
        if source.revision is not None and PurePath(source.path).is_absolute()
    ]


def _bam(strategy: str, bam: Bam) -> list[Finding]:
    findings: list[Finding] = []
    if bam.merge.weights in SELECTED and bam.merge.method != "linear":
        how = "learned" if bam.merge.weights == "learned" else "searched"
        message = f"expected linear, since its weights are {how}, found {bam.merge.method}"
        findings.append((("bam", "merge", "method"), message))
    if bam.merge.method == "breadcrumbs" and bam.merge.density + bam.merge.gamma > 1 + 1e-9:
        message = f"expected at most {1 - bam.merge.gamma:g}, as gamma drops the rest, found {bam.merge.density:g}"
        findings.append((("bam", "merge", "density"), message))
    findings += _module_weights(strategy, bam) + _outer(bam)
    if strategy != "bam":
        return findings
    if bam.slices < bam.branches:
        message = f"expected at least as many slices as branches ({bam.branches}), found {bam.slices}"
        findings.append((("bam", "slices"), message))
    weights = bam.merge.weights
    if isinstance(weights, list) and len(weights) != bam.branches:
        message = f"expected one weight per branch ({bam.branches}), found {len(weights)}"
        findings.append((("bam", "merge", "weights"), message))
    if bam.merge.method == "slerp" and bam.branches > 2:
        message = f"expected a method for {bam.branches} branches, found slerp, which takes two; use karcher"
        findings.append((("bam", "merge", "method"), message))
    return findings


def _module_weights(strategy: str, bam: Bam) -> list[Finding]:
    merge, place = bam.merge, ("bam", "merge", "weights_by_module")
    if merge.weights_by_module and merge.weights in SELECTED:
        return [(place, f"expected none beside `weights: {merge.weights}`, found some; leave one of the two out")]
    return [
        ((*place, pattern), f"expected one weight per branch ({bam.branches}), found {len(weights)}")
        for pattern, weights in merge.weights_by_module.items()
        if strategy == "bam" and isinstance(weights, list) and len(weights) != bam.branches
    ]


def _outer(bam: Bam) -> list[Finding]:
    if (bam.outer.learning_rate, bam.outer.momentum) == (1, 0):
        return []
    if bam.merge.weights in SELECTED:
        message = (
            f"expected learning_rate 1 and momentum 0, since `weights: {bam.merge.weights}` chooses the step itself, "
            "found others"
        )
        return [(("bam", "outer"), message)]
    if bam.merge.method not in LOW_RANK_METHODS:
        message = f"expected learning_rate 1 and momentum 0, since {bam.merge.method} is not low rank, found others"
        return [(("bam", "outer"), message)]
    return []


def _adapter(bam: Bam, lora: Lora, vocabulary: Vocabulary) -> list[Finding]:
    """What is not low rank is added up, or merged element by element: there are no factors to learn or turn by."""
    beside, merge = lora.beside_factors, bam.merge
    key = f"lora.{beside}" if beside else "vocabulary.tokens"
    if not beside and vocabulary.tokens is None:
        return []
    findings: list[Finding] = []
    for name in ("modules_to_save", "trainable_token_indices") if vocabulary.tokens is not None else ():
        if getattr(lora, name):
            message = (
                "expected none beside vocabulary.tokens, which says what is trained beside the factors, found some"
            )
            findings.append((("lora", name), message))
    if merge.weights in SELECTED and beside:  # rows of tokens are averaged beside what is chosen
        message = f"expected uniform, tokens or a list, since {key} is not low rank, found {merge.weights}"
        findings.append((("bam", "merge", "weights"), message))
    if merge.method in LOW_RANK_METHODS and merge.method != "linear":
        message = f"expected linear or a method by elements, since {key} is not low rank, found {merge.method}"
        findings.append((("bam", "merge", "method"), message))
    if (bam.outer.learning_rate, bam.outer.momentum) != (1, 0):
        message = f"expected learning_rate 1 and momentum 0, since {key} is not low rank, found others"
        findings.append((("bam", "outer"), message))
    return findings


def _initial(lora: Lora, quantization: Quantization) -> list[Finding]:
    if lora.dora and lora.lora_bias:
        return [(("lora", "lora_bias"), "expected false beside lora.dora, which PEFT has without it, found true")]
    if lora.init != "loftq":
        return []
    if quantization.bits != 4:
        message = f"expected default or gaussian, since the base is in {quantization.bits} bits, found loftq"
        return [(("lora", "init"), message)]
    if lora.dora:
        return [(("lora", "init"), "expected default or gaussian beside lora.dora, found loftq")]
    return []


def _evaluation(evaluation: Evaluation) -> list[Finding]:
    findings: list[Finding] = []
    taken: dict[str, str] = {}
    for role, sources in (("target", evaluation.target), ("source", evaluation.source)):
        findings += _local_revisions(("evaluation", role), sources)
        for number, source in enumerate(sources):
            here = f"evaluation.{role}.{number}"
            if source.set in taken:
                message = (
                    f"expected a name of its own, found {source.set!r} like {taken[source.set]}; name it with `set:`"
                )
                findings.append((("evaluation", role, number, "set"), message))
            taken.setdefault(source.set, here)
    window, overlap = evaluation.window_bytes, evaluation.overlap_bytes
    if window is not None and overlap is not None and overlap >= window:
        message = f"expected fewer bytes than the window has ({window}), found {overlap}"
        findings.append((("evaluation", "overlap_bytes"), message))
    return findings


def _selection(bam: Bam, selection: Selection, evaluation: Evaluation) -> list[Finding]:
    findings: list[Finding] = []
    tested = {
        _text_of(source): f"evaluation.{role}.{number}"
        for role, sources in (("target", evaluation.target), ("source", evaluation.source))
        for number, source in enumerate(sources)
    }
    for role, sources in (("target", selection.target), ("source", selection.source)):
        findings += _local_revisions(("selection", role), sources)
        if not sources and bam.merge.weights in SELECTED:
            what = "learn the merge weights on" if bam.merge.weights == "learned" else "search the merge weights by"
            message = f"expected text to {what}, found none; name some that is not in `evaluation`"
            findings.append((("selection", role), message))
        for number, source in enumerate(sources):
            if _text_of(source) in tested:
                message = f"expected text of its own, found that of {tested[_text_of(source)]}; results would flatter"
                findings.append((("selection", role, number, "path"), message))
    return findings


def _text_of(source: EvaluationSource) -> tuple[str | None, ...]:
    return source.path, source.name, source.split, source.revision, source.text


def _max_steps(training: Any) -> list[Finding]:
    if training.max_steps == 0:
        return [(("training", "max_steps"), "expected a number of steps >= 1, or -1 for all the data, found 0")]
    return []


def _vocabulary(data: Data, evaluation: Evaluation, selection: Selection, vocabulary: Vocabulary) -> list[Finding]:
    sections = (data.target, data.replay, evaluation.target, evaluation.source, selection.target, selection.source)
    if vocabulary.tokens is None or all(source.mode != "chat" for listed in sections for source in listed):
        return []
    message = "expected none where there are conversations, found some; grow it in a run on text, and start from that"
    return [(("vocabulary", "tokens"), message)]


RULES: tuple[tuple[tuple[str, ...], Callable[..., list[Finding]]], ...] = (
    (("base", "revision"), _revision),
    (("data",), _replay),
    (("data",), _sources),
    (("data",), _slicing),
    (("mode", "data", "evaluation", "selection"), recipe_chat.check_modes),
    (("data",), _filters),
    (("strategy", "bam"), _bam),
    (("bam", "lora", "vocabulary"), _adapter),
    (("data", "evaluation", "selection", "vocabulary"), _vocabulary),
    (("lora", "quantization"), _initial),
    (("training",), _max_steps),
    (("evaluation",), _evaluation),
    (("bam", "selection", "evaluation"), _selection),
)


def check(sections: Mapping[str, Any]) -> list[Finding]:
    """What does not fit together in a recipe.

    Args:
        sections: Validated top-level values by their key; those with errors of their own are left out.

    Returns:
        The findings, in the order of the recipe's keys.
    """
    findings: list[Finding] = []
    for needed, rule in RULES:
        if all(name in sections for name in needed):
            findings += rule(*(sections[name] for name in needed))
    return findings
