"""A hub on this machine: the part of the HTTP interface of huggingface.co by which a folder is uploaded.

Written after what huggingface_hub 2.4 sends and reads: `repos/create`, `models/ID`, `validate-yaml`, `branch`,
`preupload`, the batch interface of git-lfs, and `commit` with one JSON object per line.
"""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest

TOKEN = "hf_write"
USER = "me"
_COMMIT = "c" * 40


@dataclass
class Hub:
    """What the server has received.

    Attributes:
        url: Where it listens.
        repositories: Those that are there, by id, and whether they are private.
        branches: Id and branch, of those that were made.
        files: Id, branch and path -> content of what was committed.
        messages: Of the commits.
        blobs: Digest -> content of what came by git-lfs.
        statuses: Route -> status with which it refuses.
        dropped: Routes that close the connection without an answer.
    """

    url: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    branches: list[tuple[str, str]] = field(default_factory=list)
    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def folder(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch by path."""
        return {path: data for (name, at, path), data in self.files.items() if (name, at) == (repo_id, branch)}

    # -------------------------------------------------------------------------------------------- routes

    def create(self, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        status = 409 if repo_id in self.repositories else 200
        self.repositories.setdefault(repo_id, asked.get("visibility") == "private")
        return status, {"url": f"{self.url}/{repo_id}"}

    def info(self, body: bytes, repo_id: str) -> tuple[int, Any]:
        if repo_id not in self.repositories:
            return 404, {"error": "Repository not found"}
        return 200, {"id": repo_id, "private": self.repositories[repo_id], "sha": _COMMIT, "siblings": [], "tags": []}

    def validate(self, body: bytes) -> tuple[int, Any]:
        is_card = json.loads(body)["content"].startswith("---\n")
        problems = [] if is_card else [{"message": "no metadata"}]
        return 200 if is_card else 400, {"errors": problems, "warnings": []}

    def branch(self, body: bytes, repo_id: str, branch: str) -> tuple[int, Any]:
        self.branches.append((repo_id, unquote(branch)))
        return 200, {}

    def preupload(self, body: bytes, repo_id: str, branch: str) -> tuple[int, Any]:
        asked = json.loads(body)["files"]
        modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked}
        return 200, {"files": [{"path": path, "uploadMode": m, "shouldIgnore": False} for path, m in modes.items()]}

    def batch(self, body: bytes, repo_id: str) -> tuple[int, Any]:
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.blobs:
                entry["actions"] = {"upload": {"href": f"{self.url}/blobs/{entry['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def blob(self, body: bytes, digest: str) -> tuple[int, Any]:
        assert hashlib.sha256(body).hexdigest() == digest
        self.blobs[digest] = body
        return 200, {}

    def commit(self, body: bytes, repo_id: str, branch: str) -> tuple[int, Any]:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append(value["summary"])
                continue
            content = base64.b64decode(value["content"]) if entry["key"] == "file" else self.blobs[value["oid"]]
            self.files[repo_id, unquote(branch), value["path"]] = content
        return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/{_COMMIT}", "commitOid": _COMMIT}


_ID = r"([^/]+/[^/]+?)"
_ROUTES = {
    "create": r"POST /api/repos/create",
    "info": rf"GET /api/models/{_ID}",
    "validate": r"POST /api/validate-yaml",
    "branch": rf"POST /api/models/{_ID}/branch/([^/]+)",
    "preupload": rf"POST /api/models/{_ID}/preupload/([^/]+)",
    "batch": rf"POST /{_ID}\.git/info/lfs/objects/batch",
    "blob": r"PUT /blobs/(\w+)",
    "commit": rf"POST /api/models/{_ID}/commit/([^/]+)",
}


@contextmanager
def reachable() -> Iterator[Hub]:
    """A hub, found where huggingface_hub looks for it in this process, with a token that may write."""
    with serve() as hub, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # it tries again and again
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that listens on a port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = f"{self.command} {self.path.partition('?')[0]}"
            matches = ((name, re.fullmatch(pattern, request)) for name, pattern in _ROUTES.items())
            route, match = next((name, match) for name, match in matches if match)
            if route in hub.dropped:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if route != "blob" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.reply(401, {"error": "Invalid username or password."})
            elif route in hub.statuses:
                self.reply(hub.statuses[route], {"error": "Forbidden: you have no write access."})
            else:
                self.reply(*getattr(hub, route)(body, *match.groups()))

        do_GET = do_POST = do_PUT = answer

        def reply(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on the screen."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
