"""PEFT adapters: every tensor is used or named in an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics_helpers import gaussian, random_adapter, write_adapter
from safetensors.torch import load_file, save_file

from bam_lora.adapters import Adapter
from bam_lora.errors import UserError

SHAPES = {"model.layers.0.mlp.up_proj": (12, 8), "model.layers.0.self_attn.q_proj": (8, 8)}
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def change_config(folder: Path, **values: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def change_tensors(folder: Path, **tensors: torch.Tensor | None) -> Path:
    path = folder / "adapter_model.safetensors"
    kept = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path)
    return folder


def test_names_shapes_ranks_and_factors(tmp_path: Path) -> None:
    modules = {
        "model.layers.0.self_attn.q_proj": (gaussian(4, 8, seed=1), gaussian(6, 4, seed=2)),
        "model.layers.0.mlp.up_proj": (gaussian(2, 8, seed=3, dtype=torch.bfloat16), gaussian(12, 2, seed=4)),
    }
    folder = write_adapter(tmp_path / "a", modules, alpha=8, base_model_name_or_path="org/model")
    adapter = Adapter.open(folder)
    assert adapter.names == ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert adapter.base_name == "org/model"
    name = "model.layers.0.mlp.up_proj.weight"
    assert name in adapter
    assert (adapter.shape(name), adapter.rank(name)) == ((12, 8), 2)
    factors = adapter.factors(name)
    assert factors is not None
    assert factors.A_ri.dtype == torch.bfloat16
    assert torch.equal(factors.A_ri, modules["model.layers.0.mlp.up_proj"][0])
    assert torch.equal(factors.B_or, modules["model.layers.0.mlp.up_proj"][1])
    assert factors.scaling == 8 / 2
    assert adapter.scaling("model.layers.0.self_attn.q_proj.weight") == 8 / 4
    assert adapter.factors("model.norm.weight") is None
    assert set(adapter.hashes()) == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_same_deltas_as_peft(tmp_path: Path) -> None:
    """Ranks, alphas and rsLoRA as PEFT itself resolves them from patterns."""
    import peft

    model = torch.nn.ModuleDict({"up": torch.nn.Linear(8, 12), "q": torch.nn.Linear(8, 8), "xq": torch.nn.Linear(8, 8)})
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["up", "q", "xq"],
        rank_pattern={"q": 2, "x.*": 3},
        alpha_pattern={"^up": -5},
        use_rslora=True,
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    adapter = Adapter.open(tmp_path)
    assert adapter.names == ["q.weight", "up.weight", "xq.weight"]
    for module in ("up", "q", "xq"):
        factors = adapter.factors(f"{module}.weight")
        assert factors is not None
        layer = wrapped.base_model.model[module]
        assert factors.scaling == layer.scaling["default"]
        torch.testing.assert_close(factors.scaling * factors.B_or @ factors.A_ri, layer.get_delta_weight("default"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type in .*found 'LOHA'"),
        ({"use_dora": True}, "up_proj' in .*expected lora_magnitude_vector too, as use_dora says"),
        ({"bias": "some"}, "bias in .*found 'some'"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters in .*none of 'experts.down_proj'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save in .*none of 'lm_head'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"some_future_option": 3}, "some_future_option"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights in .*'pissa_niter_4'.*It changed the base"),
        ({"init_lora_weights": "olora"}, "It changed the base"),
        ({"init_lora_weights": "corda"}, "It changed the base"),
        ({"init_lora_weights": "loftq"}, "It changed the base"),
        ({"r": 3}, "module 'model.layers.0.*expected rank 3.*found A"),
        ({"r": 0}, "r in .*must be a positive whole number"),
        ({"lora_alpha": None}, "lora_alpha in .*found None"),
        ({"rank_pattern": {"q_proj": 2}}, "self_attn.q_proj'.*expected rank 2"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern in .*"),
        ({"rank_pattern": "q_proj"}, "rank_pattern in .*found 'q_proj'.*must be an object"),
        ({"r": True}, "r in .*found True.*must be a positive whole number"),
        ({"r": 4.5}, "r in .*found 4.5.*must be a positive whole number"),
        ({"lora_alpha": True}, "lora_alpha in .*must be a finite number"),
        ({"use_rslora": "false"}, "use_rslora in .*found 'false'. It must be true or false"),
        ({"modules_to_save": 5}, "modules_to_save in .*found 5. It must be a list of names"),
        ({"modules_to_save": "norm"}, "modules_to_save in .*found 'norm'. It must be a list of names"),
        ({"target_parameters": 5}, "target_parameters in .*found 5. It must be a list of names"),
    ],
)
def test_configurations_that_mean_something_else(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    folder = change_config(random_adapter(tmp_path / "a", SHAPES), **values)
    with pytest.raises(UserError, match=words) as caught:
        Adapter.open(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{Q_PROJ}.lora_B.weight": None}, "q_proj' in .*expected lora_B too, found only lora_A"),
        ({f"{Q_PROJ}.lora_A.weight": None}, "expected lora_A too, found only lora_B"),
        ({f"{Q_PROJ}.lora_B.bias": torch.zeros(8)}, "q_proj.lora_B.bias' in .*found neither"),
        ({f"{Q_PROJ}.lora_magnitude_vector.weight": torch.zeros(8)}, "magnitude_vector.* found neither"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 8)}, "expected lora_embedding_B too"),
        ({"base_model.model.model.norm.weight": torch.zeros(8)}, "'base_model.model.model.norm.weight' in .*neither"),
        ({"base_model.model.conv.lora_A.weight": torch.zeros(4, 3, 1, 1)}, "floating-point matrix.*4, 3, 1, 1"),
        ({f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 8, dtype=torch.int8)}, "floating-point matrix, found I8"),
        ({f"{Q_PROJ}.lora_A.weight": torch.zeros(5, 8)}, "expected rank 4, .*found A \\[5, 8\\]"),
        ({"extra": torch.zeros(1)}, "tensor 'extra' in"),
        ({"base_model.model.lm_head.weight": torch.tensor(1.0)}, "lm_head.weight' in .*vector or matrix, found F32 of"),
    ],
)
def test_tensors_that_are_not_used(tmp_path: Path, tensors: dict[str, torch.Tensor | None], words: str) -> None:
    folder = change_tensors(random_adapter(tmp_path / "a", SHAPES), **tensors)
    with pytest.raises(UserError, match=words) as caught:
        Adapter.open(folder)
    assert str(folder) in str(caught.value)


UP_PROJ = "base_model.model.model.layers.0.mlp.up_proj"
EMBEDDING = "base_model.model.model.embed_tokens"
MAGNITUDES = {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(8), f"{UP_PROJ}.lora_magnitude_vector": torch.ones(12)}
BIASES = {f"{Q_PROJ}.lora_B.bias": torch.ones(8), f"{UP_PROJ}.lora_B.bias": torch.ones(12)}
ON_EMBEDDING = {
    f"{EMBEDDING}.lora_embedding_A": torch.ones(4, 30),
    f"{EMBEDDING}.lora_embedding_B": torch.ones(8, 4),
    f"{EMBEDDING}.lora_magnitude_vector": torch.ones(8),
}
DORA, BIAS, NORM = {"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["norm"]}


@pytest.mark.parametrize(
    ("values", "tensors", "words"),
    [
        (DORA, {**MAGNITUDES, f"{Q_PROJ}.lora_magnitude_vector": None}, "q_proj' in .*lora_magnitude_vector too"),
        (DORA, {**MAGNITUDES, f"{EMBEDDING}.lora_magnitude_vector": None}, "embed_tokens' in .*lora_magnitude_vector"),
        (DORA, {f"{EMBEDDING}.lora_magnitude_vector": torch.ones(30)}, "embed_tokens.* expected 8 numbers.*found 30"),
        (DORA, {f"{UP_PROJ}.lora_magnitude_vector": torch.ones(8)}, "up_proj.lora_mag.* expected 12 numbers.*found 8"),
        (DORA, {f"{Q_PROJ}.lora_magnitude_vector": torch.ones(1)}, "q_proj.lora_mag.* expected 8 numbers.*found 1"),
        (DORA, {f"{Q_PROJ}.lora_magnitude_vector.weight": torch.ones(8)}, "lora_magnitude_vector.*vector' as well"),
        (BIAS, {f"{Q_PROJ}.lora_B.bias": None}, "q_proj' in .*lora_B.bias too, as lora_bias says"),
        (BIAS, {f"{UP_PROJ}.lora_B.bias": torch.ones(8)}, "up_proj.lora_B.bias' .* expected 12 numbers.*found 8"),
        (
            BIAS,
            {f"{UP_PROJ}.lora_A.weight": None, f"{UP_PROJ}.lora_B.weight": None},
            "up_proj.lora_B.bias' in .*expected lora_A and lora_B of .*found a bias alone",
        ),
        (
            NORM,
            {
                "base_model.model.model.norm.weight": torch.ones(8),
                "base_model.model.model.norm.base_layer.weight": torch.ones(8),
            },
            "norm.*weight' in .*expected one tensor for what it holds.*norm.*weight' as well",
        ),
        (
            DORA,
            {f"{EMBEDDING}.lora_A.weight": torch.ones(4, 8), f"{EMBEDDING}.lora_B.weight": torch.ones(30, 4)},
            "embed_tokens.lora_embedding_A' in .*expected one tensor .*found another pair for the same weight",
        ),
    ],
)
def test_tensors_that_are_lost_or_there_twice(
    tmp_path: Path, values: dict[str, Any], tensors: dict[str, torch.Tensor | None], words: str
) -> None:
    """One of many: what remains would fold without a word as another adapter."""
    folder = change_config(random_adapter(tmp_path / "a", SHAPES), **values)
    whole = {**MAGNITUDES, **ON_EMBEDDING} if values == DORA else BIASES if values == BIAS else {}
    if values != NORM:
        assert Adapter.open(change_tensors(folder, **whole)).names
    change_tensors(folder, **{**whole, **tensors})
    with pytest.raises(UserError, match=words) as caught:
        Adapter.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(tmp_path: Path, value: float) -> None:
    broken = gaussian(4, 8)
    broken[1, 2] = value
    folder = change_tensors(random_adapter(tmp_path / "a", SHAPES), **{f"{Q_PROJ}.lora_A.weight": broken})
    adapter = Adapter.open(folder)  # tensors are read only when asked for
    with pytest.raises(UserError, match=r"q_proj.lora_A.weight' in .*adapter_model.safetensors.*found NaN or Inf"):
        adapter.factors("model.layers.0.self_attn.q_proj.weight")


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing: expected an adapter .*no such folder"):
        Adapter.open(tmp_path / "missing")
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(UserError, match=r"found adapter_model.bin.*safe_serialization"):
        Adapter.open(tmp_path)
    folder = random_adapter(tmp_path / "a", SHAPES)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config.json: expected a LoRA adapter"):
        Adapter.open(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config.json: expected a file"):
        Adapter.open(folder)
    (folder / "adapter_config.json").mkdir()
    with pytest.raises(UserError, match=r"adapter_config.json: expected a file, found a folder"):
        Adapter.open(folder)
    save_file({}, random_adapter(tmp_path / "b", SHAPES) / "adapter_model.safetensors")
    with pytest.raises(UserError, match="expected LoRA tensors, found none"):
        Adapter.open(tmp_path / "b")


def test_a_path_must_stay_inside_its_root(tmp_path: Path) -> None:
    random_adapter(tmp_path / "run" / "a", SHAPES)
    random_adapter(tmp_path / "outside", SHAPES)
    assert Adapter.open("a", root=tmp_path / "run").names
    with pytest.raises(UserError, match=r"inside this folder, found '../outside'"):
        Adapter.open("../outside", root=tmp_path / "run")
