"""Fused kernels chosen for machine and model, kept to by a run, and gone where a branch ends."""

from __future__ import annotations

from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import liger_stand_in
import pytest
import torch
from conftest import GERMAN
from peft import LoraConfig, get_peft_model
from trainer_runs import arguments, lora, rows
from transformers import Gemma3TextConfig, GPTNeoConfig, LlamaConfig
from typer.testing import CliRunner
from versions import before

from bam_lora import BamConfig, BamTrainer, check_report, doctor_device, kernels, run_choices
from bam_lora.attention import Recorded
from bam_lora.base import Loading, load_model
from bam_lora.check_machine import Machine
from bam_lora.cli import app
from bam_lora.doctor_finding import NOTE, OK, PROBLEM
from bam_lora.errors import UserError
from bam_lora.front import Front
from bam_lora.kernels import choose_kernels, fused
from bam_lora.loop import run
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.run_choices import settle_kernels
from bam_lora.rundir import RunDirectory, recipe_key
from bam_lora.store import read_record, write_record
from bam_lora.views import branch_view


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved(LlamaConfig(hidden_size=64, num_attention_heads=4), tmp_path / "llama")


def saved(config: Any, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


def machine(monkeypatch: pytest.MonkeyPatch, *, version: str | None = "0.8.5", capability: int = 8) -> None:
    """A machine with a GPU and a liger-kernel."""

    def found(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(kernels.metadata, "version", found)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))


def test_auto_takes_them_only_where_everything_fits(
    monkeypatch: pytest.MonkeyPatch, llama: Path, tmp_path: Path
) -> None:
    machine(monkeypatch)
    assert choose_kernels("auto", llama, "cuda:0") == choose_kernels("liger", llama, "cuda:0") == "liger"
    assert choose_kernels("none", llama, "cuda:0") is None
    for device in ("cpu", "mps", "xpu:0"):
        assert choose_kernels("auto", llama, device) is None
    unknown = saved(GPTNeoConfig(), tmp_path / "neo")
    other = saved(LlamaConfig(hidden_act="gelu"), tmp_path / "gelu")
    assert choose_kernels("auto", unknown, "cuda:0") is choose_kernels("auto", other, "cuda:0") is None
    gemma = saved(Gemma3TextConfig(hidden_size=64), tmp_path / "gemma")
    assert choose_kernels("auto", gemma, "cuda:0") == "liger"
    machine(monkeypatch, capability=7)
    assert choose_kernels("auto", llama, "cuda:0") is None
    assert choose_kernels("liger", llama, "cuda:0") == "liger"
    machine(monkeypatch, version=None)
    assert choose_kernels("auto", llama, "cuda:0") is None
    machine(monkeypatch, version="0.8.1")
    assert choose_kernels("auto", llama, "cuda:0") is None


def test_by_name_where_they_cannot_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch, llama: Path, tmp_path: Path
) -> None:
    def refused(folder: Path, device: str, words: str) -> None:
        with pytest.raises(UserError, match=rf"^training\.kernels: liger: expected {words}"):
            choose_kernels("liger", folder, device)

    machine(monkeypatch)
    refused(llama, "cpu", "a GPU, found device cpu")
    refused(saved(GPTNeoConfig(), tmp_path / "neo"), "cuda:0", "a model of one .* gemma, .*, found gpt_neo")
    other = saved(LlamaConfig(hidden_act="gelu"), tmp_path / "gelu")
    refused(other, "cuda:0", "a model with the activation silu or swish, found gelu")
    install = r".* Run pip install 'bam-lora\[kernels\]', or leave it at auto"
    machine(monkeypatch, version="0.5.10")
    refused(llama, "cuda:0", f"the package .*, found liger-kernel 0.5.10{install}")
    machine(monkeypatch, version=None)
    refused(llama, "cuda:0", f"the package liger-kernel, 0.8.5 or newer, and triton, found no liger-kernel{install}")
    machine(monkeypatch)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    refused(llama, "cuda:0", f".*found no triton{install}")


def recipe(base: Path, german: Path, **training: Any) -> Recipe:
    values = {
        "base": str(base),
        "output": "unused",
        "data": {"target": [{"path": str(german)}], "sequence_length": 64},
        "bam": {"slices": 2, "branches": 2},
        "lora": {"r": 4},
        "evaluation": {"target": [{"path": str(german), "documents": 2}]},
        "training": {"max_steps": 2, "per_device_train_batch_size": 1, **training},
    }
    return recipe_from_dict(values)


