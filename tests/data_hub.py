"""A small Hugging Face hub on loopback: data set repositories that are folders, on real sockets."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


def _commit(parts: list[str]) -> str:
    """The commit that a path such as revision/COMMIT is of; of a branch `SHA` is the newest."""
    return parts[1] if len(parts) > 1 and re.fullmatch("[0-9a-f]{40}", parts[1]) else SHA


class FolderHub:
    """Serves `root/OWNER/NAME/...` as data sets, the same at every commit; `asked` has all paths asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []

    def __enter__(self) -> FolderHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, head=False)

            def do_HEAD(self) -> None:
                hub.answer(self, head=True)

            def do_POST(self) -> None:
                hub.answer(self, head=False)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, head: bool) -> None:
        body = request.rfile.read(int(request.headers.get("content-length") or 0))
        path = unquote(urlsplit(request.path).path).strip("/")
        self.asked.append(path)
        kind, *parts = path.removeprefix("api/").split("/")
        repository = self.root.joinpath(*parts[:2])
        if kind != "datasets" or len(parts) < 2 or not repository.is_dir():
            return self._send(request, 404, b"{}", head, {"X-Error-Code": "RepoNotFound"})
        rest = parts[2:]
        if not path.startswith("api/"):
            file = repository.joinpath(*rest[2:])
            if rest[0] != "resolve" or not file.is_file():
                return self._send(request, 404, b"{}", head, {"X-Error-Code": "EntryNotFound"})
            data = file.read_bytes()
            named = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": _commit(rest)}
            return self._send(request, 200, data, head, named)
        files = sorted(p for p in repository.rglob("*") if p.is_file())
        listed = [
            {
                "type": "file",
                "path": str(p.relative_to(repository)),
                "size": p.stat().st_size,
                "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
            }
            for p in files
        ]
        if rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            found = [one for one in listed if str(one["path"]).startswith(below)]
            return self._send(request, 200, json.dumps(found).encode(), head)
        if rest[:1] == ["paths-info"]:
            wanted = json.loads(body)["paths"]
            found = [one for one in listed if one["path"] in wanted]
            return self._send(request, 200, json.dumps(found).encode(), head)
        info = {
            "id": "/".join(parts[:2]),
            "sha": _commit(rest),
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": one["path"]} for one in listed],
        }
        return self._send(request, 200, json.dumps(info).encode(), head)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler, status: int, data: bytes, head: bool, more: dict[str, str] | None = None
    ) -> None:
        request.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(more or {}),
        }.items():
            request.send_header(name, value)
        request.end_headers()
        if not head:
            request.wfile.write(data)
