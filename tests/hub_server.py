"""A Hugging Face Hub on 127.0.0.1 for tests: models and data sets made by the test, gated, private, broken on demand.

Two ways to use it (fixtures in `hub_fixtures`, for every test):

- `hub` for code in the test's own process: huggingface_hub, transformers and datasets ask it, with an empty cache and
  no token (`hub.log_in("write")` puts one where `hf auth login` does);
- `hub_server` patches nothing; `hub_server.environment(home, token=...)` is for a process of its own.

`hub.add_model("org/name", folder)` and `hub.add_dataset("org/name", {"default": {"train": rows}})` fill it; adding
again is a new commit. `hub.requests(...)` is what was asked.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hub_answers import Refused
from hub_protocol import Handler
from hub_store import Files, Repository, Rows, Token, dataset_files, read_files

TOKENS = {
    "read": "hf_test_read_token",
    "write": "hf_test_write_token",
    "member": "hf_test_member_token",  # read, with access to every gated repository
}
USER = "tester"
PLAIN = {  # no other storage than HTTP, no counting, nobody else asked
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


@dataclass
class Request:
    """One request and what was sent for it: `bytes` of body, the token that came along (None: none)."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    bytes: int = 0


@dataclass
class _Trouble:
    """Something that goes wrong with requests whose path matches, `times` times; a cut or an error."""

    pattern: str
    times: int
    after: int | None = None
    status: int = 0
    headers: Mapping[str, str] | None = None


class LocalHub:
    """A hub that listens from the start; `stop` makes connections to it fail until `start`."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens: dict[str, Token] = {
            TOKENS["read"]: Token(USER, "read"),
            TOKENS["write"]: Token(USER, "write"),
            TOKENS["member"]: Token("member", "read"),
        }
        self.log: list[Request] = []
        self.page_size = 1000  # of a tree
        self.connections: set[socket.socket] = set()
        self._troubles: list[_Trouble] = []
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def content_url(self) -> str:
        """Where large files are: another host, which must not see a token."""
        return f"http://localhost:{self.port}"

    def start(self) -> None:
        """Listens, again on the same port after `stop`."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuses connections."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):  # those that are kept open would go on answering
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()
        self._server = None

    # What it holds

    def add_model(
        self, name: str, source: Path | Files, *, gated: bool = False, private: bool = False, message: str = "model"
    ) -> str:
        """Adds a model, or another commit with exactly these files to it; returns the commit."""
        return self._add("model", name, read_files(source), gated, private, message)

    def add_dataset(
        self,
        name: str,
        configs: Mapping[str, Mapping[str, Rows]],
        *,
        format: str = "parquet",
        layout: str = "card",
        gated: bool = False,
        private: bool = False,
        card: str = "Made by a test.",
        message: str = "data",
    ) -> str:
        """Adds a data set of rows by configuration and split (see `dataset_files`); returns the commit."""
        return self._add("dataset", name, dataset_files(configs, format=format, layout=layout, card=card), gated,
                         private, message)  # fmt: skip

    def _add(self, kind: str, name: str, files: Mapping[str, bytes], gated: bool, private: bool, message: str) -> str:
        repository = self.repositories.setdefault((kind, name), Repository(name, kind))
        repository.gated, repository.private = gated, private
        return repository.commit(files, message)

    def commit_files(self, name: str, files: Files, kind: str = "model", message: str = "more") -> str:
        """Another commit with these files beside, or in place of, those that are there."""
        return self.repositories[kind, name].commit({**self.files(name, kind), **read_files(files)}, message)

    def files(self, name: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """The files of a repository."""
        repository = self.repositories[kind, name]
        commit = repository.find(revision)
        assert commit is not None
        return repository.commits[commit]

    def add_token(self, token: str, *, user: str = USER, role: str = "read", access: tuple[str, ...] = ()) -> str:
        """Adds a token; `access` are the gated or private repositories of others that it may read."""
        self.tokens[token] = Token(user, role, frozenset(access))
        return token

    # What goes wrong

    def interrupt(self, pattern: str, after: int, times: int = 1) -> None:
        """Drops the connection after `after` bytes of the body, for paths that the regular expression finds."""
        self._troubles.append(_Trouble(pattern, times, after=after))

    def fail(self, pattern: str, status: int, times: int = 1, **headers: str) -> None:
        """Answers 429, 500 and the like for paths that the regular expression finds."""
        self._troubles.append(_Trouble(pattern, times, status=status, headers=headers))

    def heal(self) -> None:
        """Nothing goes wrong any more."""
        self._troubles.clear()

    def cut(self, request: Request) -> int | None:
        """After how many bytes this answer ends."""
        trouble = self._trouble(request, cut=True)
        return None if trouble is None or request.status >= 300 else trouble.after

    def fail_if_asked(self, request: Request) -> None:
        """Raises the error that a test has asked for."""
        trouble = self._trouble(request, cut=False)
        if trouble is not None:
            raise Refused(trouble.status, None, "asked for by the test", **(trouble.headers or {}))

    def _trouble(self, request: Request, *, cut: bool) -> _Trouble | None:
        with self._lock:
            for trouble in self._troubles:
                same = (trouble.after is not None) == cut and trouble.times > 0
                if same and re.search(trouble.pattern, request.path) and (not cut or 200 <= request.status < 300):
                    trouble.times -= 1
                    return trouble
        return None

    # What was asked

    def note(self, method: str, path: str, headers: Any) -> Request:
        """Adds a request to the log."""
        token = headers.get("Authorization")
        request = Request(method, path, headers.get("Range"), token.removeprefix("Bearer ") if token else None)
        with self._lock:
            self.log.append(request)
        return request

    def requests(self, pattern: str = "", method: str | None = None) -> list[Request]:
        """The requests so far whose path the regular expression finds."""
        return [one for one in self.log if re.search(pattern, one.path) and method in (None, one.method)]

    def bytes_sent(self, pattern: str = "") -> int:
        """Bytes of all bodies sent for such paths."""
        return sum(one.bytes for one in self.requests(pattern))

    # Who asks it

    def environment(self, home: Path, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """The environment of a process that uses this hub, with its cache and its login below `home`.

        `token` is one of TOKENS' keys, or a token of `add_token`.
        """
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1" if offline else "0"}
        if token is not None:
            own["HF_TOKEN"] = TOKENS.get(token, token)
        return {**inherited, **own, **PLAIN}
