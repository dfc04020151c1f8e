"""A Hub of our own on this machine: it answers what `huggingface_hub` asks to read a model and to publish one."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

from places import ROOT

COMMIT = "c0ffee" + "0" * 34
MODEL = "someone/tiny"


TOKEN = "hf_good"
READ_ONLY = "hf_reader"


class Hub(ThreadingHTTPServer):
    """A Hub: `models` holds the files of each repository by name; `requests` lists (method, path, range) of all that
    was asked; the first download of a file in `breaking` breaks off halfway. Who writes needs `TOKEN`."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: dict[str, dict[str, bytes]] = {}
        if folder is not None:
            self.models[MODEL] = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        self.uploads: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.breaking: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the first model."""
        return self.models[MODEL]

    def entry(self, model: str, name: str) -> dict:
        """What the Hub says of one file."""
        content = self.models[model][name]
        entry = {"rfilename": name, "path": name, "type": "file", "size": len(content)}
        entry["oid"] = entry["blobId"] = hashlib.sha1(content).hexdigest()
        if name.endswith((".safetensors", ".bin")):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 134}
        return entry

    def fetched(self) -> set[str]:
        """Files whose whole content was asked for."""
        whole = [path for method, path, part in self.requests if method == "GET" and "/resolve/" in path and not part]
        return {path.rsplit("/", 1)[1] for path in whole}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def reply(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers.setdefault("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str) -> None:
        self.reply({"error": "not found"}, 404, X_Error_Code=code, X_Error_Message="not found")

    def handle_any(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if path == "/api/repos/create" or "/preupload/" in path or "/commit/" in path or "/lfs/" in path:
            self.write(path, body)
            return
        if path.startswith("/upload/"):
            self.server.uploads[path.removeprefix("/upload/")] = body
            self.reply({})
            return
        if path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
            return
        # The longest, since the name of one model may begin another's.
        model = max((name for name in self.server.models if f"/{name}" in path), key=len, default=None)
        if model is None:
            self.missing("RepoNotFound")
        elif re.search("/(revision|resolve|tree|paths-info)/(?!main|c0ffee)", path):
            self.missing("RevisionNotFound")
        elif "/resolve/" in path:
            self.resolve(model, path.split("/resolve/", 1)[1].split("/", 1)[1])
        elif "/paths-info/" in path:
            wanted = set(re.findall(r"[\w./-]+\.\w+", body.decode()))
            self.reply([self.server.entry(model, name) for name in self.server.models[model] if name in wanted])
        elif "/tree/" in path:
            self.reply([self.server.entry(model, name) for name in self.server.models[model]])
        else:
            siblings = [self.server.entry(model, name) for name in self.server.models[model]]
            self.reply({"id": model, "sha": COMMIT, "siblings": siblings, "private": model in self.server.private})

    def write(self, path: str, body: bytes) -> None:
        """What only a token that may write gets: make a repository, upload, commit."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token != TOKEN:
            self.reply({"error": "no"}, 403 if token == READ_ONLY else 401)
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
            if name in self.server.models:
                self.reply({"error": "exists", "url": f"{self.server.endpoint}/{name}"}, 409)
                return
            self.server.models[name] = {".gitattributes": b""}
            self.server.private |= {name} if wanted.get("private") or wanted.get("visibility") == "private" else set()
            self.reply({"url": f"{self.server.endpoint}/{name}", "name": name})
        elif "/preupload/" in path:
            self.reply({"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
        elif "/lfs/" in path:
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/upload/{entry['oid']}"}}
            self.reply({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        else:
            self.commit(path.removeprefix("/api/models/").split("/commit/")[0], body)

    def commit(self, model: str, body: bytes) -> None:
        files = self.server.models[model]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server.uploads[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
        self.reply(
            {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.endpoint}/{model}/commit/{COMMIT}"}
        )

    def resolve(self, model: str, name: str) -> None:
        if name not in self.server.models[model]:
            self.missing("EntryNotFound")
            return
        content, entry = self.server.models[model][name], self.server.entry(model, name)
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None and self.command == "GET" and name in self.server.breaking:
            self.server.breaking.remove(name)
            self.send_response(200)
            for header, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif part is None:
            self.reply(content, **headers)
        if part is None:
            return
        first, last = int(part[1]), min(int(part[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.reply(content[first : last + 1], 206, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any


def environment(endpoint: str, cache: Path, *, offline: bool = False, token: str | None = None) -> dict[str, str]:
    """The environment of a process that takes this server for the Hub."""
    found = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("HF_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        found.pop(name, None)
    return found | ({"HF_TOKEN": token} if token else {})


def run(code: str, endpoint: str, cache: Path, *arguments: str, offline: bool = False) -> dict:
    """Run code against the server in a process of its own, since `huggingface_hub` reads its settings once."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env=environment(endpoint, cache, offline=offline),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])
