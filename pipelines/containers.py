"""The runner of `dqo run --runner docker`: each stage of the pipeline in a container of its own.

Kubeflow's DockerRunner starts the containers. They get the folder of runs under its own path, models and data
read-only, and nothing else of this machine: a numbered user, a read-only root file system, no capabilities.
"""

import hashlib
import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from dqo.errors import DQOError
from dqo.recipe import Recipe

USER = 10001
"""User of the images, which containers run as where the caller is root."""
LABEL = "dqo.run"
"""Label of all containers of one call, whose value is the call's own."""
# What stages read from the environment: MLflow's and the stores' credentials, the hub's token.
_PASSED = ("MLFLOW_TRACKING_", "MLFLOW_S3_", "AWS_")
_PASSED_NAMES = ("HF_TOKEN", "HF_ENDPOINT", "OMP_NUM_THREADS", "MLFLOW_RUN_ID")
_MODELS = "/tmp/.cache/dqo/models"  # where the library in the image looks for rebuilt models
_HUB = "/models/huggingface/hub"
_STOP_SECONDS = 15.0

# Runs in a container as a stage would: what the image holds, whether the folder is the same one and writable, whether
# MLflow answers. The last line of its output is JSON.
_PROBE = """
import json, os, pathlib, sys
answer = {"missing": "", "library": "", "version": "", "write": "", "read": "", "mlflow": ""}
try:
    import dqo
    from dqo.errors import DQOError
    from dqo.tracking import check_reachable
    from pipelines.local import library_digest
    answer |= {"version": dqo.__version__, "library": library_digest()}
except ImportError as error:
    answer["missing"] = str(error)
else:
    for folder in json.loads(sys.argv[2]):
        try:
            (pathlib.Path(folder) / sys.argv[1]).write_text(folder)
        except OSError as error:
            answer["write"] = f"{folder}: {error.strerror}"
    for name in json.loads(sys.argv[4]):
        path = pathlib.Path(name)
        try:
            for file in path.iterdir() if path.is_dir() else [path]:
                if not os.access(file, os.R_OK):
                    answer["read"] = str(file)
        except OSError as error:
            answer["read"] = str(error.filename)
    try:
        check_reachable(sys.argv[3])
    except DQOError as error:
        answer["mlflow"] = str(error)
print(json.dumps(answer))
"""

# Asks the stage inside a container to stop. Its first process is a shell, which would not pass the signal on.
_ASK = """
import os, pathlib, signal
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
        if b"kfp.dsl.executor_main" in path.read_bytes().split(b"\\0"):
            os.kill(int(path.parent.name), signal.SIGTERM)
    except OSError:
        pass
"""


@dataclass(frozen=True)
class Containers:
    """How the stages' containers are started; goes to the runner's process as JSON.

    Attributes:
        image: Name of the image.
        run: Value of the label `dqo.run`.
        user: `uid:gid` in the container.
        network: Docker network: `none`, `host`, `bridge` or a name.
        writable: Folders mounted under their own path.
        readable: Host path -> path in the container, mounted read-only.
        environment: Variables that are no secret. Those are taken from the process' own environment, so that none
            stands in a file.
        secret: Names of variables to pass on.
        gpus: Whether containers get the machine's GPUs.
    """

    image: str
    run: str
    user: str
    network: str
    writable: list[str]
    readable: dict[str, str]
    environment: dict[str, str] = field(default_factory=dict)
    secret: list[str] = field(default_factory=list)
    gpus: bool = False

    def arguments(self) -> dict[str, Any]:
        """Arguments of docker's `containers.run`."""
        from docker.types import DeviceRequest, Mount

        mounts = [Mount(path, path, type="bind") for path in self.writable]
        mounts += [Mount(inside, path, type="bind", read_only=True) for path, inside in self.readable.items()]
        passed = {name: os.environ[name] for name in self.secret if name in os.environ}
        return {
            "mounts": mounts,
            "environment": self.environment | passed,
            "user": self.user,
            "network_mode": self.network,
            "read_only": True,
            "tmpfs": {"/tmp": "rw,nosuid,nodev,exec,mode=1777"},
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "shm_size": "2g",  # data loaders and processes of one training pass tensors through it
            "init": True,
            "labels": {LABEL: self.run},
            "entrypoint": "",
            **({"device_requests": [DeviceRequest(count=-1, capabilities=[["gpu"]])]} if self.gpus else {}),
        }

    def to_json(self) -> str:
        """The settings as JSON."""
        return json.dumps(asdict(self), indent=1)


def client() -> Any:
    """Return a client of the Docker engine.

    Raises:
        DQOError: If none answers.
    """
    import docker

    try:
        engine = docker.from_env()
        engine.ping()
    except (docker.errors.DockerException, OSError) as error:
        address = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        raise DQOError(
            f"--runner docker: no Docker engine answers at {address} ({_first_line(error)}); start one, or set "
            "DOCKER_HOST, or leave --runner docker out to run without containers"
        ) from None
    return engine


