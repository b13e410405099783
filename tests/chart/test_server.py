"""MLflow starts from what the chart renders: its files, arguments and environment, on this machine instead of a pod."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helm import render

pytestmark = pytest.mark.slow
START_SECONDS = 240
NODE = "192.0.2.7"  # of the addresses that are for documentation


class Server:
    """The `minimal` scenario's pod: its folders below one folder, its port another one."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = "127.0.0.1"
        self.folder = folder
        rendered = render("minimal", "--set", f"mlflow.service.port={self.port}")
        self.pod = rendered.one("Deployment", "dqo-mlflow")["spec"]["template"]["spec"]
        self.probe = rendered.one("Pod", "dqo-test")["spec"]["containers"][0]
        for name, text in rendered.one("ConfigMap", "dqo-mlflow")["data"].items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "data").mkdir()
        (folder / "tmp").mkdir()

    def here(self, text: str) -> str:
        """A value of the pod for this machine: folders, port, and the variables that Kubernetes fills in."""
        text = text.replace("$(DQO_MLFLOW_SERVICE_HOST)", self.address).replace("$(POD_IP)", self.address)
        text = text.replace("$(HOST_IP)", NODE)
        text = text.replace("--port=5000", f"--port={self.port}")
        folders = {"/etc/dqo/mlflow": self.folder, "/data": self.folder / "data", "/tmp": self.folder / "tmp"}
        return re.sub(rf"(?<![\w.])({'|'.join(folders)})(?=/|$)", lambda match: str(folders[match[1]]), text)

    def start(self, container: dict[str, Any], **kwargs: Any) -> subprocess.Popen[str]:
        command = [self.here(word) for word in container["command"] + container.get("args", [])]
        program = [sys.executable] if command[0] == "python" else [sys.executable, "-m", command[0]]
        given = {entry["name"]: self.here(entry["value"]) for entry in container["env"] if "value" in entry}
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)} | given
        return subprocess.Popen([*program, *command[1:]], env=environment, cwd=self.folder / "tmp", text=True, **kwargs)

    def status(self, path: str, host: str) -> int:
        request = urllib.request.Request(f"http://{self.address}:{self.port}{path}", headers={"Host": host})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    migration = server.start(server.pod["initContainers"][0], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = migration.communicate(timeout=START_SECONDS)
    assert migration.returncode == 0, output
    assert (server.folder / "data" / "mlflow.db").is_file()
    with (server.folder / "server.log").open("w") as log:
        process = server.start(server.pod["containers"][0], stdout=log, stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < end:
            try:
                if server.status("/health", "x") == 200:
                    break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail((server.folder / "server.log").read_text()[-3000:])
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def test_the_check_of_helm_test_passes_and_leaves_one_experiment(server: Server):
    for _ in range(2):
        probe = server.start(server.probe, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = probe.communicate(timeout=120)
        assert probe.returncode == 0, output
        assert "the database keeps what is written" in output and "the artifact store keeps what is written" in output
    assert not list((server.folder / "data" / "artifacts").rglob("*.txt"))


def test_the_check_of_helm_test_can_fail(server: Server):
    artifacts = server.folder / "data" / "artifacts"
    moved = artifacts.rename(server.folder / "data" / "moved")
    artifacts.write_text("a file where the folder was")
    try:
        probe = server.start(server.probe, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = probe.communicate(timeout=120)
        assert probe.returncode != 0 and "mlflow-artifacts" in output, output
    finally:
        artifacts.unlink()
        moved.rename(artifacts)


def test_the_server_answers_its_names_and_refuses_others(server: Server):
    path = "/api/2.0/mlflow/experiments/get?experiment_id=0"
    for host in ("dqo-mlflow", f"dqo-mlflow.ml.svc:{server.port}", f"{server.address}:{server.port}", "localhost:1"):
        assert server.status(path, host) == 200, host
    for port in (6443, 30500):  # of the API server, whose proxy passes the Host on, and of a NodePort
        assert server.status(path, f"{NODE}:{port}") == 200
    for host in ("evil.example.com", "evil.example.com:6443", "192.0.2.70:6443"):
        assert server.status(path, host) == 403, host
    assert server.status("/health", "evil.example.com") == 200  # a kubelet's probe has the pod's address


def test_migrating_again_changes_nothing(server: Server):
    migration = server.start(server.pod["initContainers"][0], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = migration.communicate(timeout=START_SECONDS)
    assert migration.returncode == 0 and "up to date" in output, output
