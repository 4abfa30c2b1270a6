"""A model hub on loopback: folders to fetch, gated models, and none of another name; on real sockets."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

COMMIT = "0" * 40


class Hub:
    """Serves `models` by id; those that are None are gated, and open to nobody."""

    def __init__(self, models: Mapping[str, Path | None]) -> None:
        self.models = models
        self.tokens: list[str | None] = []

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub._answer(self)

            do_GET = do_HEAD

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.tokens.append(request.headers.get("Authorization"))
        path = request.path.split("?")[0]
        asked = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/resolve/[^/]+/(.*)|/.*)?", path)
        model = asked.group(1) if asked else ""
        if model not in self.models:
            self._refuse(request, 401 if self.tokens[-1] is None else 404, "RepoNotFound", "Repository not found")
            return
        folder = self.models[model]
        if folder is None:
            status = 401 if self.tokens[-1] is None else 403
            self._refuse(request, status, "GatedRepo", f"Access to model {model} is restricted.")
            return
        if "/tree/" in path:
            # The one folder that is asked for holds further chat templates.
            self._refuse(request, 404, "EntryNotFound", "Entry not found")
            return
        if "/resolve/" not in path:
            files = [{"rfilename": f.name} for f in sorted(folder.iterdir())]
            self._send(request, json.dumps({"id": model, "sha": COMMIT, "siblings": files}).encode())
            return
        assert asked is not None
        file = folder / asked.group(2)
        if file.is_file():
            self._send(request, file.read_bytes())
        else:
            self._refuse(request, 404, "EntryNotFound", "Entry not found")

    def _send(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        request.send_response(200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", message)
        request.send_header("Content-Length", "0")
        request.end_headers()
