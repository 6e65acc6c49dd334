"""The rivals of the GPU benchmark: TRL's ways run, a branch of ours learns as TRL does, unequal curves are told."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import GERMAN, write_jsonl

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu" / "peers"
TRL_WAYS = ("trl-defaults", "trl-best", "trl-best-fp32")
STEPS = 5


def load(name: str) -> ModuleType:
    """A module by its path, under a name that no other benchmark's has; theirs of each other's begin with peer_."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmarks_gpu_peers_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


job, curves, environments = load("job"), load("curves"), load("environments")
peer_settings = sys.modules["peer_settings"]


@pytest.fixture(scope="module")
def settings(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    texts = [text[: 15 + 13 * number % 80] for number, text in enumerate(GERMAN * 3)]  # so that rows hold several
    text = write_jsonl(tmp_path_factory.mktemp("peers") / "text.jsonl", texts)
    return peer_settings.Settings(
        base=str(tiny_base), text=str(text), length=128, batch=2, accumulation=2, steps=STEPS, rank=4,
        checkpointing=False, learning_rate=1e-2, seed=3, device="cpu", way="trl-best", attention="sdpa",
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(settings: Any) -> dict[str, dict[str, Any]]:
    """One run a way; and of TRL's best two that begin as other adapters, one of them over rows in another order."""
    changes = {
        **{way: {"way": way} for way in (*TRL_WAYS, "ours")},
        "other adapter": {"way": "trl-best-fp32", "seed": 4, "order_seed": 3},
        "other order": {"way": "trl-best-fp32", "seed": 4},
        "other rate": {"way": "ours", "learning_rate": 1.1e-2},
        "checkpointing": {"way": "trl-best", "checkpointing": True},
    }
    return {name: job.run(dataclasses.replace(settings, **change)) for name, change in changes.items()}


def test_a_result_has_what_the_contract_names(results: dict[str, Any]) -> None:
    for way in (*TRL_WAYS, "ours"):
        result = results[way]
        assert result["way"] == way
        assert [len(result[key]) for key in ("losses", "step_seconds", "tokens")] == [STEPS] * 3
        assert min(result["step_seconds"]) > 0
        assert result["peak_driver_bytes"] > 0
        assert result["peak_torch_bytes"] is None  # on a CPU
        assert result["versions"]["trl"]
        assert result["losses"][-1] < result["losses"][0]


def test_a_branch_of_ours_learns_as_trl_at_its_best(results: dict[str, Any]) -> None:
    best, ours = results["trl-best-fp32"], results["ours"]
    assert curves.tolerance_of(best).source == "rounding"
    verdict = curves.compare(best, ours, curves.tolerance_of(best))
    assert verdict.equal, verdict.reason
    assert verdict.largest == 0  # with the same attention, bit by bit
    assert verdict.steps == STEPS


def test_adapters_in_bf16_differ_less_than_other_starts(results: dict[str, Any]) -> None:
    best, ours = results["trl-best"], results["ours"]
    tolerance = curves.tolerance_of(best, seeds=[results["trl-best-fp32"], results["other adapter"]])
    verdict = curves.compare(best, ours, tolerance)
    assert verdict.equal, verdict.reason
    assert best["losses"] != ours["losses"]


def test_another_adapter_or_rate_is_no_equal_curve(results: dict[str, Any]) -> None:
    best = results["trl-best-fp32"]
    for name in ("other adapter", "other rate"):
        verdict = curves.compare(best, results[name], curves.tolerance_of(best))
        assert not verdict.equal, name
        assert "step" in verdict.reason


def test_rows_in_another_order_are_not_compared(results: dict[str, Any]) -> None:
    best = results["trl-best-fp32"]
    with pytest.raises(curves.NotComparable, match="same rows in the same order"):
        curves.compare(best, results["other order"], curves.tolerance_of(best))


def test_only_the_defaults_pad_and_checkpoint(results: dict[str, Any]) -> None:
    said = {way: results[way]["effective"] for way in (*TRL_WAYS, "ours")}
    assert [said[way]["packing"] for way in said] == [False, True, True, True]
    assert [said[way]["checkpointing"] for way in said] == [True, False, False, False]
    assert [said[way]["adapter_dtypes"] for way in said] == [["bfloat16"], ["bfloat16"], ["float32"], ["float32"]]
    assert len({(one["adapter_parameters"], one["linear_4bit"], one["max_length"]) for one in said.values()}) == 1
    assert said["trl-best"]["rows"] == said["ours"]["rows"]
    assert "checkpointing" in said["trl-defaults"]["not_as_set"]
    full = 128 * 2 * 2
    assert max(results["trl-defaults"]["tokens"]) < 0.8 * full  # padding does not count
    assert 0.9 * full < min(results["trl-best"]["tokens"]) <= max(results["trl-best"]["tokens"]) <= full


def test_checkpointing_as_the_settings_say_changes_no_loss(results: dict[str, Any]) -> None:
    best, checkpointed = results["trl-best"], results["checkpointing"]
    assert checkpointed["effective"]["checkpointing"] is True
    assert curves.compare(best, checkpointed, curves.tolerance_of(best)).equal


def test_recorded_losses_are_those_that_the_trainer_logs(settings: Any, tmp_path: Path) -> None:
    peer_trl, recording = sys.modules["peer_trl"], sys.modules["peer_recording"]
    given = dataclasses.replace(settings, steps=2)
    trainer = peer_trl.make_trainer(given, tmp_path, {**peer_trl.best_arguments(given), "logging_steps": 1})
    recorder = recording.Recorder(lambda: None)
    recorder.attach(trainer)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert recorder.losses == pytest.approx(logged, rel=1e-4)


def script(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs job.py as a script, in this process: the libraries are here already."""
    for name in job.QUIET:
        monkeypatch.setenv(name, os.environ.get(name, job.QUIET[name]))
    monkeypatch.setattr(sys, "argv", ["job.py", str(file)])
    runpy.run_path(str(FOLDER / "job.py"), run_name="__main__")


def test_the_script_prints_the_result_last(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**dataclasses.asdict(settings), "steps": 1}))
    script(file, monkeypatch)
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["losses"]) == 1
    file.write_text("{}")
    with pytest.raises(SystemExit, match="missing: accumulation, base"):
        script(file, monkeypatch)


def test_settings_name_what_is_wrong(settings: Any, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    good = dataclasses.asdict(settings)
    for change, words in (
        ({"lenght": 3}, "unknown: lenght"),
        ({"way": "best"}, "way: expected one of trl-defaults"),
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(peer_settings.BadSettings, match=words):
            peer_settings.Settings.read(file)
    file.write_text(json.dumps({key: value for key, value in good.items() if key != "rank"}))
    with pytest.raises(peer_settings.BadSettings, match="missing: rank"):
        peer_settings.Settings.read(file)


def recorded(micro_batches: list[tuple[list[list[int]], list[list[int]] | None, float]]) -> Any:
    """A recorder that has seen one step of (tokens, mask, loss)."""
    import torch

    recorder = sys.modules["peer_recording"].Recorder(lambda: None)
    losses = iter([loss for _, _, loss in micro_batches])
    trainer = SimpleNamespace(
        training_step=lambda model, inputs: torch.tensor(next(losses)), add_callback=lambda callback: None
    )
    recorder.attach(trainer)
    recorder.begin()
    for tokens, mask, _ in micro_batches:
        given = {"input_ids": torch.tensor(tokens)}
        trainer.training_step(None, given if mask is None else {**given, "attention_mask": torch.tensor(mask)})
    recorder.step_end()
    return recorder


def test_a_step_is_the_sum_of_its_micro_batches() -> None:
    recorder = recorded([([[5, 6, 7]], None, 1.5), ([[8, 9, 0]], [[1, 2, 0]], 0.25)])
    assert recorder.losses == [1.75]
    assert recorder.tokens == [5]


def test_checksums_tell_tokens_rows_and_micro_batches_apart() -> None:
    one, other = ([[1, 2, 3]], None, 0.0), ([[4, 5, 6]], None, 0.0)
    swapped = ([[1, 3, 2]], None, 0.0)
    same = recorded([one, other]).checksums
    assert same == recorded([one, other]).checksums
    assert same != recorded([other, one]).checksums
    assert same != recorded([swapped, other]).checksums
    padded = ([[1, 2, 3, 0]], [[1, 1, 1, 0]], 0.0)
    assert recorded([padded, other]).checksums == same


def curve(*losses: float) -> dict[str, Any]:
    return {"way": "made", "losses": list(losses), "tokens": [8] * len(losses), "checksums": [*range(len(losses))]}


def test_tolerances_are_the_largest_of_three() -> None:
    base, repeat, start = curve(4.0, 2.0), curve(4.0, 2.01), curve(4.0, 2.1)
    assert curves.tolerance_of(base) == curves.Tolerance(pytest.approx(3e-4), "rounding")
    assert curves.tolerance_of(base, repeats=[base, repeat]) == curves.Tolerance(pytest.approx(0.03), "repeats")
    found = curves.tolerance_of(base, repeats=[base, repeat], seeds=[base, start])
    assert found == curves.Tolerance(pytest.approx(0.05), "seeds")


@pytest.mark.parametrize(("last", "equal"), [(2.02, True), (2.04, False), (1.96, False), (float("nan"), False)])
def test_one_step_beyond_the_tolerance_is_enough(last: float, equal: bool) -> None:
    assert curves.compare(curve(4.0, 2.0), curve(4.0, last), curves.Tolerance(0.03, "repeats")).equal is equal


def test_curves_of_other_lengths_are_not_compared() -> None:
    with pytest.raises(curves.NotComparable, match="expected as many steps, found 2 and 1"):
        curves.compare(curve(4.0, 2.0), curve(4.0), curves.Tolerance(1.0, "rounding"))


def test_peers_are_given_what_trl_is(settings: Any, tmp_path: Path) -> None:
    trl = load("peer_trl")
    best, adapter = trl.best_arguments(settings), trl.adapter(settings)
    unsloth = load("peer_unsloth")
    for name, value in unsloth.arguments(settings, tmp_path).items():
        assert value == best.get(name, value), name
    axolotl = load("peer_axolotl").config(settings, tmp_path)
    same = {"optimizer": "optim", "lr_scheduler": "lr_scheduler_type", "warmup_steps": "warmup_steps"}
    assert {name: axolotl[name] for name in same} == {name: best[other] for name, other in same.items()}
    for found, names in (
        (unsloth.adapter(settings), ("r", "lora_alpha", "lora_dropout")),
        (axolotl, ("lora_r", "lora_alpha", "lora_dropout")),
    ):
        assert [found[name] for name in names] == [adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]]
    assert (axolotl["sequence_len"], axolotl["micro_batch_size"], axolotl["max_steps"]) == (128, 2, STEPS)


def test_turns_leave_the_first_steps_out_and_tell_runs_apart() -> None:
    turns = load("turns")
    said = {"effective": {}, "versions": {}, "checksums": [1, 2, 3, 4], "tokens": [9, 9, 100, 200]}
    one = {"ours": {**said, "step_cpu_seconds": [9.0, 9.0, 0.5, 1.0], "losses": [4.0, 3.0, 2.0, 1.0]}}
    assert turns.speeds(one) == {"ours": 200.0}
    other = {"ours": {**one["ours"], "losses": [4.0, 3.0, 2.0, 1.5]}}
    assert turns.summary([one, one])["ways"]["ours"]["same_losses_in_all_rounds"] is True
    found = turns.summary([one, other])["ways"]["ours"]
    assert found["same_losses_in_all_rounds"] is False
    assert found["tokens_per_cpu_second"] == [200.0, 200.0]


def environment(work: Path, way: str) -> None:
    """A folder that looks like a peer's finished environment."""
    folder = work / "envs" / way
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / ".ready").touch()


def test_trl_runs_with_this_python(tmp_path: Path) -> None:
    assert {environments.python_for(way, tmp_path) for way in environments.OURS} == {Path(sys.executable)}
    assert not list(tmp_path.iterdir())


def test_a_peer_that_cannot_be_imported_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(tmp_path, "unsloth")
    monkeypatch.setitem(environments.IMPORTS, "unsloth", "raise NotImplementedError('no accelerator')")
    said = environments.python_for("unsloth", tmp_path)
    assert said == "unsloth could not be imported: NotImplementedError: no accelerator"
    monkeypatch.setitem(environments.IMPORTS, "unsloth", "import json")
    assert environments.python_for("unsloth", tmp_path) == tmp_path / "envs" / "unsloth" / "bin" / "python"


def test_a_peer_that_cannot_be_installed_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    real = environments._run

    def run(command: list[str], log: Path, seconds: int) -> str | None:
        ran.append(command)
        said = "import sys; sys.exit('ERROR: No matching distribution found for it\\nmore')"
        return real([sys.executable, "-c", said], log, seconds) if "pip" in command else None

    monkeypatch.setattr(environments, "_run", run)
    said = environments.python_for("axolotl", tmp_path)
    assert said == "axolotl could not be installed: ERROR: No matching distribution found for it"
    assert all("==" in pin for pin in ran[-1][ran[-1].index("--timeout") + 2 :])
    assert not (tmp_path / "envs" / "axolotl" / ".ready").exists()
