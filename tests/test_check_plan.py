"""What `check` says a run takes, what it does where that does not fit, and what it writes."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import GERMAN, write_jsonl
from test_loop import recipe
from typer.testing import CliRunner

from bam_lora import check_machine, check_plan
from bam_lora.cards import Card, parse_card
from bam_lora.check_base import planned_base
from bam_lora.check_machine import Machine, find_machine
from bam_lora.check_plan import Resources, plan_resources
from bam_lora.cli import app
from bam_lora.measure_steps import Measured, left_out, short_recipe
from bam_lora.memory_disk import disk_estimate
from bam_lora.memory_shape import shape_of_config
from bam_lora.recipe import dump_recipe, load_recipe, recipe_from_dict

GIB = 2**30


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, texts in (("german", GERMAN[:24]), ("german.test", GERMAN[-3:]), ("english", GERMAN[30:50])):
        write_jsonl(folder / f"{name}.jsonl", texts)
    write_jsonl(folder / "english.test.jsonl", GERMAN[-6:-3])
    return folder


@pytest.fixture
def recipe_file(tiny_base: Path, files: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(dump_recipe(recipe(tiny_base, files, output=str(tmp_path / "run"))), encoding="utf-8")
    return path


def planned(tiny_base: Path, files: Path, machine: Machine | None = None, **changes: Any) -> Resources:
    wanted = recipe(tiny_base, files, **changes)
    return plan_resources(wanted, planned_base(wanted), machine or find_machine())


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def test_the_plan_is_readable_at_80_columns(tiny_base: Path, files: Path) -> None:
    for machine in (find_machine(), find_machine(Card(12 * GIB))):
        lines = planned(tiny_base, files, machine).lines()
        assert max(map(len, lines)) <= 80, max(lines, key=len)
        text = "\n".join(lines)
        assert ("GPU memory  about" in text) == machine.assumed
        for words in ("RAM         about", "disk        at most", "adapters", "folded models", "--measure"):
            assert words in text


def test_learned_weights_are_a_phase_of_their_own(tiny_base: Path, files: Path) -> None:
    sets = [{"path": str(files / "english.jsonl")}]
    merge = {"slices": 3, "branches": 2, "merge": {"weights": "learned"}}
    chosen = {"target": sets, "source": sets}
    plan = planned(tiny_base, files, find_machine(Card(12 * GIB)), bam=merge, selection=chosen)
    assert any(line.strip().startswith("merging: ") for line in plan.lines())
    assert max(map(len, plan.lines())) <= 80
    assert plan.to_json()["device_memory"]["merging"]


def test_the_parts_add_up(tiny_base: Path, files: Path) -> None:
    found = planned(tiny_base, files, find_machine(Card(12 * GIB))).to_json()
    memory, disk = found["device_memory"], found["disk"]
    assert memory["peak_bytes"] == max(sum(p["bytes"] for p in memory[k]) for k in ("training", "scoring"))
    assert disk["peak_bytes"] == sum(part["bytes"] for part in disk["peak"])
    assert found["ram"]["peak_bytes"] == sum(part["bytes"] for part in found["ram"]["components"])
    assert json.loads(json.dumps(found)) == found
    assert found["problems"] == []


def test_ram_is_the_peak_and_mapped_files_need_no_room(tiny_base: Path, files: Path) -> None:
    host = planned(tiny_base, files).host
    between = Machine("cpu", "a CPU", host.needed_bytes + 1, host.needed_bytes + 1, assumed=True)
    plan = planned(tiny_base, files, between)
    assert plan.problems() == []
    text = "\n".join(plan.lines())
    assert f"RAM         about {host.peak_bytes / 2**30:.2f} GiB at the peak, of" in text
    assert "note        all but the base files has to fit" in text
    assert "all but the base files" not in "\n".join(planned(tiny_base, files).lines())


def test_what_does_not_fit_names_the_largest_part_and_the_remedy(
    tiny_base: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Machine("cuda", "a small GPU", 100 * 2**20, 100 * 2**20, assumed=True)
    monkeypatch.setattr(check_plan, "free_disk", lambda output: 1000)
    gpu, ram, disk = map(str, planned(tiny_base, files, small).problems())
    assert gpu.startswith("memory of a small GPU: expected at least 0.6 GiB, 0.6 GiB of it GPU context, found 0.1 GiB")
    assert gpu.endswith("bam-lora check RECIPE --fit chooses settings that fit.")
    assert ram.startswith("memory of this machine: expected at least")
    assert "disk space for the run: expected" in disk
    assert disk.endswith("choose another --output.")


def test_tokens_come_from_limits_and_files(tiny_base: Path, files: Path) -> None:
    whole = planned(tiny_base, files).tokens
    assert whole is not None
    tokenizer = planned_base(recipe(tiny_base, files)).tokenizer
    counted = sum(len(ids) + 1 for ids in tokenizer(GERMAN[:24])["input_ids"]) / 0.8
    assert whole == pytest.approx(counted, rel=0.02)
    source = {"path": str(files / "german.jsonl"), "tokens": 400}
    assert planned(tiny_base, files, data={"target": [source]}).tokens == 500
    hub = recipe_from_dict({**recipe(tiny_base, files).resolved(), "data": {"target": [{"path": "org/text"}]}})
    assert plan_resources(hub, planned_base(hub), find_machine()).tokens is None


def test_disk_counts_what_is_kept(tiny_base: Path, files: Path) -> None:
    def disk(tokens: int | None = 10_000, **changes: Any) -> dict[str, int]:
        wanted = recipe(tiny_base, files, **changes)
        shape = planned_base(wanted).shape
        found = disk_estimate(wanted, shape, model_bytes=10**9, companion_bytes=0, tokens=tokens)
        return {one.name: one.bytes for one in found.peak} | {"end": found.end_bytes, "peak": found.peak_bytes}

    plain, one = disk(), disk(strategy="single")
    assert plain["folded models"] == 2 * one["folded models"] == 2 * 10**9
    assert plain["adapters"] == 3 * one["adapters"]
    assert disk(keep={"bases": "all"}, bam={"slices": 6, "branches": 2})["folded models"] == 3 * 10**9
    assert disk(keep={"bases": "all"})["end"] - plain["end"] == 10**9
    assert plain["peak"] - plain["end"] == 10**9
    ties = disk(bam={"slices": 3, "branches": 2, "merge": {"method": "ties"}})
    assert ties["whole weights"] == 2 * 4 * planned_base(recipe(tiny_base, files)).shape.quantised


def test_an_absent_card_is_taken_for_one_from_ampere_on_and_that_is_said(tiny_base: Path, files: Path) -> None:
    """`packed` where it knows the base and torch's kernel would take it, as `auto` chooses there; else sdpa."""

    def found(card: Card, **quantization: Any) -> tuple[str | None, bool]:
        plan = planned(tiny_base, files, find_machine(card), quantization=quantization)
        said = "note        assumes a GPU from Ampere (RTX 30) on; an older one: --gpu-memory T4" in plan.lines()
        return plan.attention, said

    new, old = Card(12 * GIB), parse_card("V100")
    assert found(new) == ("packed", True)
    assert found(new, compute_dtype="float16") == ("packed", True)
    assert found(new, compute_dtype="float32") == (None, False)
    assert found(new, attention="sdpa") == ("sdpa", False)
    assert found(new, attention="flash_attention_2") == ("flash_attention_2", False)
    assert found(old) == found(old, attention="flash_attention_2") == (None, False)
    less, more = (planned(tiny_base, files, find_machine(card)).model.peak_bytes for card in (new, old))
    assert less < more


