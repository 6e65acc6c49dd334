"""What every answer of a local Hub needs: who asks and what they may see, and bytes over the connection."""

from __future__ import annotations

import json
import re
import socket
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import Repository, Token

if TYPE_CHECKING:
    from hub_server import LocalHub


class Refused(Exception):
    """An answer that is an error: status, the Hub's error code and message."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class Answers(BaseHTTPRequestHandler):
    """One connection; the hub it serves is `server.hub`, and `_route` answers a request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def hub(self) -> LocalHub:
        return self.server.hub  # type: ignore[attr-defined]

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *arguments: Any) -> None:
        """The hub keeps a log of its own."""

    def _answer(self) -> None:
        self.close_connection = False
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.place = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(self.place.query).items()}
        self.record = self.hub.note(self.command, unquote(self.place.path), self.headers)
        try:
            self.hub.fail_if_asked(self.record)
            self._route(body)
        except Refused as refused:
            headers = {"X-Error-Message": refused.message, **refused.headers}
            headers |= {"X-Error-Code": refused.code} if refused.code else {}
            self._json({"error": refused.message}, refused.status, headers)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, body: bytes) -> None:
        raise NotImplementedError

    # Who asks

    def _token(self) -> Token | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not given:
            return None
        if given not in self.hub.tokens:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return self.hub.tokens[given]

    def _readable(self, kind: str, name: str) -> Repository:
        token = self._token()
        repository = self.hub.repositories.get((kind, name))
        if repository is None or (repository.private and (token is None or not self._owns(token, name))):
            if token is None:
                raise Refused(401, "RepoNotFound", "Invalid username or password.")
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repository

    def _owns(self, token: Token, name: str) -> bool:
        return name.partition("/")[0] == token.user or name in token.access

    def _writable(self, kind: str, name: str) -> Repository:
        repository = self._readable(kind, name)
        token = self._token()
        if token is None:
            raise Refused(401, None, "Invalid username or password.")
        if token.role != "write" or not self._owns(token, name):
            raise Refused(403, None, "Forbidden: you must use a write token to upload to a repository.")
        return repository

    def _require_access(self, repository: Repository) -> None:
        token = self._token()
        if not repository.gated or (token and self._owns(token, repository.name)):
            return
        words = f"Access to {repository.kind} {repository.name} is restricted"
        if token is None:
            raise Refused(401, "GatedRepo", f"{words}. You must have access to it and be authenticated to access it.")
        raise Refused(403, "GatedRepo", f"{words} and you are not in the authorized list.")

    def _find(self, repository: Repository, revision: str) -> str:
        commit = repository.find(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Sending

    def _content(self, content: bytes, etag: str, headers: dict[str, str]) -> None:
        headers = {**headers, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self._send(200, content, headers)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if start >= len(content):
            raise Refused(416, None, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        self._send(206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self._send(status, content, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.record.status = status
        if self.command == "HEAD":
            return
        limit = self.hub.cut(self.record)
        sent = content if limit is None else content[:limit]
        self.record.bytes = len(sent)
        self.wfile.write(sent)
        if limit is not None and limit < len(content):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
