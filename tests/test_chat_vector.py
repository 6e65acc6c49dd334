"""A run's change and a chat vector in one model: against float64, with the instruct model's tokenizer and template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics_helpers import dense_delta, gaussian, load_all, random_adapter, round_directly
from safetensors.torch import save_file
from typer.testing import CliRunner

from bam_lora.base import file_hashes, find_base
from bam_lora.chat_vector import export_with_chat_vector
from bam_lora.cli import app
from bam_lora.coefficients import Coefficients
from bam_lora.errors import UserError
from bam_lora.ledger import Ledger
from bam_lora.snapshots import write_snapshot

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q: (64, 64), DOWN: (64, 128)}


def record(root: Path, base: Path, iteration: int, weights: list[float], ledger: Ledger | None = None) -> Ledger:
    """Enters a merge of two random adapters."""
    names = [f"{iteration}{letter}" for letter in "ab"]
    for number, name in enumerate(names):
        random_adapter(root / name, SHAPES, rank=3, seed=10 * iteration + number, scale=0.02)
    if ledger is None:
        files = file_hashes(find_base(str(base)), root)
        ledger = Ledger.start(root, {"name": str(base), "revision": None, "files": files})
    ledger.record(iteration, names, "linear", {f"{name}.weight": Coefficients.scalar(weights) for name in SHAPES})
    ledger.save()
    return ledger


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path) -> Path:
    root = tmp_path / "run"
    root.mkdir()
    record(root, tiny_base, 2, [0.8, 0.1], record(root, tiny_base, 1, [0.5, 0.5]))
    return root


@pytest.fixture
def instruct(tiny_base: Path, tmp_path: Path) -> Path:
    """The base after some training: every weight moved, two tokens more within its rows, a template, other stops."""
    from transformers import AutoTokenizer

    folder = tmp_path / "instruct"
    shutil.copytree(tiny_base, folder)
    moved = {
        name: tensor.float().add(gaussian(*tensor.shape, seed=n, scale=1e-3)).to(tensor.dtype)
        for n, (name, tensor) in enumerate(load_all(tiny_base).items())
    }
    save_file(moved, folder / "model.safetensors", {"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": end}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 1], "do_sample": True}))
    return folder


def added(root: Path, weights: dict[int, list[float]], name: str) -> torch.Tensor:
    """What the run has added to a weight, dense, in float64."""
    return sum(
        (w * dense_delta(root / f"{iteration}{letter}", name))
        for iteration, pair in weights.items()
        for w, letter in zip(pair, "ab", strict=True)
    )  # type: ignore[return-value]


def check(
    base: Path,
    instruct: Path,
    folder: Path,
    weight: float,
    deltas: dict[str, torch.Tensor],
    against: Path | None = None,
) -> None:
    """The model in a folder is base + deltas + weight · (instruct - base), rounded once; no weight makes exact ties."""
    original, new, old = load_all(base), load_all(instruct), load_all(against or base)
    same = total = 0
    for name, value in load_all(folder).items():
        exact = original[name].double() + weight * (new[name].double() - old[name].double())
        exact = round_directly(exact + deltas.get(name, 0.0), torch.bfloat16)
        same, total = same + int((value == exact).sum()), total + value.numel()
        assert torch.allclose(value.double(), exact.double(), rtol=2**-7, atol=1e-12), name
    assert same >= 0.9999 * total


@pytest.mark.parametrize(("weight", "scale"), [(1.0, 1.0), (0.6, 0.5), (0.0, 1.0)])
def test_against_float64(
    run: Path, tiny_base: Path, instruct: Path, tmp_path: Path, weight: float, scale: float
) -> None:
    facts = export_with_chat_vector(run, instruct, tmp_path / "out", weight=weight, scale=scale, verify_rows=True)
    assert facts["verified"]["worst_ulp"] <= 1
    deltas = {f"{name}.weight": scale * added(run, {1: [0.5, 0.5], 2: [0.8, 0.1]}, f"{name}.weight") for name in SHAPES}
    check(tiny_base, instruct, tmp_path / "out", weight, deltas)


def test_it_speaks_as_the_instruct_model_does(run: Path, instruct: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_with_chat_vector(run, instruct, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Am Morgen"}], tokenize=False)
    assert text == "<|im_start|>Am Morgen<|im_end|>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == end
    assert model.generation_config.eos_token_id == [end, 1]
    assert model.generate(tokenizer(text, return_tensors="pt")["input_ids"], max_new_tokens=3).shape[1] > 3


def test_a_chained_run_brings_along_what_its_parent_added(
    run: Path, tiny_base: Path, instruct: Path, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    child.mkdir()
    ledger = Ledger.start(child, {})
    ledger.adopt(run)
    record(child, tiny_base, 1, [1.0, -0.3], ledger)
    export_with_chat_vector(child, instruct, tmp_path / "out", weight=0.61)
    deltas = {
        f"{name}.weight": added(run, {1: [0.5, 0.5], 2: [0.8, 0.1]}, f"{name}.weight")
        + added(child, {1: [1.0, -0.3]}, f"{name}.weight")
        for name in SHAPES
    }
    check(tiny_base, instruct, tmp_path / "out", 0.61, deltas)


def test_on_whole_weights_of_a_merge_that_is_not_low_rank(
    run: Path, tiny_base: Path, instruct: Path, tmp_path: Path
) -> None:
    whole = gaussian(64, 64, seed=99, scale=0.05)
    ledger = Ledger.load(run)
    others = {f"{DOWN}.weight": Coefficients.scalar([0.5])}
    snapshot = write_snapshot(run, 3, {f"{Q}.weight": whole})
    random_adapter(run / "3a", {DOWN: SHAPES[DOWN]}, rank=3, seed=33, scale=0.02)
    ledger.record(3, ["3a"], "ties", others, snapshot=snapshot)
    ledger.save()
    export_with_chat_vector(run, instruct, tmp_path / "out", weight=0.5)
    name = f"{Q}.weight"
    deltas = {name: whole.double() - load_all(tiny_base)[name].double()}
    name = f"{DOWN}.weight"
    deltas[name] = added(run, {1: [0.5, 0.5], 2: [0.8, 0.1]}, name) + 0.5 * dense_delta(run / "3a", name)
    check(tiny_base, instruct, tmp_path / "out", 0.5, deltas)


def test_the_base_of_the_instruct_model_may_be_another(
    run: Path, tiny_base: Path, instruct: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tensors = {name: (1.01 * tensor.float()).to(tensor.dtype) for name, tensor in load_all(tiny_base).items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    options = ["--chat-vector", str(instruct), "--against", str(other), "--weight", "0.5", "--verify"]
    result = CliRunner().invoke(app, ["export", str(run), *options, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "verified" in result.output
    deltas = {f"{name}.weight": added(run, {1: [0.5, 0.5], 2: [0.8, 0.1]}, f"{name}.weight") for name in SHAPES}
    check(tiny_base, instruct, tmp_path / "out", 0.5, deltas, other)


def other_tokenizer(folder: Path, base: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def larger_vocabulary(folder: Path, base: Path) -> None:
    tensors = load_all(folder)
    tensors["model.embed_tokens.weight"] = gaussian(400, 64).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def lacking_a_tensor(folder: Path, base: Path) -> None:
    tensors = load_all(folder)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def changed_base(folder: Path, base: Path) -> None:
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (base / "model.safetensors").write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            other_tokenizer,
            r"token '.*' of the tokenizer of .*instruct: expected id \d+, .*found id \d+ \(2 tokens differ",
        ),
        (larger_vocabulary, r"embed_tokens.*expected shape \[384, 64\].*found \[400, 64\], a resized vocabulary"),
        (lacking_a_tensor, r"tensor 'model\.norm\.weight' of .*instruct: expected it, as .* has it, found none"),
        (changed_base, r"expected the files this run started from, found others: model\.safetensors"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    damage: Any, words: str, tiny_base: Path, instruct: Path, tmp_path: Path
) -> None:
    base, root = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_base, base)
    root.mkdir()
    record(root, base, 1, [0.5, 0.5])
    damage(instruct, base)
    with pytest.raises(UserError, match=words) as caught:
        export_with_chat_vector(root, instruct, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--chat-vector", "INSTRUCT", "--rank", "4"], "--rank: expected none beside --chat-vector"),
        (["--against", "x"], "--against: expected --chat-vector INSTRUCT with it, found none"),
        (["--weight", "0.5"], "--weight: expected --chat-vector INSTRUCT with it, found none"),
        (["--chat-vector", "INSTRUCT", "--weight", "nan"], "the weight of the difference: expected a finite number"),
        (["--chat-vector", "INSTRUCT", "--scale", "-1"], "--scale: expected a number of at least 0, found -1"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], words: str, run: Path, instruct: Path, tmp_path: Path
) -> None:
    named = [str(instruct) if option == "INSTRUCT" else option for option in options]
    result = CliRunner().invoke(app, ["export", str(run), *named, "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())