def prepare(recipe: Recipe, root: Path, uri: str, network: str | None, token: str) -> Containers:
    """Find out how the stages of a recipe have to be started in containers.

    Args:
        recipe: The recipe; `resources.image` names the image.
        root: The folder of runs.
        uri: MLflow's address.
        network: Docker network to use; None chooses one.
        token: Value of the label of this call's containers.

    Raises:
        DQOError: If the engine, the image or the data cannot be used.
    """
    import docker

    engine = client()
    image = recipe.resources.image
    try:
        engine.images.get(image)
    except docker.errors.ImageNotFound:
        raise DQOError(
            f"resources.image {image!r}: the Docker engine has no such image; build it with `make images`, or load or "
            "pull it"
        ) from None
    if recipe.data.source == "public" or recipe.data.source.startswith("hub:"):
        raise DQOError(
            f"data.source {recipe.data.source!r}: the hub's data sets cannot be read with --runner docker yet; "
            "expected 'bundled' or a file"
        )
    caller = os.geteuid()
    return Containers(
        image=image,
        run=token,
        user=f"{USER}:{USER}" if caller == 0 else f"{caller}:{os.getegid()}",
        network=network or _network(recipe, uri),
        writable=_writable(root, uri),
        readable=_readable(recipe),
        environment={
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",  # models are on this machine before the first stage starts
            "HF_HUB_CACHE": _HUB,
        },
        secret=sorted(
            name
            for name in os.environ
            if name.startswith(_PASSED) or name in _PASSED_NAMES or (recipe.judge and name == recipe.judge.api_key_env)
        ),
        gpus="nvidia" in engine.info().get("Runtimes", {}),
    )


def check(containers: Containers, uri: str) -> str:
    """Start one container as a stage would be and look around; returns the digest of the library in the image.

    Raises:
        DQOError: If the image lacks the library or holds another version, the folders cannot be written or are not
            this machine's, or MLflow does not answer from there.
    """
    import docker

    from dqo import __version__

    engine = client()
    name = f".container-{containers.run}"
    command = ["python", "-c", _PROBE, name, json.dumps(containers.writable), uri]
    command.append(json.dumps(list(containers.readable.values())))
    for path in containers.writable:
        _give(Path(path), containers.user)
    try:
        output = engine.containers.run(containers.image, command, remove=True, **containers.arguments())
        answer = json.loads(output.decode().strip().splitlines()[-1])
        seen = [path for path in containers.writable if (Path(path) / name).is_file()]
    except (docker.errors.ContainerError, docker.errors.APIError, ValueError, IndexError) as error:
        lines = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip().splitlines()
        raise DQOError(
            f"resources.image {containers.image!r}: a container of it cannot be started as a stage "
            f"({lines[-1] if lines else _first_line(error)}); expected the image of `make images`"
        ) from None
    finally:
        for path in containers.writable:
            (Path(path) / name).unlink(missing_ok=True)
    if answer["missing"]:
        raise DQOError(
            f"resources.image {containers.image!r}: does not hold this library ({answer['missing']}); build it with "
            "`make images`"
        )
    if answer["version"] != __version__:
        raise DQOError(
            f"resources.image {containers.image!r}: holds version {answer['version']} of this library; expected "
            f"{__version__}: build it anew with `make images`"
        )
    if answer["write"]:
        raise DQOError(f"--out: user {containers.user} cannot write there from a container ({answer['write']})")
    if answer["read"]:
        raise DQOError(
            f"{answer['read']}: user {containers.user} of the containers may not read it; let everyone read models and "
            "data, for example with chmod -R a+rX"
        )
    if len(seen) < len(containers.writable):
        raise DQOError(
            f"--out {containers.writable[0]}: what a container writes there does not arrive here; expected a Docker "
            "engine on this machine"
        )
    if answer["mlflow"]:
        raise DQOError(
            f"from a container on network {containers.network!r}: {answer['mlflow']} With --runner docker, MLflow has "
            "to be reached from the containers: let it listen on an address of this machine that is not loopback, or "
            "name its network with --network"
        )
    return str(answer["library"])


def fetch_models(recipe: Recipe) -> None:
    """Bring every model that the containers only read onto this machine: rebuilt bundled ones, and the hub's."""
    from dqo.bundled import locate

    for name, revision in recipe.models:
        location = locate(name, revision)
        if not Path(location.load).is_dir():
            from huggingface_hub import snapshot_download

            snapshot_download(location.load, revision=location.hub_revision)


