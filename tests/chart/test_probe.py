"""The check of `helm test` against a server that is slow to start, gone for a moment, or broken."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from helm import CHART

API = "/api/2.0/mlflow"


class Paths(ThreadingHTTPServer):
    """The paths of MLflow that the check uses, with their state in memory.

    `ill` holds for each path the answers before the first good one: a status, or 0 for a connection that is closed
    without one.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ill: dict[str, list[int]] = {}
        self.asked: list[str] = []
        self.tags: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.exists = False


class Handler(BaseHTTPRequestHandler):
    server: Paths

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if self.server.ill.get(path):
            status = self.server.ill[path].pop(0)
            if not status:
                self.close_connection = True
                return
            self.reply(status, b"ill")
        elif path in ("/health", "/version"):
            self.reply(200, b"3.17.2")
        elif path == f"{API}/experiments/get-by-name":
            self.experiment() if self.server.exists else self.reply(404, b"{}")
        elif path == f"{API}/experiments/create":
            self.server.exists = True
            self.reply(200, b'{"experiment_id": "7"}')
        elif path == f"{API}/experiments/set-experiment-tag":
            fields = json.loads(body)
            self.server.tags[fields["key"]] = fields["value"]
            self.reply(200, b"{}")
        elif path == f"{API}/experiments/get":
            self.experiment()
        elif self.command == "PUT":
            self.server.files[path] = body
            self.reply(200, b"{}")
        elif self.command == "DELETE":
            del self.server.files[path]
            self.reply(200, b"{}")
        else:
            self.reply(200, self.server.files[path])

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def experiment(self) -> None:
        tags = [{"key": key, "value": value} for key, value in self.server.tags.items()]
        self.reply(200, json.dumps({"experiment": {"experiment_id": "7", "tags": tags}}).encode())

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Paths]:
    with Paths() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def probe(server: Paths, wait: float = 30) -> tuple[int, str]:
    """Exit code and what the check printed."""
    done = subprocess.run(
        [sys.executable, CHART / "files" / "mlflow" / "probe.py"],
        env={
            "PATH": os.environ["PATH"],
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{server.server_port}",
            "DQO_PROBE_WAIT_SECONDS": str(wait),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_server_that_is_well_is_asked_once_for_everything(server: Paths):
    code, output = probe(server)
    assert code == 0 and "trying again" not in output, output
    assert len(server.asked) == len(set(server.asked)) == 9
    assert server.exists and not server.files


def test_a_connection_that_breaks_is_made_again(server: Paths):
    """Before and after /health has answered; the database may come a moment later than the server."""
    server.ill = {"/health": [0, 503], "/version": [0], f"{API}/experiments/get-by-name": [0, 503]}
    code, output = probe(server)
    assert code == 0 and output.count("trying again") == 5, output
    assert server.asked.count(f"POST {API}/experiments/create") == 1


def test_an_error_that_the_server_answers_is_told_at_once(server: Paths):
    server.ill = {f"{API}/experiments/get-by-name": [500] * 9}
    code, output = probe(server)
    assert code == 1 and "get-by-name" in output and "500" in output and "ill" in output, output
    assert server.asked.count(f"GET {API}/experiments/get-by-name") == 1


def test_waiting_ends(server: Paths):
    server.ill = {"/version": [0] * 99}
    code, output = probe(server, wait=1)
    assert code == 1 and "trying again" in output and output.splitlines()[-1].startswith("probe: http://"), output
    assert server.asked[-1] == "GET /version"
