"""A run's change and a chat vector in one model: original base + ledger + w · (instruct - base), rounded once.

The original weights are read once and everything is added to them before rounding, so nothing is lost that a fold of a
fold would lose. Chat vectors: arXiv 2310.04799.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bam_lora.base import find_base, load_tokenizer
from bam_lora.checkpoint import COMPANIONS, CONFIG, INDEX, claim_output, local_folder
from bam_lora.difference import Difference
from bam_lora.errors import UserError
from bam_lora.export import open_merged_run, require_original
from bam_lora.fold_write import ARTEFACT
from bam_lora.folding import Progress, fold_into
from bam_lora.ledger_view import require_factor
from bam_lora.rundir import RunDirectory
from bam_lora.store import digest, verify


def export_with_chat_vector(
    run: str | Path,
    instruct: str | Path,
    output: str | Path,
    *,
    against: str | Path | None = None,
    weight: float = 1.0,
    scale: float = 1.0,
    verify_rows: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes original base + λ · (all that the run and those before it have added) + w · (instruct - base) as a model.

    Tokenizer, chat template and generation settings are the instruct model's.

    Args:
        run: Run directory with at least one merge; it may continue another run.
        instruct: Folder or Hub id of the instruct model, in full precision, of the base's architecture and vocabulary.
        output: New folder for the model; it appears whole or not at all.
        against: Folder or Hub id of the base that the instruct model was made from; None: the run's original base.
        weight: w.
        scale: λ, as in `shrink`.
        verify_rows: Compare sampled rows with float64.
        progress: Called with the bytes just written and those of all files.

    Returns:
        What `fold_into` returns.

    Raises:
        UserError: If there is no merge, the original base is gone or another one, tensors, shapes or vocabularies
            differ, a weight is not finite, or the output cannot be written.
    """
    require_factor("--scale", scale)
    root, ledger = open_merged_run(run)
    original = find_base(ledger.base["name"], ledger.base["revision"])
    require_original(ledger, original)
    folder = local_folder(instruct, [CONFIG, INDEX, "*.safetensors", *COMPANIONS])
    difference = Difference.open(folder, original.folder if against is None else against, weight)
    kept = [root, original.folder, difference.model.folder, difference.base.folder]
    target = claim_output(Path(output), ARTEFACT, keep=kept)
    model = RunDirectory(root).model
    _require_vocabulary(model if verify(model, quick=True) is not None else original.folder, folder)
    key = digest(["chat vector", ledger.key(), scale, difference.identity()])
    return fold_into(
        original.folder,
        ledger.view(scale=scale),
        target,
        key=key,
        difference=difference,
        verify=verify_rows,
        companions_of=folder,
        progress=progress,
    )


def _require_vocabulary(ours: Path, instruct: Path) -> None:
    """Raises a UserError unless the instruct model's tokenizer has every token of ours at the same id."""
    mine, theirs = (_vocabulary(folder) for folder in (ours, instruct))
    wrong = sorted((number, token) for token, number in mine.items() if theirs.get(token) != number)
    if wrong:
        number, token = wrong[0]
        found = "none" if token not in theirs else f"id {theirs[token]}"
        raise UserError.of(
            f"token {token!r} of the tokenizer of {instruct}",
            expected=f"id {number}, as in {ours}",
            found=f"{found} ({len(wrong)} tokens differ)",
            remedy="A chat vector needs models of one vocabulary",
        )


def _vocabulary(folder: Path) -> Mapping[str, int]:
    vocabulary: dict[str, int] = load_tokenizer(folder).get_vocab()
    return vocabulary
