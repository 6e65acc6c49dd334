"""Data sets from the Hub in a recipe: at one commit, from the cache, gated; a whole run; and no token anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGLISH, GERMAN
from hub_fixtures import PatchedHub, patch_libraries
from hub_server import TOKENS
from hub_store import dataset_files
from huggingface_hub import hf_hub_download, snapshot_download
from versions import before

from bam_lora import hub_data
from bam_lora.check import check_recipe
from bam_lora.errors import Interrupted, UserError
from bam_lora.loop import run
from bam_lora.recipe import Recipe, recipe_from_dict
from bam_lora.sources import TextSource, open_source, read_texts
from bam_lora.store import read_record

OFFLINE_DATA = pytest.mark.skipif(
    before("huggingface-hub", "2"),
    reason="huggingface_hub 1, datasets 5.0: no data sets offline",
)

DATA = "org/stories"
BASE = "org/tiny"


def rows(texts: list[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def add_stories(hub: PatchedHub, **settings: Any) -> str:
    english = {"train": rows(ENGLISH), "test": rows(ENGLISH[:6])}
    german = {"train": rows(GERMAN), "test": rows(GERMAN[:6])}
    return hub.add_dataset(DATA, {"de": german, "en": english}, **settings)


def texts(source: TextSource, cache: Path, *, streaming: bool) -> list[str]:
    opened = open_source(source, streaming=streaming, cache=cache)
    return [text for _, text in read_texts(source, opened)]


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_configurations_splits_and_the_commit(hub: PatchedHub, tmp_path: Path, format: str) -> None:
    first = add_stories(hub, format=format)
    assert texts(TextSource(DATA, "en", "test"), tmp_path, streaming=True) == ENGLISH[:6]
    assert texts(TextSource(DATA, "de", "train[:-6]"), tmp_path, streaming=True) == GERMAN[:-6]
    hub.add_dataset(DATA, {"de": {"train": rows(["neu"])}}, format=format)
    where = TextSource(DATA, "de", revision=first)
    opened = open_source(where, streaming=True, cache=tmp_path)
    assert opened.facts == {"commit": first}
    assert next(read_texts(where, opened))[1] == GERMAN[0]


@OFFLINE_DATA
def test_offline_a_data_set_is_read_from_the_cache_if_all_of_it_is_there(
    hub: PatchedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_stories(hub)
    source = TextSource(DATA, "en", "train[:5]")
    assert texts(source, tmp_path / "a", streaming=False) == ENGLISH[:5]
    hub.stop()
    assert texts(source, tmp_path / "b", streaming=False) == ENGLISH[:5]
    patch_libraries(monkeypatch, hub.url, hub.home, offline=True)
    assert texts(source, tmp_path / "c", streaming=False) == ENGLISH[:5]
    with pytest.raises(UserError, match=r"^org/stories: expected all of it in the cache.*--repo-type dataset"):
        texts(TextSource(DATA, "de"), tmp_path / "d", streaming=True)
    with pytest.raises(UserError, match=r"^org/stories: expected a split 'nowhere', found train.*`split:`"):
        texts(TextSource(DATA, "en", "nowhere"), tmp_path / "d", streaming=True)
    with pytest.raises(UserError, match=r"^org/stories: expected a configuration 'fr', found "):
        texts(TextSource(DATA, "fr"), tmp_path / "d", streaming=True)
    with pytest.raises(UserError, match=r"^org/never: expected all of it in the cache"):
        texts(TextSource("org/never"), tmp_path / "d", streaming=True)
    (cached,) = (hub.home / "hub" / "datasets--org--stories" / "snapshots").glob("*/en/test-*")
    cached.unlink()  # as after a download that was interrupted
    with pytest.raises(UserError, match=r"^org/stories: .*: en/test-.*parquet is missing"):
        texts(source, tmp_path / "e", streaming=False)


@OFFLINE_DATA
def test_offline_what_was_fetched_by_hand_is_read(
    hub: PatchedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = add_stories(hub)
    hub.add_dataset("org/plain", {"default": {"train": rows(GERMAN)}}, layout="folders")
    snapshot_download(DATA, repo_type="dataset", allow_patterns=["en/*"])
    snapshot_download("org/plain", repo_type="dataset", allow_patterns=["data/*", "README.md"])
    patch_libraries(monkeypatch, hub.url, hub.home, offline=True)
    with pytest.raises(UserError, match=r"^org/stories: .*README.md is missing"):
        texts(TextSource(DATA, "en", "test"), tmp_path / "a", streaming=True)
    patch_libraries(monkeypatch, hub.url, hub.home)
    snapshot_download(DATA, repo_type="dataset", allow_patterns=["README.md"])
    patch_libraries(monkeypatch, hub.url, hub.home, offline=True)
    assert texts(TextSource(DATA, "en", "test"), tmp_path / "b", streaming=True) == ENGLISH[:6]
    assert texts(TextSource(DATA, "en", revision=commit), tmp_path / "c", streaming=True) == ENGLISH
    assert texts(TextSource("org/plain"), tmp_path / "d", streaming=True) == GERMAN
    with pytest.raises(UserError, match=r"^org/stories: .*de/train-.*is missing"):
        texts(TextSource(DATA, "de"), tmp_path / "e", streaming=True)


def test_offline_a_part_that_another_program_left_does_not_pass_for_the_whole(
    hub: PatchedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a program keeps no list of what belongs to the data set; the files' names may tell."""
    halves = [
        next(content for name, content in made.items() if name.endswith(".parquet"))
        for made in (dataset_files({"default": {"train": rows(part)}}, format="parquet", layout="folders", card="")
                     for part in (GERMAN[:40], GERMAN[40:]))
    ]  # fmt: skip
    names = [f"data/train-0000{number}-of-00002.parquet" for number in range(2)]
    hub.add_dataset("org/parts", {"default": {"train": rows(GERMAN)}}, layout="folders")
    hub.repositories["dataset", "org/parts"].commit(dict(zip(names, halves, strict=True)), "in two parts")
    hf_hub_download("org/parts", names[0], repo_type="dataset")
    patch_libraries(monkeypatch, hub.url, hub.home, offline=True)
    with pytest.raises(UserError, match=r"^org/parts: .*: data/train-00001-of-00002 is missing"):
        texts(TextSource("org/parts"), tmp_path / "a", streaming=True)
    patch_libraries(monkeypatch, hub.url, hub.home)
    hf_hub_download("org/parts", names[1], repo_type="dataset")
    patch_libraries(monkeypatch, hub.url, hub.home, offline=True)
    assert texts(TextSource("org/parts"), tmp_path / "b", streaming=True) == GERMAN
    assert "the cache does not tell what belongs to it; taking the 2 files there" in capsys.readouterr().err


