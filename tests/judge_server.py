"""A chat-completions server on loopback that does what a test tells it, and counts what it was asked."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dqo.recipe import Judge

BLOCK = re.compile(r"<(question|response|response-a|response-b)-([0-9a-f]{16})>\n(.*?)\n</\1-\2>", re.DOTALL)


@dataclass
class Reply:
    """What the server does with one request."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: bool = False


def completion(text: str | None, **reply: Any) -> Reply:
    message = {"role": "assistant", "content": text}
    document = {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    return Reply(body=json.dumps(document).encode(), **reply)


def verdict(value: str, reasons: str = "because", **reply: Any) -> Reply:
    return completion(json.dumps({"reasons": reasons, "verdict": value}), **reply)


def fenced(body: dict[str, Any]) -> dict[str, str]:
    """What a naive reader finds between the tags of a prompt, by tag; the first of each counts."""
    found: dict[str, str] = {}
    for tag, _, text in BLOCK.findall(body["messages"][-1]["content"]):
        found.setdefault(tag, text)
    return found


@dataclass
class JudgeServer:
    """The server's side of a test.

    `script` answers request number i (from 0) with the given body; the rest is what it has seen.
    """

    script: Callable[[int, dict[str, Any]], Reply]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    port: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def count(self) -> int:
        return len(self.bodies)

    def settings(self, folder: Any, **fields: Any) -> Judge:
        values = {"endpoint": f"http://127.0.0.1:{self.port}/v1", "model": "judge", "cache": str(folder), "timeout": 5}
        return Judge(**(values | fields))


@contextmanager
def serving(script: Callable[[int, dict[str, Any]], Reply]) -> Iterator[JudgeServer]:
    state = JudgeServer(script)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = state.count
                state.bodies.append(body | {"path": self.path})
                state.headers.append(dict(self.headers))
                state.times.append(time.monotonic())
                state.in_flight += 1
                state.most_in_flight = max(state.most_in_flight, state.in_flight)
            try:
                reply = state.script(number, body)
                time.sleep(reply.delay)
            finally:
                with state.lock:
                    state.in_flight -= 1
            if reply.cut:  # a length that never comes, then the end of the connection
                self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices": [')
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in ({"Content-Type": "application/json"} | reply.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, *_: object) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:  # the other side has gone: what some tests are about
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
