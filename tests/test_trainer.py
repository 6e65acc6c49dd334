"""`BamTrainer` against plain `SFTTrainer`, and as its users meet it."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ENGLISH, GERMAN
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from trainer_runs import arguments, bam_trainer, lora, plain_adapter, rows, same
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from bam_lora import BamConfig, BamTrainer, UserError
from bam_lora.store import read_record

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "quantization"),
    [
        ({}, None),
        ({}, NF4),
        ({"packing": False, "max_length": 24}, None),
        pytest.param(
            {"packing_strategy": "bfd", "max_length": 24, "shuffle_dataset": True}, None, marks=pytest.mark.slow
        ),
        ({"max_steps": 5, "warmup_steps": 2, "lr_scheduler_type": "cosine"}, NF4),
    ],
)  # fmt: skip
def test_one_slice_and_one_branch_are_the_plain_trainer(
    tmp_path: Path, tiny_base: Path, changes: dict[str, Any], quantization: Any
) -> None:
    dataset = rows(GERMAN)
    trainer = BamTrainer(
        str(tiny_base), arguments(tmp_path / "run", **changes), BamConfig(slices=1, branches=1),
        train_dataset=dataset, peft_config=lora(), quantization_config=quantization,
    )  # fmt: skip
    trainer.train()
    ours = load_file(tmp_path / "run" / "iterations" / "01" / "branch-1" / "adapter" / "adapter_model.safetensors")
    theirs = plain_adapter(
        tmp_path, tiny_base, arguments(tmp_path / "other", **changes), dataset, quantization_config=quantization
    )
    same(ours, theirs)


class Recorder(TrainerCallback):
    """Notes every event by name."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("train")

    def on_branch_begin(self, args: Any, state: Any, control: Any, iteration: int, branch: int, **kwargs: Any) -> None:
        self.events.append(f"begin {iteration}.{branch}")

    def on_branch_end(self, args: Any, state: Any, control: Any, facts: dict[str, Any], **kwargs: Any) -> None:
        assert facts["steps"] > 0
        self.events.append("end")

    def on_merge(self, args: Any, state: Any, control: Any, merge: dict[str, Any], **kwargs: Any) -> None:
        self.events.append(f"merge {merge['weights']}")

    def on_fold(self, args: Any, state: Any, control: Any, folder: Path, **kwargs: Any) -> None:
        assert (folder / "config.json").is_file()
        self.events.append("fold")

    def on_iteration_end(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        assert {"eval_target_bits_per_byte", "eval_source_bits_per_byte"} <= metrics.keys()
        self.events.append("iteration")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[BamTrainer, Any, Recorder]:
    recorder = Recorder()
    trainer = bam_trainer(
        tmp_path_factory.mktemp("bam") / "run", tiny_base, args={"max_length": 128}, callbacks=[recorder]
    )
    return trainer, trainer.train(), recorder


def test_a_run_learns_and_says_so(finished: tuple[BamTrainer, Any, Recorder]) -> None:
    trainer, output, recorder = finished
    root = Path(trainer.args.output_dir)
    report = json.loads((root / "report.json").read_text())
    assert report["summary"]["learned"] > 0.1
    assert output.global_step == trainer.state.global_step == trainer.state.max_steps
    assert output.metrics["eval_target_bits_per_byte"] == report["summary"]["target_after"]
    one = ["begin 1.1", "train", "end", "begin 1.2", "train", "end", "merge [0.5, 0.5]", "fold", "iteration"]
    two = [event.replace(" 1.", " 2.") for event in one]
    # The first merged model is folded when the second iteration needs it: to be scored at the latest.
    assert recorder.events == one + two
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == sorted(steps)
    places = {(entry["iteration"], entry.get("branch")) for entry in trainer.state.log_history if "iteration" in entry}
    assert places == {(1, 1), (1, 2), (1, None), (2, 1), (2, 2), (2, None)}


def pieces(row: dict[str, Any]) -> list[list[int]]:
    ends = np.cumsum(row["seq_lengths"])
    return [row["input_ids"][end - length : end] for end, length in zip(ends, row["seq_lengths"], strict=True)]


def test_no_token_is_lost_and_replay_is_exact(finished: tuple[BamTrainer, Any, Recorder], tiny_base: Path) -> None:
    trainer, _, _ = finished
    plan = read_record(trainer.directory.plan)
    assert plan is not None
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    expected = sum(len(tokenizer(text + "</s>")["input_ids"]) for text in GERMAN)
    (part,) = plan["parts"]
    assert sum(one["target_tokens"] for one in part["slices"]) == expected == plan["data"]["target_tokens"]
    for one in part["slices"]:
        assert one["dropped_tokens"] == 0
        assert one["replay_tokens"] == round(one["target_tokens"] / 4)
    data = Dataset.from_file(str(trainer.directory.data("01") / "rows.arrow"))
    slices = [data.select(range(*one["rows"])) for one in part["slices"]]
    assert [sum(map(len, rows["input_ids"])) for rows in slices] == [
        one["target_tokens"] + one["replay_tokens"] for one in part["slices"]
    ]
    seen = [tuple(piece) for rows_of_slice in slices for row in rows_of_slice for piece in pieces(row)]
    german = [tuple(tokenizer(text + "</s>")["input_ids"]) for text in GERMAN]
    assert sorted(piece for piece in seen if piece in set(german)) == sorted(german)  # none twice, none lost


def test_the_result_is_a_plain_model(
    finished: tuple[BamTrainer, Any, Recorder], tmp_path: Path, tiny_base: Path
) -> None:
    trainer, _, _ = finished
    trainer.save_model(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(GERMAN[0])["input_ids"] == AutoTokenizer.from_pretrained(tiny_base)(GERMAN[0])["input_ids"]
    assert not torch.equal(
        model.model.layers[0].mlp.down_proj.weight,
        AutoModelForCausalLM.from_pretrained(tiny_base).model.layers[0].mlp.down_proj.weight,
    )
    (tmp_path / "out" / "model.safetensors").write_bytes(b"of an earlier run")
    trainer.save_model(tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == model.num_parameters()
    assert not list((tmp_path / "out").glob(".tmp-*"))
    trainer.create_model_card(license="mit")
    assert "license: mit" in (trainer.directory.model / "README.md").read_text()


def test_evaluate_gives_loss_and_bits(finished: tuple[BamTrainer, Any, Recorder]) -> None:
    trainer, output, _ = finished
    metrics = trainer.evaluate()
    assert metrics["eval_target_bits_per_byte"] == output.metrics["eval_target_bits_per_byte"]
    assert metrics["eval_target_loss"] < metrics["eval_source_loss"]
    other = trainer.evaluate(rows(GERMAN[:4]))
    assert "eval_loss" in other
    assert "eval_target_bits_per_byte" not in other


def test_training_again_finds_all_done(finished: tuple[BamTrainer, Any, Recorder], tiny_base: Path) -> None:
    trainer, output, _ = finished
    again = bam_trainer(Path(trainer.args.output_dir), tiny_base, args={"max_length": 128})
    assert again.train(resume_from_checkpoint=True).global_step == output.global_step
    losses = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert losses == [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    with pytest.raises(UserError, match="no run"):
        again.train(resume_from_checkpoint=False)
    with pytest.raises(UserError, match=r"other values for .*learning_rate"):
        bam_trainer(Path(trainer.args.output_dir), tiny_base, args={"learning_rate": 1e-3}).train()
    with pytest.raises(UserError, match="train_dataset"):
        bam_trainer(Path(trainer.args.output_dir), tiny_base, train_dataset=rows(GERMAN[:-1])).train()


class StopAfter(TrainerCallback):
    """Stops the process's run in the middle of a branch, as a kill would."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    finished: tuple[BamTrainer, Any, Recorder], tmp_path: Path, tiny_base: Path
) -> None:
    whole, output, _ = finished
    args = {"max_length": 128, "save_steps": 8}
    with pytest.raises(KeyboardInterrupt):
        bam_trainer(tmp_path / "run", tiny_base, args=args, callbacks=[StopAfter(12)]).train()
    trainer = bam_trainer(tmp_path / "run", tiny_base, args=args)
    assert trainer.train(resume_from_checkpoint=True).global_step == output.global_step
    for branch in ("01/branch-1", "01/branch-2", "02/branch-2"):
        path = Path("iterations") / branch / "adapter" / "adapter_model.safetensors"
        same(load_file(trainer.directory.root / path), load_file(whole.directory.root / path))
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == sorted(set(steps))


def test_the_command_line_reads_the_run(finished: tuple[BamTrainer, Any, Recorder], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from bam_lora.cli import app

    root = str(finished[0].directory.root)
    runner = CliRunner()
    for command in (["status", root], ["report", root], ["export", root, "--output", str(tmp_path / "a")],
                    ["shrink", root, "--scale", "0.5"]):  # fmt: skip
        result = runner.invoke(app, command)
        assert result.exit_code == 0, (command, result.output)
    result = runner.invoke(app, ["run", f"{root}/recipe.yaml", "--output", root])
    assert result.exit_code == 1
    assert "BamTrainer" in result.output


def test_a_loaded_model_needs_its_path(tmp_path: Path, tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with pytest.raises(UserError, match=r"BamConfig\(base=\.\.\.\)"):
        BamTrainer(model, arguments(tmp_path / "x"), BamConfig(), train_dataset=rows(GERMAN), peft_config=lora())
    before = copy.deepcopy(model.state_dict())
    trainer = BamTrainer(
        model, arguments(tmp_path / "ours"), BamConfig(slices=1, branches=1, base=str(tiny_base)),
        train_dataset=rows(GERMAN), peft_config=lora(),
    )  # fmt: skip
    trainer.train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # the caller's model stays the caller's
    theirs = plain_adapter(tmp_path, tiny_base, arguments(tmp_path / "plain-run"), rows(GERMAN))
    path = tmp_path / "ours" / "iterations" / "01" / "branch-1" / "adapter" / "adapter_model.safetensors"
    same(load_file(path), theirs)


def test_steps_of_the_run_are_shared_out(tmp_path: Path, tiny_base: Path) -> None:
    trainer = bam_trainer(
        tmp_path / "run", tiny_base,
        args={"max_steps": 14, "warmup_steps": 6, "logging_steps": 1,
              "eval_strategy": "steps", "eval_steps": 8, "save_steps": 6},
        bam=BamConfig(slices=3, branches=2), eval_dataset={"target": rows(GERMAN[:3]), "source": rows(ENGLISH[:3])},
    )  # fmt: skip
    assert trainer.train().global_step == 14
    evaluated = [entry for entry in trainer.state.log_history if "eval_target_loss" in entry]
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert max(rates) == 5e-3  # reached: a branch warms up for two of its steps
    assert len(evaluated) >= 3  # every third step of a branch of four or five
    assert len({(entry["iteration"], entry["branch"]) for entry in evaluated}) == 3


def test_another_trainer_class(tmp_path: Path, tiny_base: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    pairs = Dataset.from_dict({
        "prompt": [text.partition(". ")[0] for text in GERMAN],
        "chosen": [text.partition(". ")[2] for text in GERMAN],
        "rejected": [text.partition(". ")[2] for text in ENGLISH],
    })  # fmt: skip
    args = DPOConfig(
        str(tmp_path / "run"), per_device_train_batch_size=4, use_cpu=True, report_to="none", max_length=96
    )
    trainer = BamTrainer(
        str(tiny_base), args, BamConfig(slices=2, branches=2), train_dataset=pairs, peft_config=lora(),
        trainer_cls=DPOTrainer,
    )  # fmt: skip
    assert trainer.train().global_step == 2 * 9 * 3  # DPOConfig trains three epochs
    plan = read_record(trainer.directory.plan)
    assert plan is not None
    assert [one["target_tokens"] for one in plan["parts"][0]["slices"]] == [36, 36]
    assert plan["data"]["sources"][0]["unit"] == "examples"


def test_what_cannot_work_is_said_at_once(tmp_path: Path, tiny_base: Path) -> None:
    from peft import PrefixTuningConfig

    good: dict[str, Any] = {"train_dataset": rows(GERMAN), "peft_config": lora()}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
         {"eval_dataset": rows(GERMAN[:2])}, "load_best_model_at_end"),
        ({}, {"train_dataset": None}, "train_dataset"),
        ({}, {"train_dataset": GERMAN}, "train_dataset"),
        ({}, {"peft_config": PrefixTuningConfig(num_virtual_tokens=3)}, "LoraConfig"),
        ({}, {"peft_config": LoraConfig(init_lora_weights="pissa")}, "init_lora_weights"),
        ({}, {"bam": BamConfig(slices=0)}, r"BamConfig\(slices\)"),
        ({}, {"bam": BamConfig(weights="learned")}, "selection"),
        ({"auto_find_batch_size": True}, {}, "auto_find_batch_size"),
    ]  # fmt: skip
    for args, changes, expected in cases:
        with pytest.raises(UserError, match=expected):
            BamTrainer(str(tiny_base), arguments(tmp_path / "x", **args), **{**good, **changes})
    assert not (tmp_path / "x").exists()


class FakeTracker(TrainerCallback):
    """A tracker as transformers knows them: made from `report_to`, one run from train begin to end."""

    runs: list[dict[str, Any]]

    def __init__(self) -> None:
        self.folder = os.environ["TENSORBOARD_LOGGING_DIR"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        group = os.environ["WANDB_RUN_GROUP"]
        self.runs.append({"name": args.run_name, "folder": self.folder, "group": group, "steps": []})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.runs[-1]["steps"].append(state.global_step)


def test_trackers_get_a_run_per_branch_and_one_of_the_merged_models(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", FakeTracker)
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    FakeTracker.runs = []
    trainer = bam_trainer(tmp_path / "run", tiny_base, args={"report_to": "tensorboard", "run_name": "märchen"},
                          bam=BamConfig(slices=2, branches=2))  # fmt: skip
    trainer.train()
    assert [run["name"] for run in FakeTracker.runs] == [
        "märchen-iteration-01-branch-1", "märchen-iteration-01-branch-2", "märchen-merged",
    ]  # fmt: skip
    assert {run["group"] for run in FakeTracker.runs} == {"märchen"}
    assert len({run["folder"] for run in FakeTracker.runs}) == 3
    plan = read_record(trainer.directory.plan)
    assert plan is not None
    assert FakeTracker.runs[-1]["steps"] == [0, plan["data"]["train_tokens"]]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_the_result_is_published(finished: tuple[BamTrainer, Any, Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            calls["token"] = token

        def create_repo(self, name: str, **details: Any) -> Any:
            calls["name"] = name
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, **details: Any) -> str:
            calls.update(details, files=sorted(path.name for path in Path(details["folder_path"]).iterdir()))
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    trainer = finished[0]
    assert trainer.push_to_hub("done") == "https://hub/commit"
    assert calls["repo_id"] == "me/run"
    assert calls["commit_message"] == "done"
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(calls["files"])