def run_pipeline_in(containers: Containers) -> Any:
    """Return Kubeflow's runner for these containers, which reports each container's own exit status.

    Kubeflow 2.17 has containers removed as they end and takes one that is gone before it is asked about for successful,
    which hides failures. Here a container is removed once its status is known.
    """
    from kfp import local
    from kfp.local import docker_task_handler

    def run_docker_container(client: Any, image: str, command: list[str], volumes: Any, **arguments: Any) -> int:
        # Kubeflow replaces the runner's variables by the component's, where it has any.
        arguments["environment"] = containers.arguments()["environment"] | arguments.get("environment", {})
        container = client.containers.run(image, command, volumes=volumes, detach=True, **arguments)
        try:
            for line in container.logs(stream=True, follow=True):
                print(line.decode(errors="replace"), end="", flush=True)
            return int(container.wait()["StatusCode"])
        finally:
            container.remove(force=True)

    docker_task_handler.run_docker_container = run_docker_container
    _stop_on_signal(containers.run)
    return local.DockerRunner(**containers.arguments())


def stop_all(run: str) -> None:
    """End all containers of a call: ask their stages first, so that MLflow's runs are closed, then insist."""
    import docker

    try:
        engine = docker.from_env()
        found = engine.containers.list(filters={"label": f"{LABEL}={run}"})
    except (docker.errors.DockerException, OSError):
        return
    threads = [threading.Thread(target=_stop, args=(container,)) for container in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _stop(container: Any) -> None:
    import docker
    import requests

    for act in (
        lambda: container.exec_run(["python", "-c", _ASK]),
        lambda: container.wait(timeout=_STOP_SECONDS),
        lambda: container.remove(force=True),
    ):
        try:
            act()
        except docker.errors.NotFound:
            return
        except (docker.errors.APIError, requests.exceptions.RequestException):
            continue


def _stop_on_signal(run: str) -> None:
    """Let SIGTERM end the containers, which are no children of this process, before it ends the process."""

    def stop(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)
        stop_all(run)
        sys.stdout.flush()
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def _network(recipe: Recipe, uri: str) -> str:
    """No network where nothing is asked over one; the machine's own where loopback is; else Docker's."""
    addresses = [uri] if uri.startswith(("http://", "https://", "postgresql", "mysql", "mssql")) else []
    addresses += [recipe.judge.endpoint] if recipe.judge and recipe.judge.endpoint else []
    addresses += [recipe.rl.rollout.server_base_url] if recipe.rl.rollout.server_base_url else []
    if not addresses:
        return "none"
    hosts = {urlparse(address).hostname or "" for address in addresses}
    local = any(host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.") for host in hosts)
    return "host" if local else "bridge"


def _writable(root: Path, uri: str) -> list[str]:
    """The folder of runs, and that of an sqlite store elsewhere."""
    folders = [root]
    if uri.startswith("sqlite:///"):
        store = Path(uri.removeprefix("sqlite:///")).resolve().parent
        if not store.is_relative_to(root):
            folders.append(store)
    return [str(folder) for folder in folders]


def _readable(recipe: Recipe) -> dict[str, str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from dqo.bundled import cache_folder

    readable = {}
    for model, _ in recipe.models:
        path = Path(model).expanduser()
        if model.startswith("bundled:"):
            cache_folder().mkdir(parents=True, exist_ok=True)
            readable[str(cache_folder().resolve())] = _MODELS
        elif path.is_dir():
            readable[str(path.resolve())] = _inside(model, path)
        else:
            Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
            readable[str(Path(HF_HUB_CACHE).resolve())] = _HUB
    source = Path(recipe.data.source).expanduser()
    if recipe.data.source != "bundled":
        readable[str(source.resolve())] = _inside(recipe.data.source, source)
    if recipe.judge is not None:
        for name in (recipe.judge.prompt if recipe.judge.prompt.endswith(".yaml") else None, recipe.judge.labelled):
            if name is not None:
                file = Path(name).expanduser()
                readable[str(file.resolve())] = _inside(name, file)
    return readable


def _inside(name: str, path: Path) -> str:
    """Path under which the container finds what the recipe names: the same one.

    Raises:
        DQOError: If the name means another place there.
    """
    if not Path(name).is_absolute():
        raise DQOError(
            f"{name!r}: a container has another working directory and home; with --runner docker name the whole path, "
            f"{path.resolve()}"
        )
    return str(path)


def _give(folder: Path, user: str) -> None:
    """Let the containers' user write what root has made in a folder of runs; anyone else runs them as himself."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        return
    number = int(user.partition(":")[0])
    for path in [folder, *folder.rglob("*")]:
        if path.lstat().st_uid == 0:
            os.chown(path, number, number, follow_symlinks=False)


def image_identity(image: str) -> str:
    """What an image's name stands for now, for Kubeflow's cache: its tag may be moved.

    Raises:
        DQOError: As `client`.
    """
    return hashlib.sha256(client().images.get(image).id.encode()).hexdigest()[:12]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