@pytest.mark.parametrize(
    ("config", "packed"),
    [({}, True), ({"head_dim": 192}, True), ({"head_dim": 256}, False), ({"head_dim": 12}, False),
     ({"attention_dropout": 0.1}, False), ({"model_type": "gpt_neox"}, False)],
)  # fmt: skip
def test_which_bases_packed_is_assumed_for(config: dict[str, Any], packed: bool) -> None:
    plain = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64}  # fmt: skip
    assert shape_of_config({**plain, **config}, "it").packed == packed


def test_a_card_without_bfloat16_is_told_before_all_else(recipe_file: Path) -> None:
    told = (
        "note        a T4 with 14.7 GiB has no bfloat16: torch emulates it, slowly, and Triton's kernels may refuse it"
    )
    said = call(recipe_file, "--gpu-memory", "T4").stdout.splitlines()
    assert said[0].startswith(told)
    assert "quantization.compute_dtype: float16" in said[0]
    large = ("--set", "training.per_device_train_batch_size=64", "--set", "training.gradient_accumulation_steps=2")
    assert "packed sequences of" in call(recipe_file, "--gpu-memory", "T4", *large).stdout
    assert "packed sequences of" not in call(recipe_file, "--gpu-memory", "12GB", *large).stdout
    for arguments in (("T4", "--set", "quantization.compute_dtype=float16"), ("12GB",)):
        assert "no bfloat16" not in call(recipe_file, "--gpu-memory", *arguments).stdout


def test_a_container_may_have_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(check_machine, "_CGROUP", limit)
    whole = check_machine.ram_bytes()
    limit.write_text("1000000\n")
    assert check_machine.ram_bytes() == 1_000_000
    limit.write_text("max\n")
    assert check_machine.ram_bytes() == whole


def test_check_fits_and_writes_a_recipe(recipe_file: Path, tmp_path: Path) -> None:
    written = tmp_path / "sub" / "fitted.yaml"
    written.parent.mkdir()
    said = call(recipe_file, "--fit", "--gpu-memory", "12GB", "--write", written, "--set", "lora.r=2")
    assert said.exit_code == 0, said.output
    assert "fit         into 12.0 GiB with 1.3 GiB left free, at the recipe's 256 tokens a step:" in said.output
    options = next(line for line in said.output.splitlines() if line.startswith("options     "))
    by_options = load_recipe(recipe_file, [*shlex.split(options[12:])[1::2], "lora.r=2"])
    assert load_recipe(written) == by_options
    assert by_options.lora.r == 2


