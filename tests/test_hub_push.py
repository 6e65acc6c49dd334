"""A finished run pushed to a local Hub: what arrives, twice the same, what is refused before anything is sent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ENGLISH, GERMAN, write_jsonl
from hub_fixtures import PatchedHub, patch_libraries
from hub_server import TOKENS, USER
from typer.testing import CliRunner

from bam_lora.cli import app
from bam_lora.errors import UserError
from bam_lora.hub_public import public_files, public_report
from bam_lora.hub_push import push
from bam_lora.loop import run
from bam_lora.recipe import recipe_from_dict

# huggingface_hub's own
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
MINE = f"{USER}/german"


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a base and text of this machine."""
    place = tmp_path_factory.mktemp("hidden-place")
    base = place / "tiny-base"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": str(base)}))
    german, english = write_jsonl(place / "german.jsonl", GERMAN), write_jsonl(place / "english.jsonl", ENGLISH)
    recipe = recipe_from_dict(
        {
            "base": str(base),
            "output": str(place / "run"),
            "data": {
                "target": [{"path": str(german)}],
                "replay": [{"path": str(english)}],
                "replay_share": 0.2,
                "sequence_length": 64,
            },
            "bam": {"slices": 2, "branches": 2},
            "lora": {"r": 2},
            "quantization": {"bits": 16, "compute_dtype": "float32"},
            "training": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 2},
            "evaluation": {"target": [{"path": str(german), "documents": 4}], "precision": "16bit"},
        }
    )
    run(recipe)
    return place / "run"


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_a_push_uploads_model_card_and_report_and_nothing_of_this_machine(hub: PatchedHub, finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hub.log_in("write")
    done = cli(finished, "--push", "german")
    assert done.exit_code == 0, done.output
    assert f"{hub.url}/{MINE} (private: only you and those you let in see it)" in done.output
    held = hub.files(MINE)
    written = {path.name for path in (finished / "model").iterdir()} - {"done.json"}
    assert set(held) == written | {".gitattributes", "report.html", "report.json"}
    for name, content in held.items():
        assert b"hidden-place" not in content, name
        assert not [token for token in TOKENS.values() if token.encode() in content], name
        assert str(Path.home()).encode() not in content, name
    assert hub.repositories["model", MINE].private
    front, card = held["README.md"].decode().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "[report.html](report.html)" in card
    report = json.loads(held["report.json"])
    mine = json.loads((finished / "report.json").read_text())
    assert report["summary"] == mine["summary"]
    assert report["base"] == "tiny-base"
    assert mine["base"] != "tiny-base"
    found = AutoModelForCausalLM.from_pretrained(MINE)
    assert found.config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(MINE).eos_token == "</s>"


def test_pushed_twice_nothing_is_sent_and_what_changed_is(hub: PatchedHub, finished: Path) -> None:
    hub.log_in("write")
    first = push(finished, MINE, private=False)
    assert first.new
    assert not first.private
    before = len(hub.log)
    second = cli(finished, "--push", MINE)
    assert f"{hub.url}/{MINE} (public); nothing is new" in second.output
    asked = [(one.method, one.path) for one in hub.log[before:]]
    assert not [path for method, path in asked if method == "PUT" or "/commit/" in path]
    hub.commit_files(MINE, {"README.md": "other", "model-00001-of-00009.safetensors": b"old"})
    third = push(finished, MINE)
    assert third.new
    assert "model-00001-of-00009.safetensors" not in hub.files(MINE)
    assert hub.files(MINE)["README.md"] != b"other"
    assert not [one for one in hub.log[before:] if one.method == "PUT"]


def test_an_upload_that_broke_off_is_completed(
    hub: PatchedHub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.log_in("write")
    hub.fail("/lfs/", 503, times=100)
    with pytest.raises(UserError, match=r"^tester/german: expected an answer.*status 503"):
        push(finished, MINE)
    assert set(hub.files(MINE)) == {".gitattributes"}
    hub.heal()
    assert push(finished, MINE).new
    assert "model.safetensors" in hub.files(MINE)
    hub.fail("/commit/", 500)
    other = f"{USER}/other"
    with pytest.raises(UserError, match=r"^tester/other: expected an answer"):
        push(finished, other)
    sent = len(hub.requests(method="PUT"))
    assert push(finished, other).new
    assert len(hub.requests(method="PUT")) == sent


def test_a_branch_and_an_adapter(hub: PatchedHub, finished: Path, tmp_path: Path) -> None:
    hub.log_in("write")
    push(finished, MINE)
    main = dict(hub.files(MINE))
    output = tmp_path / "adapter"
    done = cli(finished, "--output", output, "--rank", 2, "--push", MINE, "--revision", "lora")
    assert done.exit_code == 0, done.output
    assert f"{hub.url}/{MINE}/tree/lora (private" in done.output
    assert hub.files(MINE) == main
    held = hub.files(MINE, revision="lora")
    assert "model.safetensors" not in held
    assert {"adapter_model.safetensors", "report.html"} <= set(held)
    assert json.loads(held["adapter_config.json"])["base_model_name_or_path"] == "tiny-base"
    card = held["README.md"].decode()
    assert "library_name: peft" in card
    assert "relative error of its delta" in card
    assert f'AutoPeftModelForCausalLM.from_pretrained("{MINE}"' in card
    assert "AutoModelForCausalLM.from_pretrained" not in card.replace("AutoPeftModel", "")
    assert not [name for name, content in held.items() if b"hidden-place" in content]
    assert not {"config.json", "generation_config.json"} & set(held)  # of the model that was there
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "done.json",
    ]  # fmt: skip
    push(finished, MINE, revision="lora")
    held = hub.files(MINE, revision="lora")
    assert not [name for name in held if name.startswith("adapter")]  # else transformers would look for the adapter
    assert set(held) == set(main)


def test_weights_that_were_not_pushed_from_here_are_left_alone(hub: PatchedHub, finished: Path) -> None:
    hub.log_in("write")
    theirs = {"config.json": "{}", "model.safetensors": b"years of work", "README.md": "Mine."}
    hub.add_model(MINE, theirs)
    with pytest.raises(
        UserError, match=r"^--push tester/german: expected a new repository.*weights \(model\.safetensors"
    ):
        push(finished, MINE)
    assert hub.files(MINE)["model.safetensors"] == b"years of work"
    assert not hub.requests("/commit/", "POST")


def test_another_model_in_place_of_the_runs_own(hub: PatchedHub, finished: Path, tmp_path: Path) -> None:
    hub.log_in("write")
    shutil.copytree(finished / "model", tmp_path / "chat", ignore=shutil.ignore_patterns("README.md"))
    push(finished, MINE, folder=tmp_path / "chat", note="On top of the run: a chat vector.")
    card = hub.files(MINE)["README.md"].decode()
    assert "adapted with bam_lora\n\nOn top of the run: a chat vector.\n\n" in card
    assert "## Results" in card


def test_what_may_not_be_pushed_is_refused_before_anything_is_sent(
    hub: PatchedHub, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def expect(words: str, repository: str = MINE, **settings: Any) -> None:
        with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
            push(finished, repository, **settings)

    expect("--push tester/german: expected a token that may write, found none. Make one with the role “write”")
    hub.log_in("read")
    expect("expected a token that may write there, found one of tester that may only read")
    hub.log_in("hf_unknown")
    expect("expected a token that the Hub knows")
    hub.log_in("write")
    expect("--push some-org/german: expected a token that may write there, found one that may not", "some-org/german")
    expect("--push a/b/c: expected org/name", "a/b/c")
    hub.add_model("some-org/theirs", {"config.json": "{}"})
    expect("--push some-org/theirs: expected a token that may write there, found one that may not", "some-org/theirs")
    hub.add_model(f"{USER}/open", {"config.json": "{}"})
    expect("expected a private repository, found one that is public already.*--private", f"{USER}/open", private=True)
    assert not hub.requests("/lfs/|/commit/|objects/batch", "PUT")
    assert set(hub.files(f"{USER}/open")) == {"config.json"}
    hub.stop()
    expect("--push tester/german: expected http.*, found no connection .*refused.*Check the network")
    patch_libraries(monkeypatch, hub.url, hub.home, offline=True)
    expect("expected the Hub, found HF_HUB_OFFLINE")
    unfinished = tmp_path / "run"
    shutil.copytree(finished, unfinished, ignore=shutil.ignore_patterns("model"))
    with pytest.raises(UserError, match="expected a finished run"):
        push(unfinished, MINE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "export: expected --output FOLDER or --push REPO, found neither"),
        (["--push", "a/b", "--rank", "4"], "--rank: expected --output FOLDER with it"),
        (["--output", "x", "--public"], "--public or --private: expected --push REPO with it"),
        (["--output", "x", "--revision", "b"], "--revision: expected --push REPO with it"),
    ],
)
def test_options_that_do_not_fit(finished: Path, options: list[str], words: str) -> None:
    done = cli(finished, *options)
    assert done.exit_code == 1
    assert words in done.output


