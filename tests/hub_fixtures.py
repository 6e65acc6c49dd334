"""Fixtures with a local Hub (see `hub_server`); the only place that reaches into the libraries' settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import PLAIN, TOKENS, LocalHub


class PatchedHub(LocalHub):
    """A hub that the libraries in this process ask; `home` has their caches and the login."""

    home: Path

    def log_in(self, token: str) -> None:
        """Puts a token (one of TOKENS' keys, or one of `add_token`) where `hf auth login` does."""
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "token").write_text(TOKENS.get(token, token), encoding="utf-8")


@pytest.fixture
def hub_server() -> Iterator[LocalHub]:
    """A hub; nothing in this process knows of it."""
    with running(LocalHub()) as hub:
        yield hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PatchedHub]:
    """A hub that this process's libraries ask, with an empty cache and no login."""
    with running(PatchedHub()) as hub:
        hub.home = tmp_path / "hf-home"
        patch_libraries(monkeypatch, hub.url, hub.home)
        yield hub


@contextlib.contextmanager
def running(hub: Any) -> Iterator[Any]:
    """Stops it in the end, if it still runs."""
    try:
        yield hub
    finally:
        if hub._server is not None:
            hub.stop()


def patch_libraries(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, *, offline: bool = False) -> None:
    """Makes huggingface_hub and datasets, which read the environment once, use this endpoint, cache and login."""
    import datasets.config
    from huggingface_hub import HfFileSystem, constants, hf_api
    from huggingface_hub.utils import close_session

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    values = {**PLAIN, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    hub = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
    }
    if hasattr(constants, "HF_URL_HOSTS"):  # huggingface_hub 2 looks a link's host up in it
        hub["HF_URL_HOSTS"] = constants.HF_URL_HOSTS | {"127.0.0.1"}
    data = {
        "HF_ENDPOINT": url,
        "HUB_DATASETS_URL": url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_HUB_OFFLINE": offline,
        "HF_DATASETS_OFFLINE": offline,
        "HF_CACHE_HOME": str(home),
        "HF_DATASETS_CACHE": home / "datasets",
        "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
        "EXTRACTED_DATASETS_PATH": home / "datasets" / "downloads" / "extracted",
        "HF_MODULES_CACHE": home / "modules",
        "HF_UPDATE_DOWNLOAD_COUNTS": False,
    }
    for module, names in ((constants, hub), (datasets.config, data)):
        for name, value in names.items():
            monkeypatch.setattr(module, name, value, raising=name != "AGENT_HARNESSES_PATH")
    monkeypatch.setattr(hf_api.api, "endpoint", url)  # of huggingface_hub.file_exists and its like, which PEFT calls
    HfFileSystem.clear_instance_cache()  # it remembers which repositories there are
    close_session()