def test_check_exits_1_where_it_cannot_fit_and_says_so_after_the_plan(recipe_file: Path) -> None:
    said = call(recipe_file, "--gpu-memory", "512MB")
    assert said.exit_code == 1
    assert "GPU memory  about" in said.output
    assert "error: memory of a GPU with 0.5 GiB: expected at least" in said.output
    refused = call(recipe_file, "--fit", "--gpu-memory", "512MB")
    assert refused.exit_code == 1
    assert "Take a larger card" in refused.output


def test_check_prints_json(recipe_file: Path) -> None:
    said = call(recipe_file, "--json", "--fit", "--gpu-memory", "12GB")
    found = json.loads(said.stdout)
    assert found["findings"][0]["label"] == "base"
    assert found["fit"]["settings"]["training.gradient_accumulation_steps"] >= 1
    assert found["fit"]["estimate"]["peak_bytes"] == found["device_memory"]["peak_bytes"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--write", "x.yaml"], "--write: expected --fit with it"),
        (["--measure", "--gpu-memory", "12GB"], "--measure: expected this machine"),
        (["--gpu-memory", "big"], "--gpu-memory: expected a size such as 12GB"),
    ],
)
def test_options_that_do_not_go_together(recipe_file: Path, options: list[str], words: str) -> None:
    said = call(recipe_file, *options)
    assert said.exit_code == 1
    assert words in said.output


def test_a_fitted_recipe_never_overwrites_the_one_it_extends(recipe_file: Path) -> None:
    before = recipe_file.read_text()
    said = call(recipe_file, "--fit", "--gpu-memory", "12GB", "--write", recipe_file)
    assert said.exit_code == 1
    assert recipe_file.read_text() == before


def test_a_fitted_recipe_overwrites_only_what_fit_wrote(recipe_file: Path, tmp_path: Path) -> None:
    mine, fitted = tmp_path / "own.yaml", tmp_path / "fitted.yaml"
    mine.write_text("base: my/own\n")
    for place, found in ((mine, "found a file that --write did not make"), (tmp_path, "found a folder"),
                         (tmp_path / "none" / "x.yaml", "expected a folder to write into")):  # fmt: skip
        said = call(recipe_file, "--fit", "--gpu-memory", "12GB", "--write", place)
        assert said.exit_code == 1
        assert found in said.output
    assert mine.read_text() == "base: my/own\n"
    for memory in ("12GB", "24GB"):
        assert call(recipe_file, "--fit", "--gpu-memory", memory, "--write", fitted).exit_code == 0
    assert "fit 24.0 GiB" in fitted.read_text()


def test_what_is_measured_is_short_and_what_is_left_out_is_said(tiny_base: Path, files: Path) -> None:
    merge = {"method": "linear", "weights": "learned"}
    plain = recipe(tiny_base, files)
    wanted = recipe(
        tiny_base, files, limits={"tokens": 300, "hours": 0.001}, bam={"slices": 4, "branches": 2, "merge": merge},
        selection={role: [{"path": str(files / f"{name}.jsonl")}] for role, name in
                   (("target", "german"), ("source", "english"))},
        evaluation={**plain.resolved()["evaluation"], "tasks": ["arc_bg", "belebele_bul_Cyrl"]},
    )  # fmt: skip
    short = short_recipe(wanted)
    assert short.limits.tokens is None
    assert short.limits.hours is None
    assert not short.evaluation.tasks
    assert not short.evaluation.samples
    assert short.training.max_steps == 6
    assert (short.lora, short.quantization, short.data.sequence_length) == (
        wanted.lora, wanted.quantization, wanted.data.sequence_length,
    )  # fmt: skip
    tasks, weights = left_out(wanted)
    assert tasks == "evaluation.tasks, 2 on base and result"
    assert weights == "bam.merge.weights: learned, at most 0.035 of the training's time"
    assert left_out(plain) == ()
    measured = Measured(6, 1.0, 100.0, 2**30, None, {"train": 1.0}, left_out(wanted))
    lines = measured.lines(planned(tiny_base, files))
    assert lines[-2:] == [f"note        not in the hours: {what}" for what in (tasks, weights)]


def test_measuring_takes_real_steps_and_leaves_nothing(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, made = sorted(tmp_path.iterdir()), []
    real = tempfile.mkdtemp

    def noted(*arguments: Any, **options: Any) -> str:
        made.append(real(*arguments, **options))
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    said = call(recipe_file, "--measure", "--json")
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    measured = found["measured"]
    assert tmp_path in {Path(folder).parent for folder in made}  # on the disk that the run is planned for
    assert not any(Path(folder).exists() for folder in made)
    assert sorted(tmp_path.iterdir()) == before
    assert measured["steps"] == 6
    assert measured["tokens_per_second"] > 0
    assert measured["peak_rss_bytes"] > 300 * 2**20
    assert set(measured["hours"]) == {"data", "train", "load", "score", "merge and fold"}
    train = measured["hours"]["train"] * 3600
    assert train == pytest.approx(measured["seconds_per_step"] * found["steps"])
    assert measured["total_hours"] == pytest.approx(sum(measured["hours"].values()))