def test_a_list_of_files_cannot_lead_out_of_the_folder(
    hub: PatchedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_stories(hub)
    snapshot_download(DATA, repo_type="dataset")
    listed = hub_data.cached_sizes
    monkeypatch.setattr(hub_data, "cached_sizes", lambda at: {**(listed(at) or {}), "../../outside.txt": 3})
    patch_libraries(monkeypatch, hub.url, hub.home, offline=True)
    with pytest.raises(UserError, match=r"^org/stories: expected files of its own folder, found '../../outside.txt'"):
        texts(TextSource(DATA, "en"), tmp_path / "below" / "cache", streaming=True)
    assert not list(tmp_path.rglob("outside.txt"))


def test_what_is_wrong_with_a_data_set_is_one_line(hub: PatchedHub, tmp_path: Path) -> None:
    add_stories(hub, gated=True)

    def expect(source: TextSource, words: str) -> None:
        with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
            texts(source, tmp_path, streaming=True)

    page = f"{hub.url}/datasets/{DATA}"
    expect(TextSource(DATA, "de"), f"org/stories: expected access to this gated data set, found no token. Open {page}")
    hub.log_in("read")
    expect(TextSource(DATA, "de"), "found a token whose account has no access")
    hub.log_in(hub.add_token("hf_test_allowed", user="somebody", access=(DATA,)))
    assert texts(TextSource(DATA, "de", "test"), tmp_path, streaming=True) == GERMAN[:6]
    found = "org/stories: expected a configuration 'fr', found de, en. Name one of them in this source's `name:`"
    expect(TextSource(DATA, "fr"), found)
    expect(TextSource(DATA, "de", "tran"), "expected a split 'tran', found train, test. .*; it looks like 'train'")
    expect(TextSource(DATA, revision="v9"), "org/stories: expected the revision 'v9'")
    expect(TextSource("org/storeys"), "org/storeys: expected a data set on the Hub, found no data set of that name")
    hub.commit_files(DATA, {"stories.py": "raise SystemExit"}, kind="dataset")
    expect(TextSource(DATA, "de"), "found one that needs its own code, which is not run.*refs/convert/parquet")


def a_recipe(output: Path) -> Recipe:
    sets = {
        role: [{"path": DATA, "name": name, "split": "test", "set": name}]
        for role, name in (("target", "de"), ("source", "en"))
    }
    return recipe_from_dict(
        {
            "base": BASE,
            "output": str(output),
            "data": {
                "target": [{"path": DATA, "name": "de", "split": "train"}],
                "replay": [{"path": DATA, "name": "en", "split": "train[:-6]"}],
                "replay_share": 0.2,
                "sequence_length": 64,
            },
            "bam": {"slices": 2, "branches": 2},
            "lora": {"r": 2},
            "quantization": {"bits": 16, "compute_dtype": "float32"},
            "training": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 2},
            "evaluation": {**sets, "precision": "16bit", "window_bytes": 64},
        }
    )


