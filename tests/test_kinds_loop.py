"""Runs whose branches train more than LoRA's factors: what the ledger makes of it, against float64 from the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from conftest import ENGLISH, GERMAN, write_jsonl
from safetensors.torch import load_file

from bam_lora.base import Loading, load_model
from bam_lora.errors import Interrupted, UserError
from bam_lora.export import export_adapter
from bam_lora.ledger import Ledger
from bam_lora.loop import run
from bam_lora.progress import RunProgress
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.store import hash_file

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
TOKENS = [300, 3, 70]  # in no order: PEFT writes their rows as they are listed
KINDS: dict[str, dict[str, Any]] = {
    "saved-tied": {"modules_to_save": ["embed_tokens", "norm"]},
    "saved-apart": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": False},
    "saved-both-ends": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": False},
    "tokens": {"trainable_token_indices": TOKENS},
    "dora": {"dora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora-and-saved": {"dora": True, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "bias": {"bias": "all", "target_modules": ["q_proj"]},
    "lora-bias": {"bias": "lora_only", "lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
}
# One of each way of adding up is tried by default.
QUICK = ("saved-tied", "tokens", "dora")
EVERY_KIND = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
PARTED = ("saved-apart", "saved-both-ends")
CHANGED = {
    "dora": "model.layers.0.mlp.down_proj.weight",
    "bias": "model.layers.1.self_attn.k_proj.bias",
    "lora-bias": "model.layers.1.self_attn.o_proj.bias",
}


def base_of(kind: str, tiny_base: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The base that a kind is tried on: with biases where they are trained, in full precision where that is asked."""
    config = transformers.AutoConfig.from_pretrained(tiny_base)
    config.attention_bias = "bias" in kind
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, config=config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) * 0.1
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


def shown(folder: Path) -> dict[str, torch.Tensor]:
    """The weights as training in 4 bits sees them, in float64."""
    model = load_model(folder, Loading(4))
    weights = {f"{name}.weight": module.weight for name, module in model.named_modules() if hasattr(module, "weight")}
    return {
        name: (dequantize_4bit(weight, weight.quant_state) if hasattr(weight, "quant_state") else weight).double()
        for name, weight in weights.items()
    }


def recipe(base: Path, folder: Path, lora: dict[str, Any], **changes: Any) -> Recipe:
    write_jsonl(folder / "german.jsonl", GERMAN[:24])
    write_jsonl(folder / "english.jsonl", ENGLISH[:2])
    values: dict[str, Any] = {
        "base": str(base),
        "output": "unused",
        "data": {"target": [{"path": str(folder / "german.jsonl")}], "sequence_length": 128},
        "bam": {"slices": 4, "branches": 2, "merge": {"weights": [0.75, 0.5]}},
        "lora": {"r": 4, **lora},
        "training": {
            "learning_rate": 5e-3,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "checkpointing": False,
            "save_steps": 1,
        },
        "evaluation": {"source": [{"path": str(folder / "english.jsonl")}]},
        "keep": {"bases": "all"},
    }
    return recipe_from_dict(values | changes)


