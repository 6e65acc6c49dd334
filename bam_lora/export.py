"""A run as one LoRA adapter on its original base: exact, or recompressed to a given rank with the error that costs.

Shapes: o output, i input, R the stacked rank of all of the run's branches, r the rank that is written.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from bam_lora.adapter_files import exact_config, find_slots, write_products
from bam_lora.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter
from bam_lora.base import BaseFiles, file_hashes, require_same_files
from bam_lora.checkpoint import claim_output, writing
from bam_lora.compression import Compressed, require_rank
from bam_lora.errors import UserError, no_run
from bam_lora.ledger import Ledger
from bam_lora.ledger_view import LedgerView, require_factor
from bam_lora.report import adapter_card, collect
from bam_lora.store import digest, new_folder, seal, write_json, write_text

_ARTEFACT = "exported adapter"


def export_adapter(
    run: str | Path, output: str | Path, *, rank: int | None = None, scale: float = 1.0
) -> dict[str, Any]:
    """Writes everything a run has added to its original base as one PEFT adapter (fp32, scaling 1).

    Args:
        run: Run directory with at least one merge.
        output: New folder for the adapter; it appears whole or not at all.
        rank: Keep the r largest singular directions of each weight's delta; None: all of it. A delta is never written
            with more than min(o, i) of them, which loses nothing.
        scale: λ on what this run has added, as in `shrink`.

    Returns:
        {"rank": the largest written, "stacked_rank": the largest R, "error": relative Frobenius error over all weights,
        0 without `rank`, "errors": {weight: relative error}, "base"}.

    Raises:
        UserError: If there is no run, a file of it is damaged, the local folder of its base now holds another one, its
            delta is not low rank, or the output cannot be written.
    """
    require_rank(rank)
    require_factor("--scale", scale)
    root, ledger = open_merged_run(run)
    _require_base(ledger)
    target = claim_output(Path(output), _ARTEFACT, keep=[root])
    view = ledger.view(scale=scale)
    _require_low_rank(view)
    products = Compressed(view, rank, remedy="Lower --scale")
    merges = [*ledger.inherited, *ledger.iterations]
    adapters = [Adapter.open(one["path"], root=root) for merge in merges for one in merge["adapters"]]
    slots = find_slots(products.names(), adapters)
    key = digest([_ARTEFACT, ledger.key(), rank, scale])
    with writing(target), new_folder(target) as folder:
        write_products(folder / WEIGHTS_FILE, products, slots)
        named = adapters[0].names != products.names()
        config = exact_config(adapters[0].config, slots, products, name_modules=named)
        config |= {"base_model_name_or_path": ledger.base["name"], "revision": ledger.base["revision"]}
        write_json(folder / CONFIG_FILE, config)
        if (root / "recipe.yaml").is_file():  # a ledger alone does not say what was done
            facts = {"rank": _largest(products), "rank_asked": rank, "scale": scale, "error": products.error()}
            report = collect(root)
            write_text(folder / "README.md", adapter_card(report, report["recipe"], facts))
        seal(folder, key, {"artefact": _ARTEFACT, "rank": rank, "scale": scale, "error": products.error()})
    return {
        "rank": _largest(products),
        "stacked_rank": max(view.rank(name) for name in view.names()),
        "error": products.error(),
        "errors": products.errors(),
        "base": ledger.base["name"],
    }


def _largest(products: Compressed) -> int:
    """The largest rank that is written."""
    return max(products.rank(name) for name in products.names())


def open_merged_run(run: str | Path) -> tuple[Path, Ledger]:
    """A run's folder and its verified ledger.

    Raises:
        UserError: If there is no run or no merge in it, or a file of its ledger is damaged.
    """
    root = Path(run).expanduser().resolve()
    if not root.is_dir():
        raise no_run(Path(run))
    ledger = Ledger.load(root)
    if not ledger.iterations and not ledger.inherited:
        remedy = f"`bam-lora status {shlex.quote(str(run))}` says how far it is and how to go on"
        raise UserError.of(str(run), expected="a run with a merge", found="none yet", remedy=remedy)
    ledger.verify()
    return root, ledger


def require_original(ledger: Ledger, base: BaseFiles) -> None:
    """Raises a UserError, naming the files, unless a base is the one that the ledger starts from."""
    require_same_files(base, file_hashes(base, ledger.root), ledger.base["files"])


def _require_low_rank(view: LedgerView) -> None:
    for name in view.names():
        if view.start_value(name) is not None or not view.outline(name).low_rank:
            raise UserError.of(
                f"the delta of {name!r}",
                expected="low-rank merges",
                found="an iteration with full weights",
                remedy="Use the folded model in the run's model/",
            )


def _require_base(ledger: Ledger) -> None:
    """The adapter names its base: a local folder under that name must still be the base that it belongs to.

    One that is gone, or a base on the Hub, is not looked for: nothing of it is needed here.
    """
    name, folder = ledger.base["name"], Path(ledger.base["name"])
    if ledger.base["revision"] is None and folder.is_dir():
        require_original(ledger, BaseFiles(name, folder.resolve(), None))