def test_check_downloads_no_weights_and_says_how_much_a_run_will(
    hub: PatchedHub, tiny_base: Path, tmp_path: Path
) -> None:
    commit = hub.add_model(BASE, tiny_base)
    add_stories(hub)
    told = check_recipe(a_recipe(tmp_path / "run"))
    assert f"download    0.2 MB, when the run starts; commit {commit}" in told
    assert {one.range for one in hub.requests("cdn.*model.safetensors", "GET")} == {"bytes=0-100000"}
    assert not list(hub.home.rglob("*.safetensors"))
    assert not (tmp_path / "run").exists()


def test_a_run_stays_at_its_commits_and_holds_no_token(
    hub: PatchedHub, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_base.iterdir()}
    base = hub.add_model(BASE, {**files, "consolidated.safetensors": b"the same in another format"}, gated=True)
    data = add_stories(hub, private=True)
    monkeypatch.setenv("HF_TOKEN", hub.add_token("hf_test_secret", access=(BASE, DATA)))
    root = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("bam_lora.loop.merge", lambda *given: (_ for _ in ()).throw(Interrupted("a test")))
        with pytest.raises(Interrupted):
            run(a_recipe(root))
    hub.add_model(BASE, {**files, "model.safetensors": b"other"})
    hub.add_dataset(DATA, {"de": {"train": rows(["neu"])}, "en": {"train": rows(["new"])}}, private=True)
    shutil.rmtree(root / "data" / "01")  # is made again, from the commit of the first time
    shutil.rmtree(hub.home)
    snapshot_download(BASE, revision=base)  # by another program, with what no run needs
    report = run(a_recipe(root))
    assert report["status"]["finished"]
    record = read_record(root / "hub.json")
    assert record is not None
    assert {one["commit"] for one in record["repositories"]} == {base, data}
    assert {one["commit"] for one in report["data"]["sources"]} == {data}
    assert (read_record(root / "ledger.json") or {})["base"]["revision"] == base
    held = [path for path in [*root.rglob("*"), *tmp_path.glob("*.log")] if path.is_file()]
    assert len(held) > 20
    assert not [
        path for path in held for token in ("hf_test_secret", *TOKENS.values()) if token.encode() in path.read_bytes()
    ]
    hub.stop()
    assert run(a_recipe(root))["summary"] == report["summary"]


def test_a_data_set_that_was_put_right_since_a_first_start_is_pointed_out(
    hub: PatchedHub, tiny_base: Path, tmp_path: Path
) -> None:
    hub.add_model(BASE, tiny_base)
    english = {"train": rows(ENGLISH), "test": rows(ENGLISH[:6])}
    wrong = {split: [{"body": text} for text in GERMAN] for split in ("train", "test")}
    first = hub.add_dataset(DATA, {"de": wrong, "en": english})
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"org/stories: expected a column 'text', found columns body\..*it looks like 'body'\.$"
        ):
            run(a_recipe(tmp_path / "run"))
    second = add_stories(hub)
    pins = tmp_path / "run" / "hub.json"
    with pytest.raises(
        UserError, match=rf"at commit {first[:12]}, .* at {second[:12]} now: delete {pins} to take that"
    ):
        run(a_recipe(tmp_path / "run"))
    pins.unlink()
    assert run(a_recipe(tmp_path / "run"))["data"]["sources"][0]["commit"] == second
