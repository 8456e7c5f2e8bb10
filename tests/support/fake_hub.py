"""A Hugging Face Hub on 127.0.0.1, and its cache on disk: as much of both as the library asks for.

Each repository is a dictionary of file names and contents; a repository may instead be a refusal,
which is answered as the Hub answers it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {"gated": (403, "GatedRepo"), "broken": (500, "")}

Files = dict[str, bytes]


@dataclass
class Hub:
    """The repositories, and the paths that were asked for."""

    repos: dict[str, Files | str]
    url: str = ""
    asked: list[str] = field(default_factory=list)
    sends_parts: bool = True
    stalls: str | None = None
    """A file of which half is sent, and then nothing until `released` is set."""
    released: Event = field(default_factory=Event)

    def downloaded(self) -> set[str]:
        """Names of the files whose content was sent."""
        return {line.rsplit("/", 1)[1] for line in self.asked if line.startswith("GET /files")}


def put_in_cache(cache: Path, repo: str, files: Files, *, revision: str = "main") -> Path:
    """A snapshot in the library's layout; returns its folder."""
    home = cache / ("models--" + repo.replace("/", "--"))
    snapshot = home / "snapshots" / COMMIT
    for name, content in files.items():
        blob = home / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / revision).write_text(COMMIT)
    return snapshot


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:], body)
        elif "resolve" in parts:
            place = parts.index("resolve")
            self._file("/".join(parts[:place]), "/".join(parts[place + 2 :]), body)
        else:
            self._send(404, {}, b"", body)

    def _files(self, repo: str, body: bool) -> Files | None:
        found = self.hub.repos.get(repo)
        if isinstance(found, dict):
            return found
        status, code = REFUSALS[found] if found is not None else (404, "RepoNotFound")
        self._send(status, {"X-Error-Code": code} if code else {}, b"", body)
        return None

    def _api(self, repo: str, rest: list[str], body: bool) -> None:
        files = self._files(repo, body)
        if files is None:
            return
        if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"", body)
        elif rest[:1] == ["tree"]:
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in files.items()
            ]
            self._send(200, {}, json.dumps(listing).encode(), body)
        else:
            siblings = [{"rfilename": name} for name in files]
            facts = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self._send(200, {}, json.dumps(facts).encode(), body)

    def _file(self, repo: str, name: str, body: bool) -> None:
        files = self._files(repo, body)
        if files is None:
            return
        if name not in files:
            self._send(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
            return
        content = files[name]
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT}
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part and self.hub.sends_parts:
            start, stop = int(part[1]), min(int(part[2]) + 1, len(content))
            self.hub.asked.append(f"PART /files/{name} {stop - start}")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self._send(206, headers, content[start:stop], body)
            return
        if body:
            self.hub.asked.append(f"GET /files/{name}")
        self._send(200, headers, content, body)

    def _send(self, status: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.hub.stalls is not None and self.path.endswith(self.hub.stalls):
            half = len(content) // 2
            self.wfile.write(content[:half])
            self.hub.asked.append(f"STALLS {self.hub.stalls}")
            self.hub.released.wait(60)
            content = content[half:]
        if body:
            with suppress(ConnectionError):
                self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serve(repos: dict[str, Files | str]) -> Iterator[Hub]:
    """A running Hub with these repositories."""
    hub = Hub(repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
