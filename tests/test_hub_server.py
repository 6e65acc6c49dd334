"""The local Hub that other tests rely on: it is what huggingface_hub and datasets take for the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_fixtures import PatchedHub
from hub_server import TOKENS, USER, LocalHub
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from versions import before

ROWS = [{"text": f"Row {number}.", "id": number} for number in range(300)]
FILES = {"config.json": "{}", "README.md": "# A model", "model.safetensors": b"x" * 5000}


def test_a_model_is_downloaded_once_and_its_large_files_without_the_token(hub: PatchedHub, tiny_base: Path) -> None:
    commit = hub.add_model("org/tiny", tiny_base)
    hub.log_in("read")
    folder = Path(snapshot_download("org/tiny", allow_patterns=["*.json", "*.safetensors"]))
    assert folder.name == commit
    assert (folder / "model.safetensors").read_bytes() == (tiny_base / "model.safetensors").read_bytes()
    assert {one.token for one in hub.requests("/resolve/")} == {TOKENS["read"]}
    assert {one.token for one in hub.requests("/cdn/")} == {None}
    asked = len(hub.requests(method="GET"))
    snapshot_download("org/tiny", revision=commit, allow_patterns=["*.json", "*.safetensors"])
    more = 1 if before("huggingface-hub", "2") else 0  # 1 asks once what the repository holds
    assert len(hub.requests(method="GET")) == asked + more


def test_headers_of_safetensors_are_read_by_ranges(hub: PatchedHub, tiny_base: Path) -> None:
    hub.add_model("org/tiny", tiny_base)
    found = HfApi().get_safetensors_metadata("org/tiny")
    assert found.files_metadata["model.safetensors"].tensors["model.norm.weight"].shape == [64]
    assert any(one.range for one in hub.requests("/cdn/"))


def test_revisions_trees_and_paths(hub: PatchedHub) -> None:
    first = hub.add_model("org/m", {**FILES, "a/b/c.txt": "c"})
    second = hub.add_model("org/m", FILES)
    assert HfApi().model_info("org/m").sha == second
    assert HfApi().model_info("org/m", revision=first).sha == first
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("org/m", revision="no-such")
    hub.page_size = 2
    tree = {one.path for one in HfApi().list_repo_tree("org/m", revision=first, recursive=True)}
    assert tree == {"a", "a/b", "a/b/c.txt", *FILES}
    assert {one.path for one in HfApi().list_repo_tree("org/m", "a", revision=first)} == {"a/b"}
    (info,) = HfApi().get_paths_info("org/m", ["model.safetensors", "none"])
    assert info.lfs is not None
    assert info.size == 5000
    assert [one.name for one in HfApi().list_repo_refs("org/m").branches] == ["main"]


def test_gated_private_and_missing_repositories(hub: PatchedHub) -> None:
    hub.add_model("org/gated", FILES, gated=True)
    hub.add_model("org/private", FILES, private=True)
    with pytest.raises(GatedRepoError) as refused:
        hf_hub_download("org/gated", "config.json")
    assert refused.value.response.status_code == 401
    for name in ("org/private", "org/none"):
        with pytest.raises(RepositoryNotFoundError):
            HfApi().model_info(name)
    with pytest.raises(GatedRepoError) as refused:
        hf_hub_download("org/gated", "config.json", token=TOKENS["read"])
    assert refused.value.response.status_code == 403
    allowed = hub.add_token("hf_test_allowed", user="somebody", access=("org/gated", "org/private"))
    assert Path(hf_hub_download("org/gated", "config.json", token=allowed)).is_file()
    assert HfApi().model_info("org/private", token=allowed).private
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi().whoami(token="hf_wrong")


def test_a_dropped_connection_is_taken_up_where_it_ended(hub: PatchedHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept of a broken transfer
    hub.add_model("org/m", FILES)
    hub.interrupt("model.safetensors", after=1234)
    assert Path(hf_hub_download("org/m", "model.safetensors")).read_bytes() == FILES["model.safetensors"]
    first, second = hub.requests("/cdn/", "GET")
    assert (first.bytes, first.range) == (1234, None)
    assert (second.bytes, second.range) == (4000, "bytes=1000-")


def test_failures_and_a_hub_that_is_away(hub: PatchedHub) -> None:
    hub.add_model("org/m", FILES)
    hub.fail("/api/models/org/m", 500)
    with pytest.raises(HfHubHTTPError, match="500"):
        HfApi().model_info("org/m")
    assert HfApi().model_info("org/m").sha
    hub.stop()
    with pytest.raises(Exception, match="refused"):
        HfApi().model_info("org/m")
    hub.start()
    assert HfApi().model_info("org/m").sha


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_data_sets_by_configuration_split_and_range(hub: PatchedHub, format: str) -> None:
    import datasets

    other = [{"text": "Other."}]
    hub.add_dataset("org/data", {"first": {"train": ROWS, "test": ROWS[:5]}, "second": {"train": other}}, format=format)
    train = datasets.load_dataset("org/data", "first", split="train[:-200]")
    assert train["text"] == [row["text"] for row in ROWS[:100]]
    streamed = datasets.load_dataset("org/data", "second", split="train", streaming=True)
    assert list(streamed) == other
    test = datasets.load_dataset("org/data", split="test", streaming=True)
    assert [row["id"] for row in test] == [0, 1, 2, 3, 4]


def test_a_data_set_by_the_names_of_its_files_at_an_older_commit(hub: PatchedHub) -> None:
    import datasets

    first = hub.add_dataset("org/data", {"default": {"train": ROWS[:2]}}, layout="folders")
    hub.add_dataset("org/data", {"default": {"train": ROWS[:3]}}, layout="folders")
    found = datasets.load_dataset("org/data", split="train", revision=first)
    assert len(found) == 2
    assert len(datasets.load_dataset("org/data", split="train", streaming=True).take(9)._head(9)["id"]) == 3


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
def test_uploads_make_commits_and_unchanged_files_are_not_sent_again(hub: PatchedHub, tmp_path: Path) -> None:
    for path, content in FILES.items():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    api = HfApi(token=TOKENS["write"])
    assert api.whoami()["auth"]["accessToken"]["role"] == "write"
    api.create_repo(f"{USER}/new", private=True)
    first = api.upload_folder(repo_id=f"{USER}/new", folder_path=tmp_path / "model")
    held = hub.files(f"{USER}/new")
    assert held["model.safetensors"] == FILES["model.safetensors"]
    assert held["config.json"] == b"{}"
    assert hub.repositories["model", f"{USER}/new"].private
    sent = len(hub.requests("/lfs/", "PUT"))
    second = api.upload_folder(repo_id=f"{USER}/new", folder_path=tmp_path / "model")
    assert second.oid == first.oid
    assert len(hub.requests("/lfs/", "PUT")) == sent == 1
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token=TOKENS["read"]).create_repo(f"{USER}/other")


def test_a_process_of_its_own_uses_the_hub_it_is_told(hub_server: LocalHub, tmp_path: Path) -> None:
    hub_server.add_model("org/gated", FILES, gated=True)
    hub_server.add_token("hf_test_allowed", access=("org/gated",))
    code = "from huggingface_hub import hf_hub_download as get; print(open(get('org/gated', 'config.json')).read())"
    environment = hub_server.environment(tmp_path, token="hf_test_allowed")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "{}\n", done.stderr
    hub_server.stop()
    environment = hub_server.environment(tmp_path, offline=True)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "{}\n", done.stderr
    assert "hf_test_allowed" not in os.environ.values()
