"""Models and data sets from the Hub, on a local one: only what is needed, pinned, offline, and what goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import PatchedHub, patch_libraries
from huggingface_hub import constants
from versions import before

from bam_lora import hub as reading
from bam_lora import hub_errors
from bam_lora.base import find_base
from bam_lora.checkpoint import local_folder, open_checkpoint
from bam_lora.errors import UserError
from bam_lora.hub import commit_of, fetch_model
from bam_lora.hub_errors import Repository
from bam_lora.hub_metadata import base_metadata
from bam_lora.hub_pins import pinned
from bam_lora.store import read_record

NAME = "org/tiny"


@pytest.fixture(scope="module")
def sharded(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in several shards, beside files that no run needs."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("hub") / "sharded"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="auto")
    model.save_pretrained(folder, max_shard_size="60KB")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "modeling_tiny.py", "original/params.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    return folder


def fails(*words: str) -> Any:
    """Expects one line with these words."""
    return pytest.raises(UserError, match="^[^\n]*" + "[^\n]*".join(words) + "[^\n]*$")


def test_a_base_comes_with_what_is_needed_and_no_more(hub: PatchedHub, sharded: Path) -> None:
    commit = hub.add_model(NAME, sharded)
    base = find_base(NAME)
    assert base.revision == commit
    assert open_checkpoint(base.folder).tensors().keys() == open_checkpoint(sharded).tensors().keys()
    assert not hub.requests("consolidated|bin|modeling|params")
    asked = len(hub.log)
    assert find_base(NAME, commit) == base  # what is whole in the cache is not asked for again
    if not before("huggingface-hub", "2"):  # 1 asks after what is missing by right, once more
        assert len(hub.log) == asked


def test_a_download_tells_how_far_it_is(hub: PatchedHub, sharded: Path) -> None:
    hub.add_model(NAME, sharded)
    told: list[tuple[int, int]] = []
    fetch_model(Repository(NAME), watch=lambda name, done, total: told.append((done, total)))
    size = sum(path.stat().st_size for path in sharded.glob("model-*.safetensors"))
    assert told[-1] == (size, size)


def test_metadata_of_a_base_takes_headers_alone(hub: PatchedHub, sharded: Path) -> None:
    commit = hub.add_model(NAME, sharded)
    found = base_metadata(NAME)
    here = open_checkpoint(sharded)
    assert found.commit == commit
    assert found.tensors == {name: (one.dtype, one.shape) for name, one in here.tensors().items()}
    assert found.weight_bytes == found.missing_bytes == sum(one.file_bytes for one in here.shards.values())
    assert not list(found.folder.glob("*.safetensors"))
    assert hub.requests("model-0.*safetensors", "GET")
    assert all(one.range for one in hub.requests("/cdn/", "GET"))
    assert base_metadata(str(sharded)).tensors == found.tensors
    find_base(NAME)
    assert base_metadata(NAME).missing_bytes == 0


def test_a_fold_takes_the_base_and_an_adapter_from_the_hub(hub: PatchedHub, sharded: Path) -> None:
    hub.add_model(NAME, sharded)
    hub.add_model("org/adapter", {"adapter_config.json": "{}", "adapter_model.safetensors": b"x", "optimizer.pt": b"x"})
    assert len(list(local_folder(NAME, ["config.json", "*.safetensors"]).glob("*.safetensors"))) > 1
    names = {path.name for path in local_folder("org/adapter", ["adapter_config.json", "adapter_model.*"]).iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_dropped_connection_is_taken_up_and_a_broken_download_goes_on(
    hub: PatchedHub, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.add_model(NAME, sharded)
    hub.interrupt("model-00002-of.*safetensors", after=25_000)
    fetch_model(Repository(NAME))
    first, second = hub.requests("cdn.*model-00002-of", "GET")
    assert (first.range, second.range) == (None, "bytes=20000-")
    hub.add_model(NAME, sharded, message="new")
    shutil.rmtree(hub.home)
    hub.interrupt("model-00002-of.*safetensors", after=0, times=100)
    with fails("org/tiny: expected the whole download, found a broken connection", "same command again"):
        find_base(NAME)
    hub.heal()
    done = {one.path for one in hub.requests("cdn.*model-", "GET") if one.bytes}
    before = len(hub.log)
    find_base(NAME)
    again = {one.path for one in hub.log[before:] if "/cdn/" in one.path and one.method == "GET"}
    assert any("model-00002-of" in path for path in again)
    assert not any("model-00001-of" in path for path in again & done)


def test_a_file_in_the_cache_that_is_not_whole_is_fetched_again(
    hub: PatchedHub, sharded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_model(NAME, sharded)
    whole = {path.name: path.read_bytes() for path in sharded.glob("model-*.safetensors")}
    shard = find_base(NAME).folder / "model-00002-of-00004.safetensors"
    shard.resolve().write_bytes(whole[shard.name][:-10])
    patch_libraries(monkeypatch, hub.url, hub.home, offline=True)
    with fails("model-00002-of-00004.safetensors: expected .* bytes or more", r"\(truncated\)"):
        find_base(NAME)
    patch_libraries(monkeypatch, hub.url, hub.home)
    base = find_base(NAME)
    assert {path.name: path.read_bytes() for path in base.folder.glob("model-*.safetensors")} == whole
    assert "org/tiny: model-00002-of-00004.safetensors in the cache is damaged and is" in capsys.readouterr().err


def test_offline_and_without_a_network_the_cache_is_enough(
    hub: PatchedHub, sharded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.add_model(NAME, sharded)
    hub.add_model("org/other", sharded)
    find_base(NAME)
    base_metadata("org/other")  # only its headers
    hub.add_model(NAME, sharded, message="new")
    hub.stop()
    assert find_base(NAME).revision == commit
    assert f"the Hub does not answer; taking commit {commit[:12]}" in capsys.readouterr().err
    for name in ("org/other", "org/never"):
        with fails(f"{name}: expected http://127", "no connection, and not all of it in", f"`hf download {name}"):
            find_base(name)
    patch_libraries(monkeypatch, hub.url, hub.home, offline=True)
    assert find_base(NAME).revision == commit
    assert base_metadata(NAME).commit == commit
    for name in ("org/other", "org/never"):
        with fails(f"{name}: expected all of it in the cache, as HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE"):
            find_base(name)


def test_gated_models_say_how_to_get_in(hub: PatchedHub, sharded: Path) -> None:
    hub.add_model(NAME, sharded, gated=True)
    for look in (find_base, base_metadata):
        with fails("org/tiny: expected access to this gated model, found no token", f"{hub.url}/org/tiny", "hf auth"):
            look(NAME)
    hub.log_in("read")
    with fails("found a token whose account has no access", f"Open {hub.url}/org/tiny with the account", "again"):
        find_base(NAME)
    hub.log_in(hub.add_token("hf_test_allowed", user="somebody", access=(NAME,)))
    assert find_base(NAME).folder.is_dir()


def test_what_is_not_there_is_said_plainly(hub: PatchedHub, sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_model(NAME, sharded)
    hub.add_model("org/secret", sharded, private=True)
    for name in ("org/tinny", "org/secret"):
        with fails(
            f"{name}: expected a model on the Hub or a model folder, found no such folder", "Check the spelling"
        ):
            find_base(name)
    hub.log_in("read")
    with fails("org/secret", "no model of that name that your token may see"):
        find_base("org/secret")
    with fails("org/tiny: expected the revision 'v9', found no such branch"):
        find_base(NAME, "v9")
    with fails("runs/no/model: expected a model on the Hub or a model folder, found no such folder here"):
        find_base("runs/no/model")
    hub.log_in("hf_unknown")
    with fails("expected a token that the Hub knows", "hf auth login --force"):
        find_base(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with fails("one that it refuses, from HF_TOKEN"):
        find_base(NAME)


@pytest.mark.parametrize(("status", "words"), [(429, "too many requests"), (503, "status 503")])
def test_a_hub_in_trouble(hub: PatchedHub, sharded: Path, status: int, words: str) -> None:
    hub.add_model(NAME, sharded)
    hub.fail("/resolve/", status)
    with fails("org/tiny: expected an answer", words):
        find_base(NAME)
    assert find_base(NAME).folder.is_dir()


def test_pickled_weights_adapters_and_code_are_refused(hub: PatchedHub, sharded: Path) -> None:
    config = (sharded / "config.json").read_text()
    hub.add_model("org/pickle", {"config.json": config, "pytorch_model.bin": b"x"})
    with fails("org/pickle: expected model.safetensors", "pytorch_model.bin, which could run code", "convert"):
        find_base("org/pickle")
    assert not hub.requests("pytorch_model")
    hub.add_model("org/gguf", {"config.json": config, "model.Q4.gguf": b"x"})
    with fails("org/gguf", "found model.Q4.gguf", "Choose the original model"):
        base_metadata("org/gguf")
    hub.add_model("org/adapter", {"adapter_config.json": "{}", "adapter_model.safetensors": b"x"})
    with fails("org/adapter: expected a model with config.json, found none"):
        find_base("org/adapter")
    own = {**json.loads(config), "model_type": "own", "auto_map": {"AutoModel": "modeling.Own"}}
    hub.add_model("org/code", {**reading_files(sharded), "config.json": json.dumps(own)})
    with fails("base org/code: expected an architecture that transformers knows", '"own", which needs code'):
        base_metadata("org/code")
    outside = {"weight_map": {"a": "../secret.safetensors"}}
    hub.add_model("org/outside", {"config.json": config, "model.safetensors.index.json": json.dumps(outside)})
    with fails("index.json of org/outside: expected files of its own folder, found '../secret"):
        find_base("org/outside")


def test_a_repository_without_a_file_of_its_index(hub: PatchedHub, sharded: Path) -> None:
    files = reading_files(sharded)
    del files["model-00002-of-00004.safetensors"]
    hub.add_model(NAME, files)
    for _ in range(2):  # the second time the rest is in the cache
        with fails(
            "model-00002-of-00004.safetensors of org/tiny: expected every file that its index names, found none"
        ):
            find_base(NAME)
    with fails("org/tiny/model-00002-of-00004.safetensors: expected every file that the index names"):
        base_metadata(NAME)


def reading_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_download_that_does_not_fit_is_not_begun(
    hub: PatchedHub, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_model(NAME, sharded)
    usage = shutil.disk_usage("/")._replace(free=1_000)
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda path: usage)
    with fails("org/tiny in .*expected 0.20 GB free, found 0.00 GB", "HF_HOME"):
        find_base(NAME)
    assert not hub.requests("/cdn/", "GET")


def test_a_disk_that_is_full_in_the_middle(hub: PatchedHub) -> None:
    error = RuntimeError("failed")
    error.__cause__ = OSError(28, "No space left on device")
    assert "found a full disk. Free some space" in str(hub_errors.explain(error, Repository(NAME)))


def test_a_cache_of_somebody_else_is_no_matter_of_access_to_the_hub() -> None:
    error = RuntimeError("failed")
    error.__cause__ = PermissionError(13, "Permission denied", "/shared/hub/models--org--tiny")
    assert str(hub_errors.explain(error, Repository(NAME))) == (
        "/shared/hub/models--org--tiny: expected leave to read and write it, found Permission denied. Set HF_HOME to a "
        "folder of your own, or change the permissions."
    )


def test_pins_keep_the_commit_of_the_first_look(hub: PatchedHub, sharded: Path, tmp_path: Path) -> None:
    first = hub.add_model(NAME, sharded)
    with pinned(tmp_path / "hub.json"):
        assert commit_of(Repository(NAME)) == first
    second = hub.add_model(NAME, sharded, message="new")
    with pinned(tmp_path / "hub.json"):
        assert find_base(NAME).revision == first
        assert commit_of(Repository(NAME, "main")) == second  # asked for in another way
    assert commit_of(Repository(NAME)) == second
    record = read_record(tmp_path / "hub.json", "hub")
    assert record is not None
    assert record["repositories"][0] == {"name": NAME, "revision": None, "kind": "model", "commit": first}


def test_a_script_that_is_started_again_has_the_tokenizer_it_began_with(
    hub: PatchedHub, sharded: Path, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import SFTConfig

    from bam_lora import BamTrainer

    first = hub.add_model(NAME, sharded)
    with pinned(tmp_path / "hub.json"):
        commit_of(Repository(NAME))
    hub.add_model(NAME, sharded, message="new")
    args = SFTConfig(output_dir=str(tmp_path), max_length=64, bf16=False)
    trainer = BamTrainer(NAME, args, train_dataset=Dataset.from_dict({"text": ["a"]}))
    assert Path(trainer.processing_class.name_or_path).name == first
