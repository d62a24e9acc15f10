"""A W&B server on this machine for tests, and a reader of the files that W&B writes.

The server answers the requests of W&B's client 0.31, and keeps the data that the client sends.
"""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a run file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def history(path: Path) -> list[dict[str, Any]]:
    """Return the logged rows; each maps the names of metrics to values."""
    rows = [record.history.item for record in records(path) if record.HasField("history")]
    return [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items} for items in rows
    ]


class Server(ThreadingHTTPServer):
    """Keeps the rows and the artifacts of one run."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.rows: dict[int, dict[str, Any]] = {}
        self.artifacts: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.path.startswith("/graphql"):
            answer = {"data": self._answer(sent)}
        else:
            answer = {"exitcode": None, "limits": {}}
            chunk = (sent.get("files") or {}).get("wandb-history.jsonl")
            for at, line in enumerate(chunk["content"] if chunk else ()):
                self.server.rows[chunk["offset"] + at] = json.loads(line)
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, sent: dict[str, Any]) -> dict[str, Any]:
        query, variables = sent["query"], sent.get("variables") or {}
        if "upsertBucket" in query:
            project = {"name": "project", "entity": {"name": "someone"}}
            bucket = {"id": "b", "name": variables.get("name"), "displayName": "run"}
            bucket |= {"historyLineCount": 0, "project": project, "sweepName": None, "config": "{}"}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [
                {"name": name, "uploadUrl": f"{self.server.url}/{name}"}
                for name in variables["files"]
            ]
            made = {"runID": "r", "uploadHeaders": [], "files": files}
            return {"createRunFiles": made}
        if "createArtifact(" in query:
            # COMMITTED: the server has the contents already, so the client uploads nothing.
            made = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s"}}
            self.server.artifacts.append(variables["input"])
            return {"createArtifact": {"artifact": made}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "someone", "flags": "{}", "teams": {}}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": []}}
        return {"model": None, "project": None, "__type": None}


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server until the block ends, or until the block calls `shutdown`."""
    server = Server()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
