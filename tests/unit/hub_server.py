"""A small hub on the loopback interface: the endpoints that downloads and uploads of models use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories in memory, served while it is entered.

    Attributes:
        repositories: id -> path -> bytes.
        gated: ids whose files nobody may fetch.
        readers_only: nobody may write.
        cut: a path of which half arrives once, and then no more.
        requests: "METHOD /path", in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.readers_only = False
        self.cut: str | None = None
        self.requests: list[str] = []

    def add(self, repository: str, folder: Path, under: str = "") -> None:
        """Puts all files of a folder into a repository."""
        files = self.repositories.setdefault(repository, {})
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            files[f"{under}/{path.relative_to(folder)}".lstrip("/")] = path.read_bytes()

    def fetched(self) -> set[str]:
        """Paths of the files that were asked for."""
        asked = [re.search(r"/resolve/\w+/(.+)", request) for request in self.requests]
        return {unquote(match[1]) for match in asked if match}

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer(hub, self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def answer(hub: Hub, request: BaseHTTPRequestHandler) -> None:
    path = urlsplit(request.path).path
    hub.requests.append(f"{request.command} {path}")
    body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    if request.command == "POST" and "/paths-info/" not in path:
        write(hub, request, path, body)
    elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/\w+|/tree/\w+)?", path):
        describe(hub, request, match[1], (match[2] or "").startswith("/tree"))
    elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/.+)?", path):
        describe_data(hub, request, match[1], match[2] or "", body)
    elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
        send_file(hub, request, match[1], unquote(match[2]))
    elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
        send_file(hub, request, match[1], unquote(match[2]))
    else:
        fail(request, 404, "EntryNotFound")


def describe(hub: Hub, request: BaseHTTPRequestHandler, repository: str, as_tree: bool) -> None:
    files = hub.repositories.get(repository)
    if files is None:
        return fail(request, 404, "RepoNotFound")
    if as_tree:
        tree = [
            {"type": "file", "path": p, "size": len(f), "oid": oid(f)} for p, f in files.items()
        ]
        return send_json(request, tree)
    siblings = [{"rfilename": p} for p in files]
    send_json(
        request, {"id": repository, "sha": commit(files), "siblings": siblings, "private": False}
    )


def describe_data(
    hub: Hub, request: BaseHTTPRequestHandler, repository: str, what: str, body: bytes
) -> None:
    """A data set as `datasets` asks for it."""
    files = hub.repositories.get(repository)
    if files is None:
        return fail(request, 404, "RepoNotFound")
    if what == "/auth-check":
        if repository in hub.gated:
            return fail(request, 403, "GatedRepo")
        return send_json(request, {})
    entries = [{"type": "file", "path": p, "size": len(f), "oid": oid(f)} for p, f in files.items()]
    if what.startswith("/tree"):
        return send_json(request, entries)
    if what.startswith("/paths-info"):
        wanted = json.loads(body)["paths"]
        return send_json(request, [e for e in entries if e["path"] in wanted])
    describe(hub, request, repository, as_tree=False)


def send_file(hub: Hub, request: BaseHTTPRequestHandler, repository: str, path: str) -> None:
    data = hub.repositories.get(repository, {}).get(path)
    if repository in hub.gated:
        return fail(request, 403, "GatedRepo")
    if data is None:
        return fail(request, 404, "EntryNotFound")
    if path == hub.cut and f"GET {urlsplit(request.path).path}" in hub.requests[:-1]:
        return fail(request, 410, None)
    first = 0
    if asked := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or ""):
        first = int(asked[1])
    request.send_response(206 if first else 200)
    request.send_header("ETag", f'"{oid(data)}"')
    request.send_header("X-Repo-Commit", commit(hub.repositories[repository]))
    request.send_header("Accept-Ranges", "bytes")
    if first:
        request.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
    request.send_header("Content-Length", str(len(data) - first))
    request.end_headers()
    if request.command == "GET":
        if path == hub.cut:
            request.wfile.write(data[: len(data) // 2])
            request.close_connection = True
        else:
            request.wfile.write(data[first:])


def write(hub: Hub, request: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
    if path == "/api/validate-yaml":
        return send_json(request, {"errors": [], "warnings": []})
    if hub.readers_only:
        return fail(request, 401, None)
    if path == "/api/repos/create":
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        hub.repositories.setdefault(name, {})
        return send_json(request, {"url": f"{hub.address}/{name}"})
    match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
    if match is None:
        return fail(request, 404, None)
    if match[2] == "preupload":
        modes = [
            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
            for f in json.loads(body)["files"]
        ]
        return send_json(request, {"files": modes})
    for line in map(json.loads, body.splitlines()):
        if line["key"] == "file":
            data = base64.b64decode(line["value"]["content"])
            hub.repositories[match[1]][line["value"]["path"]] = data
    made = commit(hub.repositories[match[1]])
    url = f"{hub.address}/{match[1]}/commit/{made}"
    send_json(request, {"success": True, "commitOid": made, "commitUrl": url})


def commit(files: dict[str, bytes]) -> str:
    """Changes with the contents, as a commit does."""
    return hashlib.sha1(repr(sorted((p, oid(f)) for p, f in files.items())).encode()).hexdigest()


def oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def send_json(request: BaseHTTPRequestHandler, value: Any, status: int = 200) -> None:
    data = json.dumps(value).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def fail(request: BaseHTTPRequestHandler, status: int, code: str | None) -> None:
    request.send_response(status)
    if code:
        request.send_header("X-Error-Code", code)
    request.send_header("Content-Length", "0")
    request.end_headers()
