"""A hub on loopback: one model made of a folder's files, as much of the real one's HTTP interface as its library uses.

Large files (`*.safetensors`) lie on another host, as they do there: the hub answers with their sha256 and leads on to
it. What goes wrong on the way is asked for in advance.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "org/tiny"


class Request(NamedTuple):
    """method, path, range and token as they came; sent: bytes of the file that went out."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent: int


class FakeHub:
    """Change what it says and does at any time. A context manager.

    files: contents by name. hashes_known: whether the list of files tells the sha256 of large ones.
    token: which it wants of everybody who fetches a file; None: none. refusal: status and code for others.
    troubles: what happens to the next requests of large files, one each: a status, or after how many bytes the
    connection breaks; None is no trouble. headers: besides the usual, of answers with such a status.
    serves_ranges: whether requests for parts get them. slow_after: bytes of large files after which only 20 a second
    come on each connection; None: never.
    """

    def __init__(self, folder: Path):
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.hashes_known = True
        self.token: str | None = None
        self.refusal = (401, "GatedRepo")
        self.lists_for_all = True
        self.troubles: list[int | tuple[str, int] | None] = []
        self.headers: dict[str, str] = {}
        self.serves_ranges = True
        self.slow_after: int | None = None
        self.closed = threading.Event()
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._large = _serve(self, _LargeFiles)
        self._hub = _serve(self, _Hub)
        self.url = f"http://127.0.0.1:{self._hub.server_port}"
        self.large_url = f"http://localhost:{self._large.server_port}"

    def sent(self, file: str | None = None) -> int:
        """Bytes of one or all large files that went out."""
        name = "" if file is None else sha256(self.files[file])
        return sum(request.sent for request in self.requests if f"/large/{name}" in request.path)

    def large_requests(self) -> list[Request]:
        return [request for request in self.requests if request.path.startswith("/large/")]

    def whole_files(self) -> set[str]:
        """Names of the files that were fetched from the hub itself."""
        return {
            request.path.rpartition("/")[2]
            for request in self.requests
            if request.method == "GET" and "/resolve/" in request.path and request.range is None
        }

    def close(self) -> None:
        self.closed.set()
        for server in (self._hub, self._large):
            server.shutdown()
            server.server_close()

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@lru_cache(maxsize=64)  # asked for with every request
def sha256(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def ask(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the hub's library in this process ask this hub; it reads HF_ENDPOINT only once, when it is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )


def _is_large(file: str) -> bool:
    return file.endswith(".safetensors")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    hub: FakeHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who breaks a connection off has a reason."""


def _serve(hub: FakeHub, handler: type[http.server.BaseHTTPRequestHandler]) -> _Server:
    server = _Server(("127.0.0.1", 0), handler)
    server.hub = hub
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> FakeHub:
        return self.server.hub

    def note(self, sent: int = 0) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        request = Request(self.command, urlsplit(self.path).path, self.headers.get("Range"), token, sent)
        with self.hub.lock:
            self.hub.requests.append(request)

    def answer(self, status: int, headers: Mapping[str, str], contents: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(contents)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(contents)

    def refuse(self, status: int, code: str, **headers: str) -> None:
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": "no", **headers})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError


class _Hub(_Handler):
    def do_GET(self) -> None:
        self.note()
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:4] == ["api", "models", *MODEL.split("/")]:
            if not self.hub.lists_for_all and not self.has_token():
                return self.refuse(*self.hub.refusal)
            if parts[4:] in ([], ["revision", "main"], ["revision", COMMIT]):
                blobs = "blobs" in parse_qs(urlsplit(self.path).query, keep_blank_values=True)
                contents = json.dumps(self.listing(blobs)).encode()
                return self.answer(200, {"Content-Type": "application/json"}, contents)
            return self.refuse(404, "RevisionNotFound")
        if parts[:3] == [*MODEL.split("/"), "resolve"] and len(parts) == 5:
            return self.file(parts[4])
        return self.refuse(404, "RepoNotFound")

    def has_token(self) -> bool:
        return self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def listing(self, blobs: bool) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for name, contents in self.hub.files.items():
            siblings.append({"rfilename": name})
            if blobs:
                siblings[-1]["size"] = len(contents)
                if _is_large(name) and self.hub.hashes_known:
                    siblings[-1]["lfs"] = {"sha256": sha256(contents), "size": len(contents), "pointerSize": 130}
        return {"id": MODEL, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}

    def file(self, name: str) -> None:
        if not self.has_token():
            return self.refuse(*self.hub.refusal)
        if name not in self.hub.files:
            return self.refuse(404, "EntryNotFound", **{"X-Repo-Commit": COMMIT})
        contents = self.hub.files[name]
        if not _is_large(name):
            tag = hashlib.sha1(contents).hexdigest()
            return self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'}, contents)
        tag = sha256(contents)
        return self.answer(
            302,
            {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(len(contents)),
                "X-Linked-ETag": f'"{tag}"',
                "Location": f"{self.hub.large_url}/large/{tag}?signature=1",
            },
        )


class _LargeFiles(_Handler):
    def do_GET(self) -> None:
        hub = self.hub
        name = urlsplit(self.path).path.rpartition("/")[2]
        contents = next(contents for contents in list(hub.files.values()) if sha256(contents) == name)
        with hub.lock:
            trouble = hub.troubles.pop(0) if hub.troubles else None
        if isinstance(trouble, int):
            self.note()
            return self.answer(trouble, hub.headers)
        status, headers = 200, {}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        body = contents
        if wanted is not None and hub.serves_ranges:
            start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(contents))
            if start >= len(contents):
                self.note()
                return self.answer(416, {"Content-Range": f"bytes */{len(contents)}"})
            status, headers = 206, {"Content-Range": f"bytes {start}-{end - 1}/{len(contents)}"}
            body = contents[start:end]
        most = len(body) if trouble is None else min(trouble[1], len(body))
        with hub.lock:
            room = most if hub.slow_after is None else max(0, hub.slow_after - hub.sent())
            quick = min(most, room)
            self.note(quick)
        headers["Content-Length"] = str(len(body))
        self.answer(status, headers)
        self.wfile.write(body[:quick])
        for place in range(quick, most):
            if hub.closed.wait(0.05):
                break
            self.note(1)
            self.wfile.write(body[place : place + 1])
        self.close_connection = most < len(body)
        return None