def branch(root: Path, iteration: int, number: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    folder = root / f"iterations/{iteration:02}/branch-{number}/adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}, config


def learned(
    root: Path,
    iteration: int,
    number: int,
    name: str,
    began: torch.Tensor,
    exact: torch.Tensor,
    quantised: torch.Tensor,
) -> torch.Tensor:
    """What a branch has added to a weight, in float64.

    `began` is the base's value as it lay on the disk, `exact` without any rounding, `quantised` in 4 bits.
    """
    tensors, config = branch(root, iteration, number)
    module = name.removesuffix(".weight")
    change = torch.zeros_like(began, dtype=torch.float64)
    if f"{module}.lora_A.weight" in tensors:
        A, B = (tensors[f"{module}.lora_{half}.weight"].double() for half in "AB")
        change += config["lora_alpha"] / config["r"] * B @ A
    if name.endswith(".bias") and f"{name.removesuffix('.bias')}.lora_B.bias" in tensors:
        change += config["lora_alpha"] / config["r"] * tensors[f"{name.removesuffix('.bias')}.lora_B.bias"].double()
    if f"{module}.lora_magnitude_vector" in tensors:
        norms = (quantised + change).norm(dim=1)
        scales = (tensors[f"{module}.lora_magnitude_vector"].double() / norms)[:, None]
        change = (scales - 1) * exact + scales * change
    name = name.replace(".bias", ".base_layer.bias") if name.replace(".bias", ".base_layer.bias") in tensors else name
    if name in tensors:
        change += tensors[name].double() - began.double()
    rows = tensors.get(f"{EMBEDDING.removesuffix('.weight')}.token_adapter.trainable_tokens_delta")
    if rows is not None and name in (EMBEDDING, HEAD):
        indices = config["trainable_token_indices"]
        change[indices] += rows.double() - began[indices].double()
    return change


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """A model's tensors, with the head that is tied to its embedding."""
    tensors = load_file(folder / "model.safetensors")
    return {HEAD: tensors[EMBEDDING], **tensors}


def nearly_all_equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether fp16 or bf16 weights are those wanted, but for a few that lie on the edge of two of its numbers."""
    return bool((found != wanted.to(found.dtype)).double().mean() <= 0.002)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_two_iterations_add_up_what_every_branch_has_learned(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    root, original = tmp_path / "run", base_of(kind, tiny_base, tmp_path / "base")
    run(recipe(original, tmp_path, KINDS[kind]), root)
    ledger, base = Ledger.load(root), weights_of(original)
    exact = {name: tensor.double() for name, tensor in base.items()}
    folders = [original, root / "iterations/01/base", root / "iterations/02/base"]
    changed = set()
    for iteration in (1, 2):
        before, seen = weights_of(folders[iteration - 1]), shown(folders[iteration - 1])
        for name in exact:
            began = (before[name], exact[name], seen.get(name, exact[name]))
            deltas = [learned(root, iteration, number, name, *began) for number in (1, 2)]
            changed |= {name} if any(delta.any() for delta in deltas) else set()
            exact[name] += 0.75 * deltas[0] + 0.5 * deltas[1]
        for name, found in weights_of(folders[iteration]).items():
            assert nearly_all_equal(found, exact[name]), (iteration, name)
    for name in changed & set(ledger.names()):
        start = ledger.start_value(name)
        if start is not None:
            change = exact[name].view(start.shape) - base[name].double().view(start.shape)
            assert (start.double() - exact[name].view(start.shape)).abs().max() <= 1e-5 * change.abs().max()
    assert CHANGED.get(kind, EMBEDDING) in changed
    assert set(ledger.names()) <= changed | {HEAD}
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "model")
    assert model.config.tie_word_embeddings is (kind not in PARTED)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) is (kind not in PARTED)
    assert (HEAD in load_file(root / "model" / "model.safetensors")) is (kind in PARTED)
    with pytest.raises(UserError, match="expected low-rank merges, found an iteration with full weights"):
        export_adapter(root, tmp_path / "adapter")


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_one_branch_is_what_peft_merges(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """In fp32, where nothing is rounded on the way, the run's model is PEFT's."""
    base = base_of(kind, tiny_base, tmp_path / "base", torch.float32)
    settings: dict[str, Any] = {
        "bam": {"slices": 1, "branches": 1},
        "quantization": {"bits": 16, "compute_dtype": "float32"},
        "evaluation": {},
    }
    root = tmp_path / "run"
    run(recipe(base, tmp_path, KINDS[kind], **settings), root)
    adapter = root / "iterations/01/branch-1/adapter"
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), str(adapter)
    ).eval()
    found = transformers.AutoModelForCausalLM.from_pretrained(root / "model").eval()
    tokens = torch.tensor([[*TOKENS, *range(40, 60), *TOKENS]])
    with torch.no_grad():
        wanted, logits = adapted(input_ids=tokens).logits, found(input_ids=tokens).logits
        before = transformers.AutoModelForCausalLM.from_pretrained(base)(input_ids=tokens).logits
    assert (wanted - before).abs().max() > 1e-3
    assert (logits - wanted).abs().max() <= 1e-4 * (wanted - before).abs().max()


class _Stopping(RunProgress):
    """Stops the run once, at the given step of a branch."""

    def __init__(self, label: str, at: int) -> None:
        super().__init__()
        self._label, self._at = label, at

    def step(self, label: str, step: int, *rest: Any) -> None:
        if label.startswith(self._label) and step == self._at:
            raise Interrupted("SIGTERM")
        super().step(label, step, *rest)


@pytest.mark.parametrize(
    "kind", ["tokens", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("saved-tied", "dora"))]
)
def test_a_stop_inside_a_branch_changes_nothing_and_damage_is_seen(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    wanted = recipe(tiny_base, tmp_path, KINDS[kind], keep={"bases": "last"})
    run(wanted, tmp_path / "whole")
    root = tmp_path / "cut"
    for label, at in (("iteration 1/2, branch 2", 2), ("iteration 2/2, branch 1", 2)):
        with pytest.raises(Interrupted):
            run(wanted, root, progress=_Stopping(label, at))
    run(wanted, root)
    (root / "model/model.safetensors").unlink()
    run(wanted, root)
    assert hash_file(root / "model/model.safetensors") == hash_file(tmp_path / "whole/model/model.safetensors")
    assert sorted(path.name for path in (root / "snapshots").iterdir()) == ["02.safetensors"]
    data = bytearray((root / "snapshots/02.safetensors").read_bytes())
    data[-1] ^= 1
    (root / "snapshots/02.safetensors").write_bytes(data)
    (root / "model/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"02.safetensors: expected the file that the ledger records, found another"):
        Ledger.load(root).verify()


REFUSED: Sequence[tuple[dict[str, Any], str]] = [
    ({"merge": {"weights": "search"}}, "bam.merge.weights: expected uniform, tokens or a list"),
    ({"merge": {"method": "karcher"}}, "bam.merge.method: expected linear or a method by elements"),
    ({"outer": {"momentum": 0.5}}, "bam.outer: expected learning_rate 1 and momentum 0"),
]


@pytest.mark.parametrize(("bam", "expected"), REFUSED)
def test_merges_that_need_factors_are_refused_in_the_recipe(
    tiny_base: Path, tmp_path: Path, bam: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        recipe(tiny_base, tmp_path, KINDS["tokens"], bam=bam, selection={"source": [{"path": "a"}]})


@pytest.mark.slow
def test_neftune_reaches_the_branches_and_leaves_the_base_alone(tiny_base: Path, tmp_path: Path) -> None:
    plain = recipe(tiny_base, tmp_path, {}, bam={"slices": 1, "branches": 1})
    training = {**plain.resolved()["training"], "neftune_noise_alpha": 5.0}
    noisy = plain.model_copy(update={"training": type(plain.training)(**training)})
    for name, one in (("plain", plain), ("noisy", noisy), ("again", noisy)):
        run(one, tmp_path / name)
    hashes = [hash_file(tmp_path / name / "model/model.safetensors") for name in ("plain", "noisy", "again")]
    assert hashes[0] != hashes[1] == hashes[2]
    scores = [json.loads((tmp_path / name / "iterations/00/eval.json").read_text()) for name in ("plain", "noisy")]
    assert scores[0]["scores"] == scores[1]["scores"]


@pytest.mark.slow
def test_a_chained_run_goes_on_from_whole_weights(tiny_base: Path, tmp_path: Path) -> None:
    """The parent parts the embeddings; the child trains rows of the one, from its newest whole value, and no head."""
    parent, child = tmp_path / "parent", tmp_path / "child"
    run(recipe(tiny_base, tmp_path, KINDS["saved-apart"]), parent)
    run(recipe(parent, tmp_path, KINDS["tokens"]), child)
    before, after = Ledger.load(parent).start_value(EMBEDDING), Ledger.load(child).start_value(EMBEDDING)
    assert before is not None
    assert after is not None
    moved = set((before != after).any(dim=1).nonzero().flatten().tolist())
    assert moved <= set(TOKENS)  # apart from the head, only tokens that the text has
    assert moved
    heads = [load_file(folder / "model/model.safetensors")[HEAD] for folder in (parent, child)]
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[1], weights_of(tiny_base)[HEAD])
    found = load_file(child / "model/model.safetensors")[EMBEDDING]
    assert torch.equal(found, after.to(found.dtype))
