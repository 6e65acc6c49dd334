"""A run as one LoRA adapter on its original base: exact, or recompressed to a given rank with the error that costs.

Shapes: o output, i input, R the stacked rank of all of the run's branches, r the rank that is written.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from bam_lora.adapter_files import exact_config, write_products
from bam_lora.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter, Factors
from bam_lora.base import BaseFiles, file_hashes, require_same_files
from bam_lora.checkpoint import claim_output, writing
from bam_lora.coefficients import gram
from bam_lora.errors import UserError
from bam_lora.ledger import Ledger
from bam_lora.ledger_view import LedgerView, require_factor
from bam_lora.safetensors_stream import all_finite
from bam_lora.store import digest, new_folder, seal, write_json

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
    if rank is not None and rank < 1:
        raise UserError.of("--rank", expected="a rank of at least 1", found=str(rank), remedy="Try 64, or leave it out")
    require_factor("--scale", scale)
    root = Path(run).expanduser().resolve()
    ledger = Ledger.load(root)
    if not ledger.iterations and not ledger.inherited:
        raise UserError.of(str(run), expected="a run with a merge", found="none yet", remedy="Let it come so far")
    ledger.verify()
    _require_base(ledger)
    target = claim_output(Path(output), _ARTEFACT, keep=[root])
    products = _Compressed(ledger.view(scale=scale), rank)
    first = Adapter.open([*ledger.inherited, *ledger.iterations][0]["adapters"][0]["path"], root=root)
    key = digest([_ARTEFACT, ledger.key(), rank, scale])
    with writing(target), new_folder(target) as folder:
        write_products(folder / WEIGHTS_FILE, products)
        ranks = {name: products.rank(name) for name in products.names()}
        config = exact_config(first.config, ranks, name_modules=first.names != products.names())
        config |= {"base_model_name_or_path": ledger.base["name"], "revision": ledger.base["revision"]}
        write_json(folder / CONFIG_FILE, config)
        seal(folder, key, {"artefact": _ARTEFACT, "rank": rank, "scale": scale, "error": products.error()})
    return {
        "rank": max(ranks.values()),
        "stacked_rank": max(products.view.rank(name) for name in ranks),
        "error": products.error(),
        "errors": products.errors(),
        "base": ledger.base["name"],
    }


def _require_base(ledger: Ledger) -> None:
    """The adapter names its base: a local folder under that name must still be the base that it belongs to.

    One that is gone, or a base on the Hub, is not looked for: nothing of it is needed here.
    """
    name, folder = ledger.base["name"], Path(ledger.base["name"])
    if ledger.base["revision"] is None and folder.is_dir():
        base = BaseFiles(name, folder.resolve(), None)
        require_same_files(base, file_hashes(base, ledger.root), ledger.base["files"])


class _Compressed:
    """A ledger's deltas, each written with no more directions than asked for or than it can have."""

    def __init__(self, view: LedgerView, rank: int | None) -> None:
        self.view, self._rank = view, rank
        self._squares: dict[str, tuple[float, float]] = {}  # what was left out, and all, squared norms
        for name in self.names():
            if self.view.start_value(name) is not None:
                raise UserError.of(
                    f"the delta of {name!r}",
                    expected="low-rank merges",
                    found="an iteration with full weights",
                    remedy="Use the folded model in the run's model/",
                )

    def names(self) -> list[str]:
        return self.view.names()

    def shape(self, name: str) -> tuple[int, int]:
        return self.view.shape(name)

    def rank(self, name: str) -> int:
        return min(self.view.rank(name), *self.shape(name), *([] if self._rank is None else [self._rank]))

    def stacked(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        stacked = self.view.stacked(name)
        assert stacked is not None, name
        rank = self.rank(name)
        if not (all_finite(stacked[0]) and all_finite(stacked[1])):
            raise UserError.of(
                f"the delta of {name!r}", expected="numbers within fp32", found="an overflow", remedy="Lower --scale"
            )
        if rank == stacked[0].shape[1]:
            whole = Factors(A_ri=stacked[1], B_or=stacked[0], scaling=1.0)
            self._squares[name] = (0.0, gram(whole, whole) if self._rank else 0.0)
            return stacked
        B_or, A_ri, left_out, square = truncated(*stacked, rank)
        self._squares[name] = (left_out if self._rank else 0.0, square)
        return B_or, A_ri

    def errors(self) -> dict[str, float]:
        return {name: math.sqrt(left / whole) if left else 0.0 for name, (left, whole) in self._squares.items()}

    def error(self) -> float:
        left, whole = (math.fsum(pair[place] for pair in self._squares.values()) for place in (0, 1))
        return math.sqrt(left / whole) if left else 0.0


def truncated(B_oR: torch.Tensor, A_Ri: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The best product of a smaller rank (Eckart and Young, 1936), from the factors alone, in float64.

    Args:
        B_oR: Left factor.
        A_Ri: Right factor.
        rank: r, at most min(o, i, R).

    Returns:
        (B_or, A_ri) in fp32, the singular values shared out evenly, the squared Frobenius norm of what is left out, and
        that of the whole.
    """
    left_oq, upper_qR = torch.linalg.qr(B_oR.double())
    right_ip, lower_pR = torch.linalg.qr(A_Ri.double().T)
    U, values, V = torch.linalg.svd(upper_qR @ lower_pR.T, full_matrices=False)
    roots = values[:rank].sqrt()
    B_or = (left_oq @ U[:, :rank]) * roots
    A_ri = roots[:, None] * (V[:rank] @ right_ip.T)
    squares = values.square()
    return B_or.float(), A_ri.float(), float(squares[rank:].sum()), float(squares.sum())
