"""A stand-in for the Hugging Face Hub on this machine: enough of it to download and upload."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_stand_in"


class _Hub(BaseHTTPRequestHandler):
    """Serves the folders of `server.repositories`; None stands for a gated one."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        uploads = self.server.uploads  # type: ignore[attr-defined]
        self._send(*uploads.post(path, body, self.headers.get("Authorization", "")))

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.uploads.objects[hashlib.sha256(content).hexdigest()] = content  # type: ignore[attr-defined]
        self._send(200, {}, b"")

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        status, headers, body = self._route(unquote(urlsplit(self.path).path).strip("/"))
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        self._send(status, headers, body, with_body)

    def _send(
        self, status: int, headers: dict[str, str], body: bytes, with_body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _route(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = path.removeprefix("api/models/").split("/")
        name = "/".join(parts[:2])
        repositories = self.server.repositories  # type: ignore[attr-defined]
        if name not in repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"Repository not found"
        folder, rest = repositories[name], parts[2:]
        if rest and rest[-1] == "no-such-revision":
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"Invalid rev id"
        files = sorted(folder.iterdir()) if folder else []
        if rest[:1] == ["revision"] or not rest:
            listing = [{"rfilename": f.name} for f in files] or [{"rfilename": "config.json"}]
            return self._json({"id": name, "sha": COMMIT, "siblings": listing})
        if rest[:1] == ["tree"]:
            entries = [self._entry(file) for file in files]
            gated = {"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}
            return self._json(entries or [gated])
        if folder is None:
            return 403, {"X-Error-Code": "GatedRepo"}, b"Access to this model is restricted"
        content = (folder / rest[-1]).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        return 200, headers, content

    @staticmethod
    def _json(values: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(values).encode()

    @staticmethod
    def _entry(file: Path) -> dict[str, object]:
        content = file.read_bytes()
        return {
            "type": "file",
            "path": file.name,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }


class Uploads:
    """What was uploaded: files by repository, large ones as objects of their own (git LFS)."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}

    def post(self, path: str, body: bytes, token: str) -> tuple[int, dict[str, str], bytes]:
        """The answer to a request of the Hub's API for uploads."""
        if token != f"Bearer {TOKEN}":
            return 401, {}, b"Invalid token"
        if path == "api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        values = [json.loads(line) for line in body.splitlines()]
        if path == "api/repos/create":
            name = f"{values[0].get('organization') or 'me'}/{values[0]['name']}"
            if name.startswith("others/"):
                return 403, {}, b"You have no rights to create a model under others"
            self.files.setdefault(name, {})
            return self._json({"url": f"{self.endpoint}/{name}"})
        if "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in values[0]["files"]
            ]
            return self._json({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            place = {"upload": {"href": f"{self.endpoint}/objects"}}
            objects = [{**wanted, "actions": place} for wanted in values[0]["objects"]]
            return self._json({"transfer": "basic", "objects": objects})
        return self._commit("/".join(path.split("/")[2:4]), values)

    def _commit(self, name: str, lines: list[dict]) -> tuple[int, dict[str, str], bytes]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[name][value["path"]] = self.objects[value["oid"]]
        url = f"{self.endpoint}/{name}/commit/{COMMIT}"
        return self._json({"commitUrl": url, "commitOid": COMMIT, "success": True})

    @staticmethod
    def _json(values: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(values).encode()


@contextmanager
def upload_hub() -> Iterator[Uploads]:
    """A Hub without repositories, to upload to."""
    uploads = Uploads()
    with hub({}, uploads) as (endpoint, _):
        uploads.endpoint = endpoint
        yield uploads


@contextmanager
def hub(
    repositories: dict[str, Path | None], uploads: Uploads | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repositories; yields the endpoint and the requests that were made."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.repositories, server.requests = repositories, []  # type: ignore[attr-defined]
    server.uploads = uploads or Uploads()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.requests  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
