"""What the tests of this folder know of the servers, and a line to one that can be cut."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

STACK = Path(__file__).with_name("stack.py")
USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
SECRET = "correct horse battery staple"
"""Password of the users that tests make."""


def act_as(monkeypatch: pytest.MonkeyPatch, user: str, password: str) -> None:
    monkeypatch.setenv(USER, user)
    monkeypatch.setenv(PASSWORD, password)


@dataclass(frozen=True)
class Server:
    """The running MLflow server.

    Attributes:
        uri: Its address.
        username: The administrator.
        password: The administrator's.
        s3: Environment variables for the store's S3 interface.
        bucket: Where the artifacts are.
        folder: Holds the servers' logs.
        arguments: Those of the command `mlflow` that starts such a server, without address and port.
        environment: The variables that such a server reads.
    """

    uri: str
    username: str
    password: str
    s3: dict[str, str]
    bucket: str
    folder: str
    arguments: list[str]
    environment: dict[str, str]

    @property
    def credentials(self) -> dict[str, str]:
        return {USER: self.username, PASSWORD: self.password}

    def s3_client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.s3["MLFLOW_S3_ENDPOINT_URL"],
            region_name=self.s3["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.s3["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.s3["AWS_SECRET_ACCESS_KEY"],
        )


@contextlib.contextmanager
def serving(*options: str) -> Iterator[Server]:
    """Start stack.py with options, for the length of a block; skip where the machine lacks a part."""
    process = subprocess.Popen(
        [sys.executable, str(STACK), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # it outlives a kill of the tests' process group long enough to clean up
    )
    assert process.stdin and process.stdout and process.stderr
    try:
        line = process.stdout.readline()
        if not line:
            pytest.fail(f"{STACK.name}: {process.stderr.read()[-4000:]}")
        answer = json.loads(line)
        if "missing" in answer:
            pytest.skip(f"MLflow on PostgreSQL and S3: this machine lacks {answer['missing']}")
        yield Server(**answer)
    finally:
        process.stdin.close()
        process.wait(timeout=60)


class Line:
    """A TCP line to a server on loopback that can be cut and mended, while the server itself goes on for others."""

    def __init__(self, uri: str) -> None:
        self.target = int(uri.rpartition(":")[2])
        self.port = 0
        self._ends: list[socket.socket] = []
        self.mend()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), reuse_port=False)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """As if the server's machine had gone: open connections end, new ones are refused."""
        # Closing alone would not wake the thread that waits in accept.
        for each in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._ends.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self._ends += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def processes_of(mark: str) -> list[int]:
    """The processes with a `NAME=value` in the environment they were started with."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if os.fsencode(mark) in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found
