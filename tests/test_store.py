"""An artefact is whole or it does not count."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bam_lora import store
from bam_lora.errors import UserError


def filled(folder: Path, key: str = "key") -> Path:
    with store.new_folder(folder) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "a.bin").write_bytes(b"abc")
        (temporary / "sub" / "b.bin").write_bytes(b"defg")
        store.seal(temporary, key, {"seconds": 1.5})
    return folder


def test_a_sealed_folder_verifies_and_keeps_its_facts(tmp_path: Path) -> None:
    manifest = store.verify(filled(tmp_path / "x"), "key")
    assert manifest is not None
    assert manifest["facts"] == {"seconds": 1.5}
    assert set(manifest["files"]) == {"a.bin", "sub/b.bin"}
    assert store.verify(tmp_path / "x", "other key") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "no manifest"])
def test_any_damage_shows(tmp_path: Path, damage: str) -> None:
    folder = filled(tmp_path / "x")
    if damage == "flip":
        (folder / "a.bin").write_bytes(b"abd")
    elif damage == "truncate":
        (folder / "sub" / "b.bin").write_bytes(b"def")
    elif damage == "delete":
        (folder / "a.bin").unlink()
    elif damage == "manifest":
        text = (folder / store.MANIFEST).read_text()
        (folder / store.MANIFEST).write_text(text.replace('"bytes": 3', '"bytes": 4'))
    else:
        (folder / store.MANIFEST).unlink()
    assert store.verify(folder, "key") is None


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with store.new_folder(tmp_path / "x") as temporary:
            (temporary / "a").write_text("a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_takes_the_place_of_the_old(tmp_path: Path) -> None:
    filled(tmp_path / "x", "old")
    filled(tmp_path / "x", "new")
    assert store.verify(tmp_path / "x", "new") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_records_carry_their_own_hash(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    store.write_record(path, "key", {"value": 0.1})
    assert store.read_record(path, "key") == {"value": 0.1, "key": "key"}
    assert store.read_record(path, "other") is None
    path.write_text(path.read_text().replace("0.1", "0.2"))
    assert store.read_record(path) is None
    path.write_text("{")
    assert store.read_record(path) is None


def test_paths_stay_inside(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    assert store.inside(root, "a/b") == root / "a" / "b"
    for name in ("../x", "/etc/passwd", "link/x", "a/../../x"):
        with pytest.raises(UserError, match="expected paths inside this folder"):
            store.inside(root, name)


def test_a_manifest_that_names_an_outside_file_does_not_verify(tmp_path: Path) -> None:
    folder = filled(tmp_path / "x")
    (tmp_path / "outside").write_bytes(b"abc")
    manifest = store.read_record(folder / store.MANIFEST)
    assert manifest is not None
    manifest["files"]["../outside"] = {"bytes": 3, "sha256": store.hash_file(tmp_path / "outside")}
    manifest.pop("key")
    store.write_record(folder / store.MANIFEST, "key", manifest)
    assert store.verify(folder, "key") is None


def test_sweep_removes_only_what_writers_left(tmp_path: Path) -> None:
    filled(tmp_path / "x")
    (tmp_path / "x" / ".tmp-1-y").mkdir()
    (tmp_path / "x" / ".tmp-1-y" / "half").write_text("")
    (tmp_path / ".tmp-2-plan.json").write_text("")
    store.sweep(tmp_path)
    assert store.verify(tmp_path / "x", "key") is not None
    assert not list(tmp_path.rglob(".tmp-*"))


def test_too_little_space_is_said_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"disk space for the fold in .*: expected .* GB free, found .*Free some"):
        store.require_space(tmp_path / "not" / "there", 10**18, "the fold")


def test_digest_is_canonical() -> None:
    assert store.digest({"a": 1, "b": [2.0]}) == store.digest({"b": [2.0], "a": 1})
    with pytest.raises(ValueError, match=r"NaN|Out of range"):
        store.digest(float("nan"))


def test_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        store.write_text(tmp_path / "t", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_many_files_have_the_hashes_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    paths = [tmp_path / str(number) for number in range(9)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * (1000 * number))
    assert store.hash_files(paths) == [store.hash_file(path) for path in paths]
    paths[4].unlink()
    with pytest.raises(FileNotFoundError):
        store.hash_files(paths)
    assert store.hash_files([]) == []
