"""Runs that grow the base's vocabulary: step 0 in the ledger, the new rows in merges and folds, resuming, chaining."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENGLISH, GERMAN, write_jsonl
from safetensors.torch import load_file

from bam_lora.adapters import Adapter
from bam_lora.base import load_tokenizer
from bam_lora.check import check_recipe
from bam_lora.errors import UserError
from bam_lora.export import export_adapter
from bam_lora.grown_base import grown_rows
from bam_lora.ledger import Ledger
from bam_lora.loop import run
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.report.html import render_html
from bam_lora.report.text import render_text
from bam_lora.rundir import RunDirectory
from bam_lora.shrink import shrink
from bam_lora.store import hash_file, read_json, read_record

EMBEDDING = "model.embed_tokens.weight"


def recipe(base: Path | str, folder: Path, **changed: Any) -> Recipe:
    write_jsonl(folder / "train.jsonl", GERMAN[:40])
    write_jsonl(folder / "valid.jsonl", GERMAN[40:])
    values: dict[str, Any] = {
        "base": str(base),
        "output": "unused",
        "data": {"target": [{"path": str(folder / "train.jsonl")}], "sequence_length": 64},
        "bam": {"slices": 4, "branches": 2},
        "vocabulary": {"tokens": 50, "pad_to_multiple_of": 16},
        "lora": {"r": 4},
        "quantization": {"bits": 16, "compute_dtype": "bfloat16"},
        "training": {"learning_rate": 5e-3, "per_device_train_batch_size": 2, "checkpointing": False},
        "evaluation": {"target": [{"path": str(folder / "valid.jsonl")}], "precision": "16bit", "branches": False},
        "keep": {"bases": "all"},
    }
    return recipe_from_dict(values | changed)


@pytest.fixture(scope="module")
def grown_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    run(recipe(tiny_base, folder), folder / "run")
    return folder / "run"


def pieces_of(root: Path) -> tuple[int, list[list[int]]]:
    content = read_json(root / "vocabulary" / "vocabulary.json")
    return content["first"], [one["pieces"] for one in content["tokens"]]


def test_step_0_is_the_base_with_the_means_of_the_pieces(grown_run: Path, tiny_base: Path) -> None:
    first, pieces = pieces_of(grown_run)
    old = load_file(tiny_base / "model.safetensors")[EMBEDDING]
    new = load_file(grown_run / "iterations" / "00" / "base" / "model.safetensors")[EMBEDDING]
    assert first == len(load_tokenizer(tiny_base))
    assert new.shape[0] == 400
    assert torch.equal(new, grown_rows(old, pieces, first, 400))
    ledger = read_json(grown_run / "ledger.json")
    assert set(ledger["base"]["vocabulary"]["files"]) == {"tokenizer.json", "tokenizer_config.json", "vocabulary.json"}
    model = read_record(grown_run / "iterations" / "00" / "base" / "done.json")
    assert model is not None
    assert ledger["base"]["vocabulary"]["weights"] == {"model.safetensors": model["files"]["model.safetensors"]}


def test_rows_of_the_branches_are_averaged_and_old_ones_keep_every_bit(grown_run: Path) -> None:
    first, pieces = pieces_of(grown_run)
    start = load_file(grown_run / "iterations" / "00" / "base" / "model.safetensors")[EMBEDDING].double()
    wanted = start.clone()
    new = range(first, first + len(pieces))
    for number in (1, 2):
        shown = wanted.to(torch.bfloat16).double() if number > 1 else wanted.clone()
        for branch in (1, 2):
            folder = grown_run / "iterations" / f"{number:02}" / f"branch-{branch}" / "adapter"
            tensors = load_file(folder / "adapter_model.safetensors")
            rows = [value for name, value in tensors.items() if "trainable_tokens_delta" in name]
            assert len(rows) == 1
            assert rows[0].dtype == torch.float32
            assert Adapter.open(folder).config["trainable_token_indices"] == {"embed_tokens": list(new)}
            wanted[list(new)] += (rows[0].double() - shown[list(new)]) / 2
        found = Ledger.load(grown_run).start_value(EMBEDDING, number)
        assert found is not None
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)
        wanted = found.double()
    model = load_file(grown_run / "model" / "model.safetensors")
    assert torch.equal(model[EMBEDDING], wanted.to(torch.bfloat16))
    assert torch.equal(model[EMBEDDING][:first].double(), start[:first])
    assert not torch.equal(model[EMBEDDING][list(new)].double(), start[list(new)])
    assert "lm_head.weight" not in model


def test_the_result_is_a_plain_model_with_the_new_tokenizer(grown_run: Path, tiny_base: Path) -> None:
    import transformers

    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(grown_run / "model", output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["mismatched_keys"]
    assert model.config.vocab_size == 400
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer, before = load_tokenizer(grown_run / "model"), load_tokenizer(tiny_base)
    ids = tokenizer(GERMAN[0], return_tensors="pt")["input_ids"]
    assert ids.shape[1] < len(before(GERMAN[0])["input_ids"])
    assert ids.max() >= pieces_of(grown_run)[0]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == GERMAN[0]
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4


def test_iteration_0_is_the_base_as_it_came_in_the_same_windows(grown_run: Path, tiny_base: Path) -> None:
    from bam_lora.score_files import score_files

    found = read_record(grown_run / "iterations" / "00" / "eval.json")
    last = read_record(grown_run / "iterations" / "02" / "eval.json")
    measures = read_record(grown_run / "iterations" / "00" / "vocabulary.json")
    assert found is not None
    assert last is not None
    assert measures is not None
    assert (found["window_bytes"], found["overlap_bytes"]) == (last["window_bytes"], last["overlap_bytes"])
    [part] = measures["sets"]
    assert part["tokens_after"] < 0.6 * part["tokens_before"]
    assert part["bytes"] == found["scores"][0]["bytes"] == last["scores"][0]["bytes"]
    assert last["scores"][0]["bits_per_byte"] < found["scores"][0]["bits_per_byte"]
    assert measures["scores"][0]["bits_per_byte"] != found["scores"][0]["bits_per_byte"]
    valid = grown_run.parent / "valid.jsonl"
    again = score_files(str(tiny_base), [valid], [], precision="16bit", window_bytes=found["window_bytes"])
    assert again["scores"][0]["bits_per_byte"] == pytest.approx(found["scores"][0]["bits_per_byte"], rel=1e-9)


def test_a_stopped_run_goes_on_to_the_same_model(grown_run: Path, tiny_base: Path, tmp_path: Path) -> None:
    wanted = hash_file(grown_run / "model" / "model.safetensors")
    root = tmp_path / "run"
    shutil.copytree(grown_run, root, copy_function=shutil.copy)
    for path in ("model", "iterations/00/base", "iterations/02"):
        shutil.rmtree(root / path)
    ledger = Ledger.load(root)
    del ledger.iterations[1:]
    ledger.save()
    run(recipe(tiny_base, grown_run.parent), root)
    assert hash_file(root / "model" / "model.safetensors") == wanted
    assert hash_file(root / "iterations" / "00" / "base" / "model.safetensors") == hash_file(
        grown_run / "iterations" / "00" / "base" / "model.safetensors"
    )


def test_a_changed_vocabulary_is_found_out(grown_run: Path, tiny_base: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(grown_run, root, copy_function=shutil.copy)
    shutil.rmtree(root / "model")
    file = root / "vocabulary" / "vocabulary.json"
    file.write_text(file.read_text().replace('"saved": ', '"saved": 1'))
    with pytest.raises(UserError, match=r"vocabulary\.json: expected the file that the ledger records, found another"):
        run(recipe(tiny_base, grown_run.parent), root)


def test_a_shrunk_run_goes_part_of_the_way_from_step_0(grown_run: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(grown_run, root, copy_function=shutil.copy)
    shutil.rmtree(root / "iterations" / "00" / "base")
    shrink(root, [0.5], output=tmp_path / "half")
    start = load_file(grown_run / "iterations" / "00" / "base" / "model.safetensors")[EMBEDDING]
    done = Ledger.load(root).start_value(EMBEDDING)
    assert done is not None
    half = load_file(tmp_path / "half" / "model.safetensors")[EMBEDDING]
    assert torch.equal(half, ((start.double() + done.double()) / 2).float().to(torch.bfloat16))
    assert not torch.equal(half, start)
    record = read_record(root / "shrink.json")
    evaluation = read_record(root / "iterations" / "02" / "eval.json")
    assert record is not None
    assert evaluation is not None
    [score] = record["points"][0]["scores"]
    assert score["bytes"] == evaluation["scores"][0]["bytes"]
    assert hash_file(tmp_path / "half" / "tokenizer.json") == hash_file(root / "vocabulary" / "tokenizer.json")


def test_a_run_from_a_grown_one_takes_its_base_and_tokenizer(grown_run: Path, tmp_path: Path) -> None:
    again = recipe(grown_run, tmp_path, vocabulary={}, bam={"slices": 2, "branches": 2})
    run(again, tmp_path / "next")
    ledger, parent = Ledger.load(tmp_path / "next"), Ledger.load(grown_run)
    assert ledger.key(0) == parent.key()
    assert ledger.base["vocabulary"]["path"] == "parent/vocabulary"
    assert hash_file(tmp_path / "next" / "model" / "tokenizer.json") == hash_file(
        grown_run / "model" / "tokenizer.json"
    )
    model = load_file(tmp_path / "next" / "model" / "model.safetensors")
    assert torch.equal(model[EMBEDDING], load_file(grown_run / "model" / "model.safetensors")[EMBEDDING])
    before = read_record(grown_run / "iterations" / "02" / "eval.json")
    start = read_record(tmp_path / "next" / "iterations" / "00" / "eval.json")
    assert start is not None
    assert before is not None
    assert start["scores"][0]["bits_per_byte"] == pytest.approx(before["scores"][0]["bits_per_byte"], rel=1e-9)
    with pytest.raises(UserError, match=r"vocabulary\.tokens: expected none where the base is a finished run"):
        run(recipe(grown_run, tmp_path), tmp_path / "twice")


@pytest.mark.slow
def test_an_extended_run_keeps_its_tokens(tiny_base: Path, tmp_path: Path) -> None:
    short = recipe(tiny_base, tmp_path, bam={"slices": 2, "branches": 2}, keep={"bases": "last"})
    write_jsonl(tmp_path / "train.jsonl", GERMAN[:16])
    run(short, tmp_path / "run")
    vocabulary = hash_file(tmp_path / "run" / "vocabulary" / "vocabulary.json")
    write_jsonl(tmp_path / "train.jsonl", GERMAN[:40])
    assert not (tmp_path / "run" / "iterations" / "00" / "base").exists(), "made again where it is needed"
    longer = recipe(tiny_base, tmp_path, bam={"slices": 4, "branches": 2}, keep={"bases": "last"})
    run(longer, tmp_path / "run", extend=True)
    assert hash_file(tmp_path / "run" / "vocabulary" / "vocabulary.json") == vocabulary
    assert len(Ledger.load(tmp_path / "run").iterations) == 2
    embedding = load_file(RunDirectory(tmp_path / "run").model / "model.safetensors")[EMBEDDING]
    assert embedding.shape[0] == 400
    with pytest.raises(UserError, match="full weights"):
        export_adapter(tmp_path / "run", tmp_path / "adapter")


def test_rows_of_an_untied_base_train_in_embedding_and_head(tmp_path: Path, tiny_base: Path) -> None:
    import transformers

    base = tmp_path / "untied"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(base)
    load_tokenizer(tiny_base).save_pretrained(base)
    run(recipe(base, tmp_path, bam={"slices": 2, "branches": 2}), tmp_path / "run")
    first, pieces = pieces_of(tmp_path / "run")
    start = load_file(tmp_path / "run" / "iterations" / "00" / "base" / "model.safetensors")
    done = load_file(tmp_path / "run" / "model" / "model.safetensors")
    new = slice(first, first + len(pieces))
    for name in (EMBEDDING, "lm_head.weight"):
        assert torch.equal(done[name][:first], start[name][:first])
        assert not torch.equal(done[name][new], start[name][new])
    assert not torch.equal(done[EMBEDDING][new], done["lm_head.weight"][new])


def test_all_rows_can_be_trained(tmp_path: Path, tiny_base: Path) -> None:
    wanted = {"tokens": 20, "train": "all"}
    run(recipe(tiny_base, tmp_path, vocabulary=wanted, bam={"slices": 2, "branches": 2}), tmp_path / "run")
    first, _ = pieces_of(tmp_path / "run")
    start = load_file(tmp_path / "run" / "iterations" / "00" / "base" / "model.safetensors")
    done = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not torch.equal(done[EMBEDDING][:first], start[EMBEDDING][:first])
    assert "lm_head.weight" not in done


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lora": {"trainable_token_indices": [1]}}, r"lora\.trainable_token_indices: expected none beside vocabulary"),
        ({"mode": "chat"}, r"vocabulary\.tokens: expected none where there are conversations"),
        ({"bam": {"merge": {"method": "slerp"}}}, r"expected linear .* since vocabulary\.tokens is not low rank"),
    ],
)
def test_what_does_not_go_with_new_tokens(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        recipe("some/base", tmp_path, **changed)


@pytest.mark.parametrize("weights", ["learned", "search"])
def test_chosen_weights_are_those_of_the_factors(weights: str, tiny_base: Path, tmp_path: Path) -> None:
    """Rows are the plain average under learned weights, and averaged by the weights that a search finds."""
    write_jsonl(tmp_path / "chosen.jsonl", GERMAN[:30])
    write_jsonl(tmp_path / "english.jsonl", ENGLISH)
    selection = {role: [{"path": str(tmp_path / f"{name}.jsonl"), "set": f"chosen by {name}"}]
                 for role, name in (("target", "chosen"), ("source", "english"))}  # fmt: skip
    merge = {"weights": weights, "learned": {"steps": 3, "share": 5.0}, "search": {"share": 5.0, "evaluations": 4}}
    bam = {"slices": 4, "branches": 2, "merge": merge}
    run(recipe(tiny_base, tmp_path, bam=bam, selection=selection), tmp_path / "run")
    first, pieces = pieces_of(tmp_path / "run")
    new = list(range(first, first + len(pieces)))
    done = read_record(tmp_path / "run" / "iterations" / "01" / "merge.json")
    assert done is not None
    shares = done["searched"]["weights"] if weights == "search" else [0.5, 0.5]
    start = load_file(tmp_path / "run" / "iterations" / "00" / "base" / "model.safetensors")[EMBEDDING].double()[new]
    wanted = start.clone()
    for share, branch in zip(shares, (1, 2), strict=True):
        folder = tmp_path / "run" / "iterations" / "01" / f"branch-{branch}" / "adapter"
        tensors = load_file(folder / "adapter_model.safetensors")
        [rows] = [value for name, value in tensors.items() if "trainable_tokens_delta" in name]
        wanted += share * (rows.double() - start)
    found = Ledger.load(tmp_path / "run").start_value(EMBEDDING, 1)
    assert found is not None
    torch.testing.assert_close(found.double()[new], wanted, rtol=0, atol=1e-6)
    embedding = load_file(tmp_path / "run" / "model" / "model.safetensors")[EMBEDDING]
    assert torch.equal(embedding[:first].double(), load_file(
        tmp_path / "run" / "iterations" / "00" / "base" / "model.safetensors")[EMBEDDING][:first].double())  # fmt: skip


def test_the_report_and_the_card_tell_what_the_tokens_do(grown_run: Path) -> None:
    report = read_record(grown_run / "report.json")
    assert report is not None
    [part] = report["vocabulary"]["sets"]
    assert report["vocabulary"]["tokens"] == 50
    assert report["vocabulary"]["scores"][0]["set"] == part["set"] == "valid"
    covered = f"{part['bytes'] / part['tokens_after']:.2f}"
    card = (grown_run / "model" / "README.md").read_text(encoding="utf-8")
    for text in (render_text([report], None), card, render_html([report], None)):
        assert covered in text
        assert "50 new tokens" in text


def test_check_says_what_will_be_added(tiny_base: Path, grown_run: Path, tmp_path: Path) -> None:
    assert "50 new tokens at most" in check_recipe(recipe(tiny_base, tmp_path, output=str(tmp_path / "run")))
    with pytest.raises(UserError, match=r"vocabulary\.tokens: expected none where the base is a finished run"):
        check_recipe(recipe(grown_run, tmp_path, output=str(tmp_path / "run")))
