"""A Hugging Face Hub on 127.0.0.1, and its cache on disk: as much of both as the library asks for.

Each repository is a dictionary of file names and contents; a repository may instead be a refusal,
which is answered as the Hub answers it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {"gated": (403, "GatedRepo"), "broken": (500, "")}

Files = dict[str, Any]
"""Contents by name: bytes, or what has a length and gives bytes for a slice."""


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
    created: dict[str, bool] = field(default_factory=dict)
    """Repositories that were created, and whether privately."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """What was sent to the store of large files, by its SHA-256."""
    breaks_at: str | None = None
    """A file of whose content the store wants to hear nothing, by the file's SHA-256."""
    tokens: set[str] = field(default_factory=set)
    """What the Authorization headers of writing requests held."""
    failing: float = 0.0
    """The share of requests that are answered 503."""
    dropping: float = 0.0
    """The share of connections that break off, before the answer or in the middle of its body."""
    chance: Random = field(default_factory=lambda: Random(1))
    store: str | None = None
    """Where files are redirected to, as large ones of the Hub are: another host's address."""
    signature: str = "first"
    """What the store's addresses must be signed with; others are refused as expired."""
    at_store: list[str] = field(default_factory=list)
    """The Authorization headers that came to the store."""
    rate: float | None = None
    """Bytes per second of all answers together."""
    sent: int = 0
    _busy_until: float = 0.0
    _lock: Lock = field(default_factory=Lock)

    def pace(self, nbytes: int) -> None:
        """Count bytes, and wait for as long as a line of `rate` needs for them."""
        with self._lock:
            self.sent += nbytes
            if self.rate is None:
                return
            now = time.monotonic()
            self._busy_until = max(self._busy_until, now) + nbytes / self.rate
            pause = self._busy_until - now
        time.sleep(pause)

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
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _is_lost(self) -> bool:
        """Whether this request meets one of the faults; then it has been answered, or not."""
        with self.hub._lock:
            drawn = self.hub.chance.random()
        if drawn < self.hub.failing:
            self.hub.asked.append("503")
            self._send(503, {}, b"", True)
            return True
        if drawn < self.hub.failing + self.hub.dropping / 2:
            self.hub.asked.append("DROP")
            self.close_connection = True
            return True
        return False

    def _breaks_off(self) -> bool:
        with self.hub._lock:
            return self.hub.chance.random() < self.hub.dropping / 2

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        content = self._body()
        self.hub.asked.append(f"POST {path}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        parts = path.strip("/").split("/")
        if "Bearer" not in self.headers.get("Authorization", ""):
            self._send(401, {}, b"", True)
        elif parts == ["api", "repos", "create"]:
            asked = json.loads(content)
            repo = f"{asked['organization']}/{asked['name']}"
            self.hub.created[repo] = asked.get("visibility") == "private"
            self.hub.repos[repo] = {}
            self._json({"url": f"{self.hub.url}/{repo}"})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json({"objects": [self._place(each) for each in json.loads(content)["objects"]]})
        elif "preupload" in parts:
            files = [
                {"path": each["path"], "uploadMode": "lfs" if each["size"] > 5000 else "regular",
                 "shouldIgnore": False, "oid": None}
                for each in json.loads(content)["files"]
            ]  # fmt: skip
            self._json({"files": files})
        elif "commit" in parts:
            self._commit("/".join(parts[2:4]), content)
        elif parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        else:
            self._send(404, {}, b"", True)

    def do_PUT(self) -> None:
        name, content = self.path.rsplit("/", 1)[1], self._body()
        if name == self.hub.breaks_at:
            self._send(400, {}, b"", True)
            return
        assert hashlib.sha256(content).hexdigest() == name
        self.hub.asked.append(f"PUT {name}")
        self.hub.stored[name] = content
        self._send(200, {}, b"", True)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, found: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(found).encode(), True)

    def _place(self, wanted: dict[str, object]) -> dict[str, object]:
        """Where a large file is to be sent; nothing where it is in the store."""
        if wanted["oid"] in self.hub.stored:
            return wanted
        upload = {"href": f"{self.hub.url}/store/{wanted['oid']}"}
        return wanted | {"actions": {"upload": upload}}

    def _commit(self, repo: str, content: bytes) -> None:
        files = self.hub.repos[repo]
        assert isinstance(files, dict)
        for line in map(json.loads, content.splitlines()):
            each = line["value"]
            if line["key"] == "file":
                files[each["path"]] = base64.b64decode(each["content"])
            elif line["key"] == "lfsFile":
                files[each["path"]] = self.hub.stored[each["oid"]]
        found = {"commitUrl": f"{self.hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}
        self._json(found | {"hookOutput": "", "success": True})

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if self._is_lost():
            return
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:], body)
        elif parts[0] == "store":
            self._from_store(parts, body)
        elif "resolve" in parts:
            place = parts.index("resolve")
            repo, name = "/".join(parts[:place]), "/".join(parts[place + 2 :])
            if self.hub.store is not None and body and name in self.hub.repos.get(repo, {}):
                signed = f"{self.hub.store}/store/{repo}/{name}?Signature={self.hub.signature}"
                self._send(302, {"Location": signed}, b"", body)
                return
            self._file(repo, name, body)
        else:
            self._send(404, {}, b"", body)

    def _from_store(self, parts: list[str], body: bool) -> None:
        self.hub.at_store.append(self.headers.get("Authorization", ""))
        if urlsplit(self.path).query != f"Signature={self.hub.signature}":
            self._send(403, {}, b"<Error>Request has expired</Error>", body)
            return
        self._file("/".join(parts[1:3]), "/".join(parts[3:]), body)

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
            siblings: list[dict[str, Any]] = [{"rfilename": name} for name in files]
            if "blobs=" in urlsplit(self.path).query:
                siblings = [_listed(name, content) for name, content in files.items()]
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
        if body and status in (200, 206) and self._breaks_off():
            self.hub.asked.append("BREAK")
            content, self.close_connection = content[: len(content) // 2], True
        with suppress(ConnectionError):
            for start in range(0, len(content) if body else 0, _CHUNK):
                part = content[start : start + _CHUNK]
                self.hub.pace(len(part))
                self.wfile.write(part)


def _listed(name: str, content: Any) -> dict[str, Any]:
    """A file with its size and tags, as the Hub lists them."""
    found = {"rfilename": name, "size": len(content), "blobId": _etag(content)}
    if isinstance(content, bytes):
        found["blobId"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        if name.endswith((".safetensors", ".gguf", ".bin")):
            sha256 = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
    return found


_CHUNK = 1 << 18


def _etag(content: Any) -> str:
    return hashlib.sha1(content).hexdigest() if isinstance(content, bytes) else content.etag


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


def point_at(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub ask this stand-in."""
    place = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
