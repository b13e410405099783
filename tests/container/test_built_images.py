"""What the images hold, and under which restrictions they work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import docker
import pytest
from docker.errors import ContainerError

from pipelines.local import library_digest
from pipelines.placement import WORKSPACE

ROOT = Path(__file__).parents[2]
RESTRICTED = {
    "read_only": True,
    "tmpfs": {"/tmp": "mode=1777"},
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "network_mode": "none",
    "remove": True,
}
TOOLS = "gcc g++ cc make cmake ld git curl wget uv"


def python(engine: docker.DockerClient, image: str, code: str, **options) -> str:
    return engine.containers.run(image, ["python", "-c", code], stderr=False, **RESTRICTED, **options).decode().strip()


@pytest.mark.parametrize("name", ["trainer", "evaluator", "mlflow"])
def test_an_image_holds_no_tools_and_no_secrets(engine, images, name):
    image = engine.images.get(images[name])
    config = image.attrs["Config"]
    assert config["User"] == "10001:10001"
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == "0.1.0"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0" and labels["org.opencontainers.image.title"]
    look = (
        f"id -u; for each in {TOOLS}; do command -v $each; done;"
        "ls -d /build /root/.cache /opt/venv/bin/pip* 2>/dev/null;"
        "touch /opt/venv/x 2>/dev/null; touch /etc/x 2>/dev/null"
    )
    seen = engine.containers.run(images[name], ["bash", "-c", f"({look}) ; true"], stderr=False, remove=True)
    assert seen.decode().split() == ["10001"]
    told = json.dumps(config) + json.dumps(image.history())
    assert not any(word in told.lower() for word in ("token=", "password=", "secret=", "hf_token"))


def held(images: list[str], wanted: set[bytes]) -> set[bytes]:
    """Which of some bytes the images' layers, each as it was written, or their settings hold."""
    # The client for Python gives up after a minute without an answer, which an engine may take to begin.
    saving = subprocess.Popen(["docker", "save", *images], stdout=subprocess.PIPE)
    assert saving.stdout is not None
    found: set[bytes] = set()
    rest, longest = b"", max(map(len, wanted))
    while chunk := saving.stdout.read(2**22):
        window = rest + chunk
        found |= {each for each in wanted if each in window}
        rest = window[-longest:]
    assert saving.wait() == 0
    return found


def test_no_layer_holds_a_token_of_the_builds_environment(engine, images, token):
    # A line of /etc/passwd that our own layers write shows that the layers can be read.
    user = b":x:10001:10001:"
    assert held(sorted(images.values()), {token.encode(), user}) == {user}


@pytest.mark.parametrize(("name", "user"), [("trainer", "4711"), ("evaluator", "10001")])
def test_the_library_works_for_any_user_on_a_read_only_root(engine, images, name, user):
    code = (
        "import torch, trl, matplotlib.pyplot, mlflow, kfp, dqo.stages.evaluate, getpass;"
        "from dqo.bundled import bundled_models; from pipelines.local import library_digest;"
        "assert all(bundled_models().values()) and getpass.getuser();"
        "torch.save(torch.ones(2), '/tmp/x'); print(library_digest())"
    )
    assert python(engine, images[name], code, user=user).splitlines()[-1] == library_digest()


@pytest.mark.parametrize(("name", "user"), [("trainer", "10001:10001"), ("evaluator", "4711:4711")])
def test_a_task_without_a_claim_works_in_the_images_workspace(engine, images, name, user):
    """As on a cluster, where Kubeflow makes no root file system read-only."""
    code = (
        f"from pathlib import Path; from dqo.stages.preflight import _workspace; place = Path({WORKSPACE!r});"
        "print(_workspace(place)); (place / 'stages').mkdir()"
    )
    options = {key: value for key, value in RESTRICTED.items() if key != "read_only"}
    said = engine.containers.run(images[name], ["python", "-c", code], stderr=False, user=user, **options).decode()
    assert f"{WORKSPACE} can be written" in said and "no volume is mounted there" in said


def test_the_lock_of_the_gpu_image_resolves(index):
    """The image itself needs a base with CUDA and a compiler, which is not here."""
    done = subprocess.run(
        ["uv", "pip", "compile", "pyproject.toml", "--extra", "bundled", "--extra", "gpu", "--quiet",
         "-c", "images/trainer/constraints-gpu.txt", "--python-version", "3.11",
         "--python-platform", "x86_64-manylinux_2_28"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\nvllm==" in done.stdout


def test_the_trainer_has_nothing_of_development(engine, images):
    for module in ("pytest", "ruff"):
        with pytest.raises(ContainerError, match="ModuleNotFoundError"):
            engine.containers.run(images["trainer"], ["python", "-c", f"import {module}"], **RESTRICTED)


@pytest.mark.parametrize("name", ["trainer", "evaluator", "mlflow"])
def test_no_interpreter_of_an_image_can_install(engine, images, base, name):
    """The virtual environment's, and those of the base image, which have pip there."""
    interpreters = "find / -xdev -regextype posix-extended -regex '.*/bin/python[0-9.]*' 2>/dev/null"
    tried = (
        f"for each in $({interpreters}); do for module in pip ensurepip; do"
        ' if $each -m $module --version >/dev/null 2>&1; then echo "$each has $module"; fi; done;'
        ' if $each -c "import sys"; then echo "$each works"; fi; done;'
        " find / -xdev -name 'pip*' -path '*/bin/*' 2>/dev/null; find / -xdev -name 'pip*.whl' 2>/dev/null; true"
    )

    def seen(image: str) -> set[str]:
        done = engine.containers.run(image, ["bash", "-c", tried], stderr=False, **RESTRICTED)
        return set(done.decode().splitlines())

    working = {line for line in seen(images[name]) if line.endswith(" works")}
    assert seen(images[name]) == working and "/opt/venv/bin/python works" in working
    assert working > {line for line in seen(base) if line.endswith(" works")}
    assert any(line.endswith(" has pip") for line in seen(base))  # else nothing has been looked at


def test_the_server_has_what_the_chart_asks_for(engine, images):
    code = "import boto3, psycopg2, flask_wtf, prometheus_flask_exporter, mlflow; print(mlflow.__version__)"
    assert python(engine, images["mlflow"], code).startswith("3.17.")
