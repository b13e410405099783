"""`dqo run --runner docker`: the whole pipeline in containers, killed, interrupted, unable to start."""

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import mlflow
import pytest
from pipeline.tiny_runs import STAGES, command, environment, events, run, runs_of, started, write_recipe

LONG = {"rl": {"steps": 150, "save_every": 5}}


@pytest.fixture
def models(tiny_policy, tiny_encoder, tmp_path):
    """The tiny models, readable for the containers' user."""
    for path in (tiny_policy, tiny_encoder):
        for each in [path, *path.parents]:
            if each.name.startswith("pytest-"):
                each.chmod(0o755)
        path.parent.chmod(0o755)
        for file in path.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
    for each in [tmp_path, tmp_path.parent]:
        each.chmod(0o755)
    return tiny_policy, tiny_encoder


@pytest.fixture
def server(engine, images) -> Iterator[str]:
    """MLflow in the container of its image, at an address of Docker's network."""
    container = engine.containers.run(
        images["mlflow"],
        ["mlflow", "server", "--host=0.0.0.0", "--port=5000", "--workers=1", "--serve-artifacts", "--allowed-hosts=*",
         "--backend-store-uri=sqlite:////data/mlflow.db", "--artifacts-destination=/data/artifacts"],
        detach=True, read_only=True, cap_drop=["ALL"], tmpfs={"/tmp": "mode=1777", "/data": "mode=0700,uid=10001"},
    )  # fmt: skip
    try:
        container.reload()
        uri = f"http://{container.attrs['NetworkSettings']['IPAddress']}:5000"
        end = time.time() + 120
        while True:
            try:
                assert urllib.request.urlopen(f"{uri}/health", timeout=5).status == 200
                break
            except OSError:
                assert time.time() < end, container.logs().decode()[-3000:]
                time.sleep(1)
        yield uri
    finally:
        container.remove(force=True)


def start(recipe, out) -> subprocess.Popen[str]:
    """Start a run and wait for a checkpoint of the RL stage."""
    process = subprocess.Popen(
        command("run", recipe, "--out", out, "--runner", "docker"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip
    end = time.time() + 300
    while time.time() < end and process.poll() is None:
        if list(out.glob("workspace/stages/rl-reward_only-*/checkpoints/*/complete")):
            return process
        time.sleep(0.2)
    process.kill()
    pytest.fail(process.communicate()[0])


def ours(engine) -> list:
    return engine.containers.list(all=True, filters={"label": "dqo.run"})


def test_a_pipeline_runs_in_containers_and_a_server_shows_it(engine, images, models, server, tmp_path):
    recipe = write_recipe(
        tmp_path / "tiny.yaml", *models, resources={"image": images["trainer"]}, tracking={"uri": server}
    )
    out = tmp_path / "runs"
    done = run(recipe, out, "--runner", "docker")
    assert done.returncode == 0, done.stdout + done.stderr
    assert started(events(out)) == STAGES
    client = mlflow.MlflowClient(server)
    (experiment,) = [each for each in client.search_experiments() if each.name == "dqo"]
    seen = {
        each.data.tags["mlflow.runName"]: each.info.status for each in client.search_runs([experiment.experiment_id])
    }
    assert set(seen) >= {"tiny", *STAGES[:-1]} and set(seen.values()) == {"FINISHED"}
    assert client.get_model_version_by_alias("tiny-stories", "challenger").version == "1"
    assert server in done.stdout and (out / "workspace").is_dir() and not ours(engine)
    again = run(recipe, out, "--runner", "docker")
    assert again.returncode == 0 and started(events(out)) == STAGES, again.stdout + again.stderr


def test_a_killed_container_fails_the_run_and_the_next_one_continues(engine, images, models, tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", *models, resources={"image": images["trainer"]}, **LONG)
    out = tmp_path / "runs"
    process = start(recipe, out)
    (container,) = ours(engine)
    config = container.attrs
    assert config["Config"]["User"] != "0:0" and config["HostConfig"]["ReadonlyRootfs"]
    assert config["HostConfig"]["NetworkMode"] == "none" and config["HostConfig"]["CapDrop"] == ["ALL"]
    container.kill()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "--runner docker" in printed and "Traceback" not in printed.partition("dqo:")[2]
    assert not ours(engine)
    before = len(events(out))
    done = run(recipe, out, "--runner", "docker")
    assert done.returncode == 0, done.stdout + done.stderr
    again = events(out)[before:]
    assert started(again) == ["rl-reward_only", "rl-dqo", "evaluate", "register"]
    assert any("continuing from checkpoint-" in each.get("message", "") for each in again)


def test_ctrl_c_stops_the_containers_and_closes_the_run(engine, images, models, tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", *models, resources={"image": images["trainer"]}, **LONG)
    out = tmp_path / "runs"
    process = start(recipe, out)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=90)
    assert process.returncode == 130 and "--runner docker" in printed and not ours(engine)
    assert runs_of(out)["rl-reward_only"].info.status == "KILLED"


def test_an_image_that_is_missing_or_lacks_the_library(engine, base, models, tmp_path):
    for image, words in (("dqo-nowhere:1", "make images"), (base, "does not hold this library")):
        recipe = write_recipe(tmp_path / "tiny.yaml", *models, resources={"image": image})
        done = run(recipe, tmp_path / "runs", "--runner", "docker")
        assert done.returncode == 2 and words in done.stderr and image in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="anyone else's containers run as himself")
def test_a_model_that_containers_may_not_read(engine, images, models, tmp_path):
    weights = models[0] / "model.safetensors"
    weights.chmod(0o600)
    recipe = write_recipe(tmp_path / "tiny.yaml", *models, resources={"image": images["trainer"]})
    done = run(recipe, tmp_path / "runs", "--runner", "docker")
    assert done.returncode == 2 and f"{weights}: user 10001:10001 of the containers may not read it" in done.stderr


def test_a_server_that_containers_cannot_reach(engine, images, models, server, tmp_path):
    recipe = write_recipe(
        tmp_path / "tiny.yaml", *models, resources={"image": images["trainer"]}, tracking={"uri": server}
    )
    done = run(recipe, tmp_path / "runs", "--runner", "docker", "--network", "none")
    assert done.returncode == 2 and "--network" in done.stderr and "MLflow does not answer" in done.stderr
