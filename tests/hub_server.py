"""A hub on this machine for tests: the part of its HTTP API that uploads and data sets call.

It keeps what the hub's client sends, refuses what the hub refuses, and can be told to fail.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any
from urllib.parse import unquote

import yaml

TOKEN, USER = "hf_for_tests", "ada"
COMMIT = "c" * 40
LARGE_FILES = (".safetensors", ".gguf", ".png")
PART_BYTES = 2**20
_ID = r"(?P<id>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """A repository: who can see it, its files, and the messages of its commits."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """Keeps repositories and uploaded objects.

    `failing` maps the beginning of "METHOD /path" to a status, or to None for a lost connection.
    With `store`, large files go into this folder by the client's own protocol for its store, and
    the repository has their hashes in place of their content.
    """

    daemon_threads = True

    def __init__(self, store: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.store = store
        self.repositories: dict[str, Repository] = {}
        self.datasets: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.failing: dict[str, int | None] = {}
        self.requests: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    do_POST = do_PUT = do_HEAD = do_GET

    def _route(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self._chunks() if "Transfer-Encoding" in self.headers else self.rfile.read(size)
        path = self.path.partition("?")[0]
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        for beginning, status in self.server.failing.items():
            if request.startswith(beginning):
                return self._fail(status)
        # Addresses of objects are signed, as those of a store are.
        signed = path.startswith("/objects/")
        if not signed and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return answer(self, **match.groupdict())
        return self._answer(404, {"error": f"no route for {request}"})

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _fail(self, status: int | None) -> None:
        if status is None:
            self.close_connection = True
            self.connection.close()
        else:
            self._answer(status, {"error": f"the test asked for {status}"})

    def _answer(self, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def describe_dataset(self, id: str, revision: str = "main") -> None:
        """Tell the files of a data set, of its branch main or of its only commit."""
        if code := self._missing(id, revision):
            return self._answer(404, {"error": code}, {"X-Error-Code": code})
        repository = self.server.datasets[id]
        files = [{"rfilename": name} for name in repository.files]
        known = {"id": id, "private": repository.private, "siblings": files, "sha": COMMIT}
        return self._answer(200, known | {"tags": [], "downloads": 0, "likes": 0})

    def _missing(self, id: str, revision: str, path: str | None = None) -> str:
        """Return the hub's word for what does not exist of a data set, or an empty text."""
        if id not in self.server.datasets:
            return "RepoNotFound"
        if revision not in ("main", COMMIT):
            return "RevisionNotFound"
        exists = path is None or path in self.server.datasets[id].files
        return "" if exists else "EntryNotFound"

    def list_tree(self, id: str, revision: str, path: str = "") -> None:
        """Tell the files and folders in a folder, and with recursive=true also those further in."""
        files = self.server.datasets[id].files
        inside = {name: text for name, text in files.items() if name.startswith(path)}
        deep = "recursive=true" in self.path.lower()
        parents = {str(parent) for name in inside for parent in PurePosixPath(name).parents}
        below = {one for one in parents - {"."} if one.startswith(path) and one != path.strip("/")}
        entries = [_file_entry(*one) for one in inside.items()] + [*map(_folder_entry, below)]
        depth = path.strip("/").count("/") + 1 if path.strip("/") else 0
        self._answer(200, [one for one in entries if deep or one["path"].count("/") == depth])

    def send_file(self, id: str, revision: str, path: str) -> None:
        """Send a file of a data set, or a part of it."""
        if code := self._missing(id, revision, unquote(path)):
            return self._answer(404, {"error": code}, {"X-Error-Code": code})
        content = self.server.datasets[id].files[unquote(path)]
        start, end = 0, len(content) - 1
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(end, int(asked[2] or end))
        self.send_response(206 if asked else 200)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers |= {"Content-Range": f"bytes {start}-{end}/{len(content)}"} if asked else {}
        for name, value in (headers | {"Content-Length": str(end + 1 - start)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start : end + 1])
        return None

    def who(self) -> None:
        self._answer(200, {"type": "user", "name": USER, "orgs": []})

    def describe(self, id: str) -> None:
        repository = self.server.repositories.get(id)
        if repository is None:
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return self._answer(404, {"error": "Repository not found"}, headers)
        files = [{"rfilename": name} for name in repository.files]
        known = {"id": id, "modelId": id, "private": repository.private, "siblings": files}
        return self._answer(200, known | {"tags": [], "downloads": 0, "likes": 0})

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or USER
        if owner != USER:
            return self._answer(403, {"error": f"You don't have the rights to create in {owner}"})
        id = f"{owner}/{asked['name']}"
        url = f"{self.server.url}/{id}"
        if id in self.server.repositories:
            return self._answer(409, {"error": "You already created this model repo", "url": url})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[id] = Repository(private=bool(private))
        return self._answer(200, {"url": url, "name": id, "id": id})

    def validate(self) -> None:
        """Refuse front matter that is no mapping, or that names a base that is no repository."""
        text = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        wrong = [] if isinstance(data, dict) else [{"message": "the front matter is no mapping"}]
        base = data.get("base_model", "a/b") if isinstance(data, dict) else "a/b"
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)):
            wrong.append({"message": '"base_model" is not a model id'})
        self._answer(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def preupload(self, id: str) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE_FILES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._answer(200, {"files": modes})

    def store_token(self, id: str) -> None:
        known = {"Cas-Url": f"local://{self.server.store}", "Access-Token": "t"}
        known["Token-Expiration"] = str(int(time.time()) + 3600)
        body = {"casUrl": known["Cas-Url"], "accessToken": "t", "exp": int(time.time()) + 3600}
        self._answer(200, body, {f"X-Xet-{name}": value for name, value in known.items()})

    def batch(self, id: str) -> None:
        """Say where each object is to be sent: in one piece, or in several parts if it is large."""
        self._answer(
            200, {"objects": [self._place_of(asked) for asked in json.loads(self.body)["objects"]]}
        )

    def _place_of(self, asked: dict[str, Any]) -> dict[str, Any]:
        oid, size = asked["oid"], asked["size"]
        if oid in self.server.objects:
            return {"oid": oid, "size": size}
        url = f"{self.server.url}/objects/{oid}"
        if size <= PART_BYTES:
            return {"oid": oid, "size": size, "actions": {"upload": {"href": url}}}
        count = -(-size // PART_BYTES)
        parts = {f"{number:05d}": f"{url}/{number}" for number in range(1, count + 1)}
        header = {"chunk_size": str(PART_BYTES), **parts}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": url, "header": header}}}

    def keep(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._answer(400, {"error": "the content has another hash"})
        self.server.objects[oid] = self.body
        return self._answer(200, {})

    def keep_part(self, oid: str, number: str) -> None:
        self.server.parts[oid, int(number)] = self.body
        self._answer(200, {}, {"ETag": f'"{number}"'})

    def join(self, oid: str) -> None:
        """Make an object of its parts."""
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.body = b"".join(self.server.parts[oid, number] for number in numbers)
        self.keep(oid)

    def commit(self, id: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        repository = self.server.repositories[id]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                stored = b"" if self.server.store is None else value["oid"].encode()
                repository.files[value["path"]] = stored or self.server.objects[value["oid"]]
        oid = f"{len(repository.commits):040x}"
        url = f"{self.server.url}/{id}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})


def _file_entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": _oid(path.encode())}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


_DATASET = f"/api/datasets/{_ID}"
_ROUTES = [
    ("GET", _DATASET, _Handler.describe_dataset),
    ("GET", rf"{_DATASET}/revision/(?P<revision>\w+)", _Handler.describe_dataset),
    ("GET", rf"{_DATASET}/tree/(?P<revision>\w+)/?(?P<path>.*)", _Handler.list_tree),
    (
        "GET HEAD",
        rf"/datasets/{_ID}/resolve/(?P<revision>\w+)/(?P<path>.+)",
        _Handler.send_file,
    ),
    ("GET", "/api/whoami-v2", _Handler.who),
    ("GET", f"/api/models/{_ID}", _Handler.describe),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_ID}/preupload/main", _Handler.preupload),
    ("GET", f"/api/models/{_ID}/xet-write-token/main", _Handler.store_token),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/objects/(?P<oid>\w+)", _Handler.keep),
    ("PUT", r"/objects/(?P<oid>\w+)/(?P<number>\d+)", _Handler.keep_part),
    ("POST", r"/objects/(?P<oid>\w+)", _Handler.join),
    ("POST", f"/api/models/{_ID}/commit/main", _Handler.commit),
]


@contextmanager
def serving_hub(store: Path | None = None) -> Iterator[Hub]:
    """Run a hub until the block ends."""
    with Hub(store) as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
