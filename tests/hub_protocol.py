"""The Hub's protocol over HTTP, as far as huggingface_hub, transformers and datasets speak it.

Behaviour where the real Hub has it: a gated repository shows its info and tree to everybody and its files to those with
access; a missing repository is 401 without a token and 404 with one; large files lead to another host by a redirect.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any
from urllib.parse import parse_qs, unquote

from hub_answers import Answers, Refused
from hub_store import Repository, entry, is_large, listing, object_id

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?")
_RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_BATCH = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")


class Handler(Answers):
    """Answers what is asked of a hub."""

    def _route(self, body: bytes) -> None:
        path = self.place.path
        if found := _RESOLVE.fullmatch(path):
            kind, name, revision, file = found.groups()
            self._resolve("dataset" if kind else "model", name, unquote(revision), unquote(file))
        elif found := _BATCH.fullmatch(path):
            self._lfs_batch(self._writable("dataset" if found[1] else "model", found[2]), json.loads(body))
        elif path.startswith("/cdn/"):
            self._content(self.hub.blobs[path.rpartition("/")[2]], path.rpartition("/")[2], {})
        elif path.startswith("/lfs/"):
            self._store(path.rpartition("/")[2], body)
        elif path == "/api/whoami-v2":
            self._whoami()
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := _API.fullmatch(path):
            self._repository(found[1][:-1], found[2], unquote(found[3] or ""), body)
        else:
            raise Refused(404, None, f"no such address: {path}")

    def _repository(self, kind: str, name: str, rest: str, body: bytes) -> None:
        verb, _, what = rest.partition("/")
        if verb in ("preupload", "commit", "branch"):
            repository = self._writable(kind, name)
            {"preupload": self._preupload, "commit": self._commit, "branch": self._branch}[verb](repository, what, body)
            return
        repository = self._readable(kind, name)
        if verb in ("", "revision"):
            self._json(self._info(repository, self._find(repository, what or "main")))
        elif verb == "tree":
            revision, _, folder = what.partition("/")
            self._tree(repository, revision, folder)
        elif verb == "paths-info":
            files = repository.commits[self._find(repository, what)]
            paths = parse_qs(body.decode()).get("paths", [])
            self._json([entry(path, files[path]) for path in paths if path in files])
        elif verb == "refs":
            self._refs(repository)
        elif verb == "auth-check":
            self._require_access(repository)
            self._json({})
        else:
            raise Refused(404, None, f"no such address: {self.path}")

    # Reading

    def _info(self, repository: Repository, commit: str) -> dict[str, Any]:
        files = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        if "blobs" in self.query:
            contents = repository.commits[commit]
            files = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} | ({"lfs": {"sha256": e["lfs"]["oid"], "size": e["size"], "pointerSize": 134}} if "lfs" in e else {}) for e in (entry(p, contents[p]) for p in sorted(contents))]  # fmt: skip  # noqa: E501
        return {
            "_id": "0", "id": repository.name, "author": repository.name.partition("/")[0], "sha": commit,
            "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
            "private": repository.private, "gated": "manual" if repository.gated else False, "disabled": False,
            "downloads": 0, "likes": 0, "tags": [], "siblings": files,
        }  # fmt: skip

    def _tree(self, repository: Repository, revision: str, folder: str) -> None:
        files = repository.commits[self._find(repository, revision)]
        found = listing(files, folder, recursive=self.query.get("recursive", "").lower() == "true")
        if found is None:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        start = int(self.query.get("cursor", 0))
        page = found[start : start + self.hub.page_size]
        headers = {}
        if start + len(page) < len(found):
            others = "&".join(f"{key}={value}" for key, value in self.query.items() if key != "cursor")
            next_page = f"{self.hub.url}{self.place.path}?{others}&cursor={start + len(page)}"
            headers["Link"] = f'<{next_page}>; rel="next"'
        self._json(page, headers=headers)

    def _refs(self, repository: Repository) -> None:
        branches, tags = (
            [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in found.items()]
            for kind, found in (("heads", repository.branches), ("tags", repository.tags))
        )
        self._json({"branches": branches, "converts": [], "tags": tags})

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._readable(kind, name)
        self._require_access(repository)
        commit = self._find(repository, revision)
        content = repository.commits[commit].get(path)
        if content is None:
            raise Refused(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        etag = object_id(path, content)
        if is_large(path, len(content)):
            self.hub.blobs[etag] = content
            linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": commit}
            self._send(302, b"", {**linked, "Location": f"{self.hub.content_url}/cdn/{name}/{path}/{etag}"})
        else:
            self._content(content, etag, {"X-Repo-Commit": commit})

    # Writing

    def _whoami(self) -> None:
        token = self._token()
        if token is None:
            raise Refused(401, None, "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": token.role}}
        self._json({"type": "user", "name": token.user, "fullname": token.user, "orgs": [], "auth": access})

    def _create(self, asked: dict[str, Any]) -> None:
        token = self._token()
        if token is None:
            raise Refused(401, None, "Invalid username or password.")
        owner, kind = asked.get("organization") or token.user, asked.get("type") or "model"
        name = f"{owner}/{asked['name']}"
        if token.role != "write" or owner != token.user:
            raise Refused(403, None, f"You don't have the rights to create a {kind} under the namespace {owner!r}")
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            self._json({"error": "You already created this repo", "url": url}, 409)
            return
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[kind, name] = Repository(name, kind, private=private)
        self.hub.repositories[kind, name].commit({".gitattributes": b""}, "initial commit")
        self._json({"url": url, "name": name, "private": private})

    def _preupload(self, repository: Repository, revision: str, body: bytes) -> None:
        files = repository.commits[self._find(repository, revision)]
        self._json({"files": [
            {
                "path": file["path"], "shouldIgnore": False,
                "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                **({"oid": object_id(file["path"], files[file["path"]])} if file["path"] in files else {}),
            }
            for file in json.loads(body)["files"]
        ]})  # fmt: skip

    def _lfs_batch(self, repository: Repository, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            known = one["oid"] in self.hub.blobs
            upload = {"upload": {"href": f"{self.hub.content_url}/lfs/{one['oid']}", "header": {}}}
            objects.append({**one, "authenticated": True, **({} if known else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, None, "content does not match its hash")
        self.hub.blobs[oid] = body
        self._send(200, b"", {"ETag": f'"{oid}"'})

    def _commit(self, repository: Repository, revision: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(repository.commits[self._find(repository, revision)])
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "deletedFolder":
                files = {path: c for path, c in files.items() if not path.startswith(value["path"])}
        commit = repository.commit(files, message, revision)
        url = f"{self.hub.url}/{repository.name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _branch(self, repository: Repository, name: str, body: bytes) -> None:
        if name in repository.branches:
            raise Refused(409, None, "Reference already exists")
        repository.branches[name] = self._find(repository, json.loads(body or b"{}").get("startingPoint") or "main")
        self._json({})
