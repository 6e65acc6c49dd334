"""Whole weights in the ledger: of a vocabulary that grew before the first iteration, tied and apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from numerics_helpers import gaussian, load_all, small_tensors, write_base
from safetensors.torch import save_file

from bam_lora.adapters import Adapter
from bam_lora.folding import fold_into
from bam_lora.ledger import Ledger
from bam_lora.merge import MergedAdapters
from bam_lora.snapshots import write_merged, write_snapshot

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = [33, 4, 31]  # of a vocabulary of 30 that grew to 34


def token_adapter(folder: Path, values: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    save_file({name: values}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "trainable_token_indices": ROWS}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_trained_in_a_vocabulary_that_grew(tmp_path: Path, tied: bool, method: str) -> None:
    tensors = small_tensors() | ({} if tied else {HEAD: gaussian(30, 8, seed=8, dtype=torch.bfloat16)})
    base = write_base(tmp_path / "base", tensors, config={"tie_word_embeddings": tied, "vocab_size": 30})
    ledger = Ledger.start(tmp_path, {"name": "base", "revision": None, "files": {}})
    grown = {EMBEDDING: gaussian(34, 8, seed=1)} | ({} if tied else {HEAD: gaussian(34, 8, seed=2)})
    same = {HEAD: EMBEDDING} if tied else {}
    ledger.record(1, [], "vocabulary", {}, write_snapshot(tmp_path, 1, grown), same)
    seen = grown[EMBEDDING].bfloat16().float()[ROWS]
    steps = [gaussian(3, 8, seed=3), gaussian(3, 8, seed=3).abs()]
    paths = [f"iterations/02/branch-{number}/adapter" for number in (1, 2)]
    for path, step in zip(paths, steps, strict=True):
        token_adapter(tmp_path / path, seen + step)
    merged = MergedAdapters([Adapter.open(tmp_path / path) for path in paths], [0.75, 0.5], method)
    names = [name for name in merged.names() if merged.is_dense(name)]
    found = write_merged(tmp_path, 2, base, ledger.view(), merged, names, torch.bfloat16)
    assert found.same == same
    ledger.record(2, paths, method, {}, found.path, found.same)
    value = ledger.start_value(EMBEDDING)
    assert value is not None
    untouched = [row for row in range(34) if row not in ROWS]
    assert torch.equal(value[untouched], grown[EMBEDDING][untouched])
    if method == "linear":
        exact = grown[EMBEDDING][ROWS].double() + 0.75 * steps[0].double() + 0.5 * steps[1].double()
        assert (value[ROWS].double() - exact).abs().max() <= 1e-6
    facts = fold_into(base, ledger.view(), tmp_path / "model", key="k")
    model, config = load_all(tmp_path / "model"), json.loads((tmp_path / "model" / "config.json").read_text())
    assert facts["vocabulary"] == config["vocab_size"] == 34
    assert torch.equal(model[EMBEDDING], value.bfloat16())
    assert config["tie_word_embeddings"] is tied
    assert (HEAD in model) is not tied
    if not tied:
        assert torch.equal(model[HEAD], grown[HEAD].bfloat16())