def test_hidden_files_are_not_published(tmp_path: Path) -> None:
    for name in (".env", ".cache/token", "figures/.plane.png", "figures/plane.png", "config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert set(public_files(tmp_path)) == {"figures/plane.png", "config.json"}


def test_links_out_of_the_folder_are_not_published(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "model" / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match="expected a file of its own folder, found a link to"):
        public_files(tmp_path / "model")


def test_a_public_report_has_no_paths_and_no_script() -> None:
    report = {
        "base": "/home/me/models/tiny",
        "recipe": {"script": {"args": "private"}, "data": {"target": [{"path": "C:\\texts\\a.jsonl"}]}},
        "environment": {
            "command": "/home/me/.venv/bin/bam-lora run '/my secret/r 1.yaml' --set output=/data/x --set a.b=1/2 "
            "--set 'data.target=[{path: /a secret/b.txt, tokens: 1M}]'"
        },
        "data": {"sources": [{"files": {"/home/me/a.jsonl": "hash"}, "example": {"row": 1, "excerpt": "Private."}}]},
        "samples": [{"prompt": "/ ", "text": "~/ is home"}],
        "scores": [{"set": "org/data", "text": "and/or"}],
    }
    assert public_report(report) == {
        "base": "tiny",
        "recipe": {"data": {"target": [{"path": "a.jsonl"}]}},
        "environment": {
            "command": "bam-lora run 'r 1.yaml' --set output=x --set a.b=1/2 "
            "--set 'data.target=[{path: b.txt, tokens: 1M}]'"
        },
        "data": {"sources": [{"files": {"a.jsonl": "hash"}, "example": {"row": 1}}]},
        "samples": report["samples"],
        "scores": report["scores"],
    }
