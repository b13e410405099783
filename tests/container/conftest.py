"""A Docker engine, a base image and the images, each made where it is not there."""

import os
import secrets
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import docker
import pytest
from container.reach import cannot_start, no_index
from docker.errors import DockerException, ImageNotFound
from services.servers import Server, serving

ROOT = Path(__file__).parents[2]
BASE = "python:3.11-slim-bookworm"
STAND_IN = "dqo-test-base:bookworm"
PACKAGES = "ca-certificates,python3,python3-pip,python3-venv,netbase,tzdata"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.container)
            item.add_marker(pytest.mark.timeout(1800))


def _answers() -> bool:
    try:
        return docker.from_env().ping()
    except (DockerException, OSError):
        return False


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """The Docker engine of this machine, or one started for these tests; skips, saying why, where neither can be."""
    if _answers():
        yield docker.from_env()
        return
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("no Docker engine answers, and starting one needs root and dockerd (Debian: docker.io)")
    folder = Path(tempfile.mkdtemp(prefix="dqo-docker-"))
    saved = os.environ.get("DOCKER_HOST")
    os.environ["DOCKER_HOST"] = address = f"unix://{folder}/docker.sock"
    command = ["dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec"]
    command += ["-p", folder / "pid", "-H", address]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    try:
        end = time.time() + 120
        while not _answers():
            if process.poll() is not None:
                last = (folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
                pytest.skip(f"dockerd ended with {process.returncode} instead of starting: {last}")
            # Slow is not the same as impossible.
            assert time.time() < end, f"dockerd has not answered for 120 s: {(folder / 'log').read_text()[-2000:]}"
            time.sleep(0.3)
        yield docker.from_env()
    finally:
        process.terminate()
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("DOCKER_HOST") if saved is None else os.environ.update(DOCKER_HOST=saved)


@pytest.fixture(scope="session")
def buildkit(engine: docker.DockerClient) -> dict[str, str]:
    """Environment in which `docker build` uses BuildKit, where one of the installed programs can.

    Docker's older builder writes the gigabytes of the first stage into an image of their own.
    """
    for folder in os.get_exec_path():
        if not (Path(folder) / "docker").is_file():
            continue
        found = {**os.environ, "DOCKER_BUILDKIT": "1", "PATH": f"{folder}:{os.environ['PATH']}"}
        tried = subprocess.run(
            ["docker", "build", "-q", "-"], input=b"FROM scratch\nLABEL a=b", env=found, capture_output=True
        )
        if tried.returncode == 0:
            return found
    return dict(os.environ)


@pytest.fixture(scope="session")
def base(engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base image, of which the engine starts containers; skips where it starts none."""
    name = _base(engine, tmp_path_factory)
    if reason := cannot_start(engine, name):
        pytest.skip(reason)
    return name


def _base(engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base image, or where no registry is in reach, Debian's Python in its place."""
    for name in (BASE, STAND_IN):
        try:
            return engine.images.get(name).tags[0]
        except ImageNotFound:
            continue
    try:
        engine.images.pull(BASE)
        return BASE
    except (DockerException, OSError) as error:  # requests' time-outs are OSErrors
        refused = f"{BASE} cannot be pulled ({str(error).splitlines()[0][:200]})"
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.skip(f"{refused}, and standing in for it needs root and debootstrap")
    root = tmp_path_factory.mktemp("base") / "root"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root], capture_output=True, text=True
    )
    if "Failed getting release file" in made.stdout + made.stderr:
        pytest.skip(f"{refused}, and no Debian mirror is in reach for one to stand in for it")
    assert made.returncode == 0, (made.stdout + made.stderr)[-2000:]
    for path in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        path.unlink()
    for name in ("python", "pip"):
        (root / "usr/local/bin" / name).symlink_to(f"/usr/bin/{name}3")
    # This machine's way to its package index: certificates, and a folder of wheels.
    authorities = root / "usr/local/share/ca-certificates"
    for path in Path("/usr/local/share/ca-certificates").rglob("*.crt"):
        shutil.copy(path, authorities)
    subprocess.run(["chroot", root, "update-ca-certificates"], check=True, capture_output=True)
    settings = ["[global]", "cert = /etc/ssl/certs/ca-certificates.crt"]
    wheels = Path(os.environ.get("PIP_FIND_LINKS") or "/nowhere")
    if wheels.is_dir():
        (root / "wheels").mkdir()
        for path in wheels.glob("torch-*+cpu-*.whl"):
            shutil.copy(path, root / "wheels")
        settings.append("find-links = /wheels")
    (root / "etc/pip.conf").write_text("\n".join(settings) + "\n")
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    change = f"ENV SSL_CERT_FILE={certificates} REQUESTS_CA_BUNDLE={certificates}"
    packed = subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE)
    subprocess.run(
        ["docker", "import", "--change", change, "-", STAND_IN], stdin=packed.stdout, check=True, capture_output=True
    )
    assert packed.wait() == 0
    return STAND_IN


@pytest.fixture(scope="session")
def index(engine: docker.DockerClient, base: str) -> None:
    """Skips where containers have no connection to a package index, from which the images are built."""
    if reason := no_index(engine, base):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def token() -> str:
    """What stands in the environment of the build, as a team's own may."""
    return f"hf_{secrets.token_hex(17)}"


@pytest.fixture(scope="session")
def images(base: str, index: None, buildkit: dict[str, str], token: str) -> dict[str, str]:
    """Names of the images, built from this working tree."""
    credentials = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "KFP_TOKEN")
    built = subprocess.run(
        [ROOT / "images/build.sh", "trainer", "evaluator", "mlflow"],
        env={**buildkit, "ENGINE": "docker", "BASE": base, "TAG": "test", **dict.fromkeys(credentials, token)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert built.returncode == 0, built.stdout[-4000:]
    print(built.stdout[built.stdout.rindex("dqo-trainer") :])
    return {name: f"dqo-{name}:test" for name in ("trainer", "evaluator", "mlflow")}


@pytest.fixture(scope="session")
def server(engine: docker.DockerClient, images: dict[str, str]) -> Iterator[Server]:
    """MLflow in a container of its image, on PostgreSQL and S3 of this machine, at the gateway of Docker's network."""
    bridge = engine.networks.get("bridge").attrs["IPAM"]["Config"][0]
    gateway = bridge.get("Gateway") or str(ip_network(bridge["Subnet"])[1])  # a new engine does not say it
    with serving("--address", gateway, "--without-mlflow") as parts:
        settings = parts.environment["MLFLOW_AUTH_CONFIG_PATH"]
        container = engine.containers.run(
            images["mlflow"],
            ["mlflow", *parts.arguments, "--host=0.0.0.0", "--port=5000"],
            environment=parts.environment,
            mounts=[docker.types.Mount(settings, settings, type="bind", read_only=True)],
            ports={"5000/tcp": (gateway, None)},
            detach=True, read_only=True, cap_drop=["ALL"], security_opt=["no-new-privileges"],
            tmpfs={"/tmp": "mode=1777"},
        )  # fmt: skip
        try:
            container.reload()
            uri = f"http://{gateway}:{container.ports['5000/tcp'][0]['HostPort']}"
            end = time.time() + 180
            while True:
                try:
                    assert urllib.request.urlopen(f"{uri}/health", timeout=5).status == 200
                    break
                except OSError:
                    container.reload()
                    assert container.status == "running" and time.time() < end, container.logs().decode()[-3000:]
                    time.sleep(0.5)
            yield replace(parts, uri=uri)
        finally:
            container.remove(force=True)
