"""A stand-in for the hub on loopback: the requests that huggingface_hub makes to download, and no others.

The real package talks to it; `repositories` maps OWNER/NAME to files by path. Names that begin with "gated/" or
"broken/" answer 403 and 500.
"""

import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


class FakeHub(BaseHTTPRequestHandler):
    """Answers as https://huggingface.co does, with `repositories` of its server."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        repository, revision = (found[1], found[3 if api else 2] or "main") if found else ("", "")
        files = self.server.repositories.get(repository)
        if repository.startswith("gated/"):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif repository.startswith("broken/"):
            self._send(418, b"{}")
        elif files is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in REVISIONS:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif api and api[2] != "tree":
            siblings = [{"rfilename": name} for name in files]
            self._send_json({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings})
        elif api:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                for name, content in files.items()
            ]
            self._send_json(entries)
        elif file[3] not in files:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            content = files[file[3]]
            self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(content)}"'})

    def _send_json(self, content) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args) -> None:
        """Nothing to standard error."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve(repositories: dict[str, dict[str, bytes]]):
    """The server, with `requests`, and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.repositories, server.requests = repositories, []
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