def test_check_says_at_once_that_they_cannot_be_had(tiny_base: Path, german_file: Path) -> None:
    wanted = recipe(tiny_base, german_file, kernels="liger")
    with pytest.raises(UserError, match=r"training\.kernels: liger: expected a GPU, found device cpu"):
        check_report.check_everything(wanted, gpu_memory=None, fit=False, measure=False)
    planned = check_report.check_everything(wanted, gpu_memory="24GB", fit=False, measure=False)
    assert isinstance(planned.resources.machine, Machine)


@pytest.mark.parametrize("key", ["use_liger_kernel", "liger_kernel_config"])
def test_trls_own_names_are_answered_with_ours(tmp_path: Path, german_file: Path, key: str) -> None:
    with pytest.raises(
        UserError, match=rf"training\.{key}: not set here: say training\.kernels: liger, or none, instead"
    ):
        recipe(tmp_path, german_file, **{key: None})


def test_a_choice_by_name_makes_another_run(tmp_path: Path, german_file: Path) -> None:
    usual, none, liger = (recipe(tmp_path, german_file, kernels=one) for one in ("auto", "none", "liger"))
    assert len({recipe_key(one) for one in (usual, none, liger)}) == 3
    assert recipe_key(usual) == recipe_key(recipe(tmp_path, german_file))
    assert "kernels" not in usual.training.sft_arguments()


