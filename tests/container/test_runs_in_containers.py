"""`dqo run --runner docker`: the whole pipeline in containers, killed, continued, interrupted, unable to start."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psycopg2
import pytest
from pipeline.tiny_runs import STAGES, command, environment, events, run, runs_of, started, write_recipe

# Long enough to be killed in the middle.
LONG = {"rl": {"steps": 20, "save_every": 5}}


@dataclass(frozen=True)
class Call:
    """What a call of `dqo run` did.

    Attributes:
        status: Its exit status.
        printed: Its output.
        events: What its stages have told.
        restrictions: Docker's description of the container of a stage.
        tried: What a command inside of that container was told.
    """

    status: int
    printed: str
    events: list[dict]
    restrictions: dict
    tried: str = ""


@pytest.fixture(scope="module")
def models(tiny_policy, tiny_encoder):
    """The tiny models, readable for the containers' user."""
    for folder in (tiny_policy, tiny_encoder):
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    return tiny_policy, tiny_encoder


@pytest.fixture(scope="module")
def pipeline(images, models, server, tmp_path_factory) -> tuple[Path, Path]:
    """Recipe and folder of the one whole run that several tests look at, tracked by the server."""
    os.environ.update(server.credentials)  # put back after the module
    folder = tmp_path_factory.mktemp("pipeline")
    resources, tracking = {"image": images["trainer"]}, {"uri": server.uri}
    recipe = write_recipe(folder / "tiny.yaml", *models, resources=resources, tracking=tracking, **LONG)
    return recipe, folder / "runs"


@pytest.fixture(scope="module")
def killed(engine, pipeline, models) -> Call:
    """A call whose container was killed while it trained the last variant: Kubeflow goes on with those after it."""
    recipe, out = pipeline
    process = start(recipe, out, "rl-dqo")
    (container,) = ours(engine)
    look = f"id -u; for each in /usr {models[0]} {out}; do touch $each/x 2>/dev/null && echo $each; done; true"
    tried = container.exec_run(["bash", "-c", look]).output.decode()
    (out / "x").unlink(missing_ok=True)
    container.kill()
    printed, _ = process.communicate(timeout=120)
    return Call(process.returncode, printed, events(out), container.attrs, tried)


@pytest.fixture(scope="module")
def finished(engine, pipeline, killed) -> Call:
    """The call after it, which came to the end."""
    done = run(*pipeline, "--runner", "docker", timeout=1200)
    return Call(done.returncode, done.stdout + done.stderr, events(pipeline[1])[len(killed.events) :], {})


def start(recipe: Path, out: Path, stage: str) -> subprocess.Popen[str]:
    """Start a run and wait for a checkpoint of a stage."""
    process = subprocess.Popen(
        command("run", recipe, "--out", out, "--runner", "docker"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip
    end = time.time() + 450
    while time.time() < end and process.poll() is None:
        if list(out.glob(f"workspace/stages/{stage}-*/checkpoints/*/complete")):
            return process
        time.sleep(0.1)
    process.kill()
    printed = process.communicate()[0]
    log = "".join(path.read_text(errors="replace")[-3000:] for path in out.glob("*/run.log"))
    pytest.fail(f"no checkpoint was written:\n{printed}\n{log}")


def ours(engine) -> list:
    return engine.containers.list(all=True, filters={"label": "dqo.run"})


def test_stages_run_restricted(killed, models, pipeline):
    config = killed.restrictions
    host = config["HostConfig"]
    assert config["Config"]["User"] not in ("", "0:0") and host["ReadonlyRootfs"] and not host["Privileged"]
    assert host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges"]
    writable = {each["Destination"] for each in config["Mounts"] if each["RW"]}
    # Kubeflow adds the folder of its artifacts, which lies within, and an empty one.
    writable.discard("/kfp-workspace")
    assert str(pipeline[1]) in writable and all(Path(each).is_relative_to(pipeline[1]) for each in writable)
    assert {str(path) for path in models} <= {each["Destination"] for each in config["Mounts"]}
    user = config["Config"]["User"].partition(":")[0]
    assert killed.tried.split() == [user, str(pipeline[1])]  # of three places, only the folder of runs was written


def test_a_killed_container_fails_the_run(killed):
    assert killed.status == 2 and "--runner docker" in killed.printed
    assert "Traceback" not in killed.printed.partition("dqo:")[2]
    assert started(killed.events) == STAGES[:4]
    assert [each["stage"] for each in killed.events if each["event"] == "done"] == STAGES[:3]


def test_the_next_run_continues_from_the_checkpoint_to_the_end(engine, finished, pipeline):
    assert finished.status == 0, finished.printed
    assert started(finished.events) == STAGES[3:]
    assert any("continuing from checkpoint-" in each.get("message", "") for each in finished.events)
    assert not ours(engine)
    before = len(events(pipeline[1]))
    again = run(*pipeline, "--runner", "docker")
    assert again.returncode == 0, again.stdout + again.stderr
    assert started(events(pipeline[1])[before:]) == []


def test_mlflow_on_postgresql_and_s3_shows_the_run(finished, server):
    assert finished.status == 0 and server.uri in finished.printed, finished.printed
    client = mlflow.MlflowClient(server.uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == "dqo"]
    runs = client.search_runs([experiment.experiment_id])
    states = {each.data.tags["mlflow.runName"]: each.info.status for each in runs}
    assert set(states) >= {"tiny", *STAGES[:-1]} and set(states.values()) == {"FINISHED"}
    model = client.get_model_version_by_alias("tiny-stories", "challenger")
    assert model.version == "1"
    # The same without MLflow: rows of the database, objects of the store.
    names = {"host": "PGHOST", "port": "PGPORT", "dbname": "PGDATABASE", "user": "PGUSER", "password": "PGPASSWORD"}
    with psycopg2.connect(**{key: server.environment[name] for key, name in names.items()}) as database:
        cursor = database.cursor()
        cursor.execute("select name, status from runs")
        assert dict(cursor.fetchall()) == states
    stored = [each["Key"] for each in server.s3_client().list_objects_v2(Bucket=server.bucket)["Contents"]]
    assert any(name.endswith("adapter_model.safetensors") for name in stored)
    assert any(name.endswith("report.html") for name in stored)


def test_ctrl_c_stops_the_containers_and_closes_the_run(engine, images, models, tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", *models, resources={"image": images["trainer"]}, **LONG)
    out = tmp_path / "runs"
    process = start(recipe, out, "rl-reward_only")
    (container,) = ours(engine)
    assert container.attrs["HostConfig"]["NetworkMode"] == "none"  # MLflow is a file here
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
    try:
        done = run(recipe, tmp_path / "runs", "--runner", "docker")
    finally:
        weights.chmod(0o644)
    assert done.returncode == 2 and f"{weights}: user 10001:10001 of the containers may not read it" in done.stderr


def test_a_server_that_containers_cannot_reach(engine, pipeline, tmp_path):
    done = run(pipeline[0], tmp_path / "runs", "--runner", "docker", "--network", "none")
    assert done.returncode == 2 and "--network" in done.stderr and "MLflow does not answer" in done.stderr
