"""A hub on this machine: the few endpoints that the hub's own client asks for models, over folders of a test."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_INFO = re.compile(r"/api/models/(?P<name>.+?)(/revision/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<name>.+?)/resolve/(?P<commit>[0-9a-f]{40})/(?P<file>.+)")
_LARGE = (".safetensors", ".bin")


class Hub:
    """What it holds, and what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, dict[str, Path]] = {}
        """name -> revision -> folder; a commit is the hash of the folder's content."""
        self.requests: list[str] = []
        self.cut_after: int | None = None
        """Break the connection once after so many bytes of a large file."""
        self.stalling = threading.Event()
        """Once set, large files stop half-way, until it is cleared."""
        self.half_sent = threading.Event()
        self.spoiled: str | None = None
        """A file that arrives with a flipped bit."""
        self.gated = False

    def put(self, name: str, folder: Path, revision: str = "main") -> str:
        """Publish; returns the commit."""
        self.repositories.setdefault(name, {})[revision] = folder
        commit = commit_of(folder)
        self.repositories[name][commit] = folder
        return commit

    @property
    def downloads(self) -> list[str]:
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


def commit_of(folder: Path) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """The hub under its address, until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.served.requests.append(f"{self.command} {path}")
        info, file = _INFO.fullmatch(path), _FILE.fullmatch(path)
        if info is not None:
            self._info(info["name"], unquote(info["revision"] or "main"))
        elif file is not None:
            self._file(file["name"], file["commit"], unquote(file["file"]))
        else:
            self._refuse(404, "EntryNotFound")

    def _info(self, name: str, revision: str) -> None:
        repository = self.served.repositories.get(name)
        if self.served.gated:
            self._refuse(403, "GatedRepo")
        elif repository is None:
            self._refuse(404, "RepoNotFound")
        elif revision not in repository:
            self._refuse(404, "RevisionNotFound")
        else:
            folder = repository[revision]
            siblings = [_sibling(path) for path in sorted(folder.iterdir())]
            self._send({}, json.dumps({"id": name, "sha": commit_of(folder), "siblings": siblings}).encode())

    def _file(self, name: str, commit: str, file: str) -> None:
        path = self.served.repositories[name][commit] / file
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content, described = path.read_bytes(), _sibling(path)
        large = described.get("lfs")
        etag = large["sha256"] if isinstance(large, dict) else described["blobId"]
        if self.served.spoiled == file:
            content = bytes([content[0] ^ 1]) + content[1:]
        self._send({"ETag": f'"{etag}"', "X-Repo-Commit": commit}, content, cut=isinstance(large, dict))

    def _send(self, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        start = int(self.headers["Range"].removeprefix("bytes=").partition("-")[0]) if "Range" in self.headers else 0
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        after = self.served.cut_after
        if cut and after is not None:
            self.served.cut_after = None
            self.wfile.write(content[start : start + after])
            self.close_connection = True
            return
        if cut and self.served.stalling.is_set():
            self.wfile.write(content[start : len(content) // 2])
            self.wfile.flush()
            self.served.half_sent.set()
            self.close_connection = True
            while self.served.stalling.is_set():
                time.sleep(0.02)
            return
        self.wfile.write(content[start:])

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _sibling(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    described: dict[str, object] = {"rfilename": path.name, "size": len(content), "blobId": blob}
    if path.suffix in _LARGE:
        described["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 1}
    return described