@pytest.fixture
def begun(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    write_record(directory.environment, "environment", {"threads": 1})
    return directory


def test_a_run_keeps_the_kernels_it_began_with(
    begun: RunDirectory, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch)
    monkeypatch.setattr(run_choices, "device", lambda: "cuda")
    assert settle_kernels(begun, "auto", llama) == ("liger", None)
    assert (read_record(begun.environment) or {})["kernels"] == "liger"
    assert settle_kernels(begun, "auto", llama) == ("liger", None)
    machine(monkeypatch, version=None)
    note = "kernels were liger so far, which this machine or model cannot have: now none"
    assert settle_kernels(begun, "auto", llama) == (None, note)
    assert settle_kernels(begun, "none", llama) == (None, None)


def test_a_run_that_began_without_goes_on_without(
    begun: RunDirectory, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settle_kernels(begun, "auto", llama) == (None, None)
    machine(monkeypatch)
    monkeypatch.setattr(run_choices, "device", lambda: "cuda")
    assert settle_kernels(begun, "auto", llama) == (None, None)
    assert choose_kernels("auto", llama, "cuda", before=Recorded("liger")) == "liger"
    write_record(begun.environment, "environment", {"threads": 1})  # by an earlier version
    write_record(begun.plan, "plan", {})
    assert settle_kernels(begun, "auto", llama) == (None, None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    return liger_stand_in.install(monkeypatch)


def test_what_is_patched_ends_with_the_branch(tiny_base: Path, calls: Counter[str]) -> None:
    base = load_model(tiny_base, Loading(16, compute_dtype="float32"))
    tokens = torch.arange(3, 20)[None]
    view = get_peft_model(branch_view(base), LoraConfig(r=2, target_modules="all-linear"))
    with fused(view, "liger"):
        view(input_ids=tokens)
        assert calls == {"models": 1, "rope": 2, "norm": 2}
        assert not liger_stand_in.untouched()
    assert liger_stand_in.untouched()
    base(input_ids=tokens)
    assert calls == {"models": 1, "rope": 2, "norm": 2}
    with fused(view, None):
        base(input_ids=tokens)
        assert liger_stand_in.untouched()
    with pytest.raises(RuntimeError, match="must match the size"), fused(view, "liger"):
        view(input_ids=tokens, position_ids=torch.zeros(1, 3))
    assert liger_stand_in.untouched()


def test_a_model_that_liger_leaves_as_it_is_is_a_fault_of_ours(calls: Counter[str]) -> None:
    from transformers import GPTNeoForCausalLM

    config = GPTNeoConfig(hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]], vocab_size=32)
    view = get_peft_model(GPTNeoForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AssertionError, match="GPTNeoForCausalLM"), fused(view, "liger"):
        pass


def test_all_branches_of_a_run_go_through_them_and_nothing_else_does(
    tiny_base: Path, german_file: Path, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_choices, "choose_kernels", lambda *given, **before: "liger")
    seen: list[Counter[str]] = []

    class Watch(Front):
        def branch_begin(self, branch: Any) -> None:
            assert liger_stand_in.untouched()
            seen.append(calls.copy())

        def branch_end(self, branch: Any, facts: Any) -> None:
            assert liger_stand_in.untouched()
            seen.append(calls.copy())

    wanted = recipe(tiny_base, german_file)
    report = run(wanted, tmp_path / "run", front=Watch(wanted))
    assert [one["models"] for one in seen] == [0, 1, 1, 2]
    assert seen[0]["rope"] == 0 < seen[1]["rope"] == seen[2]["rope"] < seen[3]["rope"]
    assert [one["branch"] for one in report["scores"]] == [None, 1, 2, None]
    assert calls == seen[3]  # scoring, merge and fold went by
    record = read_record(RunDirectory(tmp_path / "run").environment) or {}
    assert record["kernels"] == "liger"


@pytest.mark.skipif(
    before("trl", "1.16"), reason="TRL 1.10 trains with the loss of Liger, too, which the stand-in has not"
)
@pytest.mark.filterwarnings("ignore:.use_liger_kernel=True. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:liger-kernel did not return token_accuracy:UserWarning")  # TRL before 1.15
def test_a_script_that_asks_for_them_has_them_in_every_branch(
    tiny_base: Path, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    chosen = {"cross_entropy": True}
    if before("trl", "1.15"):
        chosen["fused_linear_cross_entropy"] = False  # which TRL sets since
    args = arguments(tmp_path / "run", use_liger_kernel=True, liger_kernel_config=chosen, max_steps=2)
    ours = BamTrainer(
        str(tiny_base), args, train_dataset=rows(GERMAN[::4]), peft_config=lora(), bam=BamConfig(slices=2, branches=2)
    )
    ours.train()
    assert calls["models"] == 2
    assert calls["rope"] > 0
    assert liger_stand_in.untouched()
    kept = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "kernels: liger" in kept
    assert "use_liger_kernel: true" in kept


def test_doctor_tries_them_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor_device.fused_kernels()) == []
    monkeypatch.setattr("bam_lora.base.device", lambda: "cuda")
    machine(monkeypatch, version=None)
    monkeypatch.setattr(doctor_device.sys, "platform", "linux")
    (found,) = doctor_device.fused_kernels()
    assert (found.status, found.remedy) == (NOTE, "pip install 'bam-lora[kernels]'")
    assert "found no liger-kernel" in found.text
    machine(monkeypatch)
    for error, status, words in ((1e-6, OK, "as torch does"), (0.5, PROBLEM, "a norm is off by 50.0%")):
        monkeypatch.setattr(doctor_device, "norm_error", lambda error=error: error)
        (found,) = doctor_device.fused_kernels()
        assert (found.status, found.text.startswith("liger-kernel 0.8.5")) == (status, True)
        assert words in found.text

    def fails() -> float:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(doctor_device, "norm_error", fails)
    (found,) = doctor_device.fused_kernels()
    assert (found.status, found.text) == (PROBLEM, "liger-kernel 0.8.5 fails: Failed to find C compiler")


def test_doctor_advises_no_package_that_would_not_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bam_lora.base.device", lambda: "cuda")
    machine(monkeypatch, version=None, capability=7)
    assert list(doctor_device.fused_kernels()) == []
    machine(monkeypatch, version=None)
    with monkeypatch.context() as patch:
        patch.setattr(doctor_device.sys, "platform", "win32")  # where the extra brings nothing
        assert list(doctor_device.fused_kernels()) == []
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert list(doctor_device.fused_kernels()) == []


def test_the_command_names_the_key(tiny_base: Path, german_file: Path, tmp_path: Path) -> None:
    text = f"base: {tiny_base}\noutput: run\ndata: {{target: [{{path: {german_file}}}]}}\n"
    (tmp_path / "recipe.yaml").write_text(text + "training: {kernel: liger}\n")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 1
    assert "unknown key; did you mean kernels?" in " ".join(result.output.split())
