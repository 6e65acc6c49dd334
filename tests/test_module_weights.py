"""Branch weights by pattern: which pattern counts, what is refused, and what a run's ledger holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN, write_jsonl
from dense_reference import in_full, reference
from numerics_helpers import dense_delta
from safetensors.torch import load_file

from bam_lora.check import check_recipe
from bam_lora.dense_methods import DenseOptions
from bam_lora.errors import UserError
from bam_lora.ledger import Ledger
from bam_lora.loop import run
from bam_lora.module_weights import require_patterns, resolve_by_module, weights_by_name
from bam_lora.recipe import Recipe, changed_keys, dump_recipe, load_recipe, recipe_from_dict
from bam_lora.rundir import recipe_key
from bam_lora.store import read_record


def test_the_first_pattern_that_is_found_counts() -> None:
    by_module = {r"\.0\.": [1.0, 0.0], "q_proj|k_proj": [0.2, 0.8]}
    names = ["layers.0.q_proj.weight", "layers.1.q_proj.weight", "layers.1.up_proj.weight"]
    assert weights_by_name(names, by_module) == {names[0]: [1.0, 0.0], names[1]: [0.2, 0.8]}


def test_every_kind_of_weights_is_resolved_as_the_others_are() -> None:
    resolved = resolve_by_module({"a": "tokens", "b": "uniform", "c": [1, 3, 2]}, 2, [30, 10], 2.0)
    assert resolved == {"a": [1.5, 0.5], "b": [1.0, 1.0], "c": [3.0, 9.0]}  # of a short last group the first two
    with pytest.raises(UserError, match=r"expected numbers of which the first 2 do not sum to zero"):
        resolve_by_module({"a": [1, -1, 1]}, 2, [1, 1], 1.0)


def test_a_pattern_must_find_a_weight_that_gets_an_adapter(tiny_base: Path) -> None:
    require_patterns(tiny_base, "all-linear", ["self_attn", r"layers\.1\.mlp"])
    require_patterns(tiny_base, ["q_proj"], ["self_attn"])
    everywhere = ("layers.7", "embed_tokens", "layernorm", "lm_head", "^layers")
    for targets, pattern in (*(("all-linear", pattern) for pattern in everywhere), (["q_proj"], "mlp")):
        with pytest.raises(UserError, match=re.escape(f"weights_by_module '{pattern}': expected a pattern that")):
            require_patterns(tiny_base, targets, ["self_attn", pattern])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_jsonl(folder / "german.jsonl", GERMAN[:24])
    write_jsonl(folder / "english.test.jsonl", ENGLISH[-3:])
    return folder


def recipe(base: Path, files: Path, **merge: Any) -> Recipe:
    return recipe_from_dict(
        {
            "base": str(base),
            "output": "unused",
            "data": {"target": [{"path": str(files / "german.jsonl")}], "sequence_length": 64},
            "bam": {"slices": 3, "branches": 2, "merge": merge},
            "lora": {"r": 4},
            "training": {
                "learning_rate": 5e-3,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "checkpointing": False,
            },
            "evaluation": {"source": [{"path": str(files / "english.test.jsonl")}], "branches": False},
        }
    )


PATTERNS: dict[str, Any] = {r"layers\.0\.self_attn": [0.9, 0.3], "self_attn|up_proj": "tokens"}


def test_a_run_merges_every_weight_by_its_own(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    run(recipe(tiny_base, files, weights_by_module=PATTERNS, scale=0.5), tmp_path / "run")
    record = read_record(tmp_path / "run/iterations/01/merge.json")
    assert record is not None
    shares = [0.5 * tokens / sum(record["tokens"]) for tokens in record["tokens"]]
    assert record["weights"] == [0.25, 0.25]
    assert list(record["weights_by_module"]) == list(PATTERNS)
    first, last = Ledger.load(tmp_path / "run").iterations
    for name, stored in first["coefficients"].items():
        expected = [0.45, 0.15] if "layers.0.self_attn" in name else [0.25, 0.25]
        if "layers.0.self_attn" not in name and ("self_attn" in name or "up_proj" in name):
            expected = shares
        assert stored["values"] == expected, name
    lists = {tuple(stored["values"]) for name, stored in last["coefficients"].items() if "layers.0.self_attn" in name}
    assert lists == {(0.6,)}  # of one branch: the list's sum


def test_a_pattern_that_finds_nothing_stops_before_training(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    wrong = recipe(tiny_base, files, weights_by_module={"query": "tokens"})
    for look in (lambda: run(wrong, tmp_path / "run"), lambda: check_recipe(wrong)):
        with pytest.raises(UserError, match="weights_by_module 'query'"):
            look()
    assert not (tmp_path / "run/iterations").exists()


def test_check_says_how_it_merges(
    tiny_base: Path, files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    text = check_recipe(recipe(tiny_base, files, weights_by_module=PATTERNS, scale=0.5))
    line = next(line for line in text.splitlines() if line.startswith("merge"))
    patterns = r"0.9/0.3 for layers\.0\.self_attn, tokens for self_attn|up_proj"
    assert line == f"merge       linear, weights uniform, {patterns}, scale 0.5"


def test_the_order_of_patterns_is_part_of_a_recipe(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    one = recipe(tiny_base, files, weights_by_module=PATTERNS)
    other = recipe(tiny_base, files, weights_by_module=dict(reversed(PATTERNS.items())))
    assert recipe_key(one) != recipe_key(other)
    assert changed_keys(one.resolved(), other.resolved()) == ["bam.merge.weights_by_module"]
    (tmp_path / "kept.yaml").write_text(dump_recipe(one))
    kept = load_recipe(tmp_path / "kept.yaml")
    assert list(kept.bam.merge.weights_by_module) == list(PATTERNS)
    assert recipe_key(kept) == recipe_key(one)


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({"weights_by_module": {"(": "tokens"}}, "expected a regular expression"),
        ({"weights_by_module": {"q": "learned"}}, "expected uniform, tokens or a list with one finite number per br"),
        ({"weights_by_module": {"q": [1, -1]}}, "expected weights whose sum is not zero"),
        ({"weights_by_module": {"q": [1.0]}}, r"expected one weight per branch \(2\), found 1"),
        ({"weights_by_module": {"q": "tokens"}, "weights": "learned"}, "expected none beside `weights: learned`"),
    ],
)
def test_what_is_refused(tiny_base: Path, files: Path, merge: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(tiny_base, files, **merge)


def test_methods_that_work_element_by_element_take_them_too(tiny_base: Path, files: Path, tmp_path: Path) -> None:
    root, name = tmp_path / "run", "model.layers.0.self_attn.q_proj.weight"
    values = recipe(tiny_base, files, method="ties", density=0.3, weights_by_module={"q_proj": [0.9, 0.1]}).resolved()
    values["bam"]["slices"] = 2
    run(recipe_from_dict(values), root)
    adapters = [root / f"iterations/01/branch-{branch}/adapter" for branch in (1, 2)]
    before = load_file(tiny_base / "model.safetensors")
    ledger = Ledger.load(root)
    for other, weights in ((name, [0.9, 0.1]), (name.replace("q_proj", "k_proj"), [0.5, 0.5])):
        deltas = [dense_delta(adapter, other) for adapter in adapters]
        merged, unsure = reference("ties", in_full(deltas), weights, DenseOptions(0.3))
        found = ledger.start_value(other, 1)
        assert found is not None
        error = (found.double() - before[other].double()).numpy() - merged
        assert abs(error[~unsure]).max() <= 1e-5 * abs(merged).max()
        assert unsure.mean() < 0.05
