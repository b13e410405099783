"""A server that does not let us in, goes away, or cannot store files: a message in words, and a way on."""

import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

import mlflow
import pytest
from pipeline.tiny_runs import command, environment, write_recipe
from services.servers import PASSWORD, SECRET, USER, Line, Server, act_as

from dqo import registry, tracking
from dqo.errors import DQOError
from dqo.recipe import Recipe

# --- who is not let in ---


def test_no_credentials_are_asked_for(server: Server, recipe: Recipe):
    with pytest.raises(DQOError) as caught:
        tracking.connect(recipe, server.uri)
    message = str(caught.value)
    assert message.startswith(f"tracking.uri {server.uri!r}: MLflow answers, but it asks for a user name")
    assert USER in message and PASSWORD in message and message.endswith("Nothing was trained.")


@pytest.mark.parametrize("where", ["environment", "address"])
def test_a_wrong_password_is_named_and_not_shown(
    server: Server, recipe: Recipe, where: str, monkeypatch: pytest.MonkeyPatch
):
    uri = server.uri
    if where == "environment":
        act_as(monkeypatch, server.username, SECRET)
    else:
        uri = uri.replace("://", f"://{server.username}:{quote(SECRET)}@")
    with pytest.raises(DQOError, match="does not know the user 'admin' with this password") as caught:
        tracking.connect(recipe, uri)
    assert SECRET not in str(caught.value) and quote(SECRET) not in str(caught.value)
    assert caught.value.__suppress_context__  # MLflow's own traceback, and what it holds, is not printed


def test_the_command_line_says_it_in_a_line_and_trains_nothing(
    server: Server, tiny_policy: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    act_as(monkeypatch, server.username, SECRET)
    recipe = write_recipe(tmp_path / "tiny.yaml", tiny_policy, tiny_encoder, tracking={"uri": server.uri})
    done = subprocess.run(
        command("run", recipe, "--out", tmp_path / "runs"), capture_output=True, text=True, timeout=120,
        env=environment(),
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode != 0
    assert "does not know the user 'admin'" in printed
    assert "Traceback" not in printed and SECRET not in printed
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_a_password_that_expires_in_a_stage_stops_it_and_a_new_one_continues(
    administrator: Server, user: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow.server.auth.client import AuthServiceClient

    act_as(monkeypatch, user, SECRET)
    parent = tracking.open_parent(recipe, tracking.connect(recipe, administrator.uri), tmp_path)
    with pytest.raises(DQOError) as caught, tracking.child_run(parent, "sft", "sft", "key") as first:
        first.metrics({"loss": 3.0}, step=1)
        act_as(monkeypatch, *administrator.credentials.values())
        AuthServiceClient(administrator.uri).update_user_password(user, "a new one of 18 letters")
        act_as(monkeypatch, user, SECRET)
        first.metrics({"loss": 2.0}, step=2)
    message = str(caught.value)
    assert f"could not log metrics: it does not know the user {user!r} with this password" in message
    assert SECRET not in message
    act_as(monkeypatch, user, "a new one of 18 letters")
    with tracking.child_run(parent, "sft", "sft", "key") as again:
        assert again.id == first.id
        assert again.last_step("loss") == 1


@pytest.mark.slow
def test_a_user_without_permission_is_told_what_may_not_be_done(
    administrator: Server, user: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    experiment = tracking.connect(recipe, administrator.uri)
    parent = tracking.open_parent(recipe, experiment, tmp_path / "workspace")
    mlflow.MlflowClient().create_registered_model("the-administrators")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "card.md").write_text("# Card")
    act_as(monkeypatch, user, SECRET)
    assert tracking.connect(recipe, administrator.uri) == experiment  # may be read
    run = tracking.Run(parent)
    gate = registry.GateResult(True, ["all rules hold"])
    for action, attempt in {
        "open the pipeline's run": lambda: tracking.open_parent(recipe, experiment, tmp_path / "another"),
        "log metrics": lambda: run.metrics({"loss": 1.0}),
        "upload 'folder' as 'data'": lambda: run.folder(tmp_path / "folder", "data"),
        "register the model": lambda: registry.register(
            "the-administrators", parent, f"runs:/{parent}/x", {"dqo.stage_key": "k"}, {}, gate
        ),
    }.items():
        with pytest.raises(DQOError) as caught:
            attempt()
        message = str(caught.value)
        assert f"could not {action}: it does not allow this to the user {user!r}" in message
        assert "ermission denied" in message and SECRET not in message


# --- a server that goes away ---


@pytest.mark.slow
def test_a_server_that_goes_away_in_a_stage_stops_it_and_the_next_call_continues(
    administrator: Server, recipe: Recipe, tmp_path: Path
):
    line = Line(administrator.uri)
    parent = tracking.open_parent(recipe, tracking.connect(recipe, line.uri), tmp_path)
    with pytest.raises(DQOError) as caught, tracking.child_run(parent, "rl-dqo", "rl", "key") as first:
        first.metrics({"loss": 3.0}, step=1)
        line.cut()
        first.metrics({"loss": 2.0}, step=2)
    message = str(caught.value)
    assert message.startswith(f"MLflow at {line.uri!r}: could not log metrics: it does not answer (")
    assert message.endswith("The same command continues from here once that is mended.")

    with pytest.raises(DQOError, match="does not answer"):  # and not a second pipeline run beside the first
        tracking.open_parent(recipe, "0", tmp_path)
    line.mend()
    assert tracking.open_parent(recipe, tracking.connect(recipe, line.uri), tmp_path) == parent
    with tracking.child_run(parent, "rl-dqo", "rl", "key") as again:
        assert again.id == first.id and again.last_step("loss") == 1
        again.metrics({"loss": 2.0}, step=2)
    line.cut()
    mlflow.set_tracking_uri(administrator.uri)
    run = mlflow.MlflowClient().get_run(first.id)
    assert run.info.status == "FINISHED" and run.data.metrics == {"loss": 2.0}


# --- a store that takes no files ---


def attempts(run: tracking.Run, tmp_path: Path) -> dict[str, object]:
    from matplotlib.figure import Figure

    (tmp_path / "folder").mkdir(exist_ok=True)
    (tmp_path / "folder" / "card.md").write_text("# Card")
    return {
        "upload 'folder' as 'data'": lambda: run.folder(tmp_path / "folder", "data"),
        "log the table 'metrics.json'": lambda: run.table({"prompt": ["a"]}, "metrics.json"),
        "log the figure 'front.png'": lambda: run.figure(Figure(), "front.png"),
    }


@pytest.mark.slow
def test_s3_that_refuses_writes_is_named(
    administrator: Server, recipe: Recipe, tmp_path: Path, request: pytest.FixtureRequest
):
    experiment = tracking.connect(recipe, administrator.uri)
    parent = tracking.open_parent(recipe, experiment, tmp_path)
    request.getfixturevalue("read_only_s3")
    run = tracking.Run(parent)
    for action, attempt in attempts(run, tmp_path).items():
        with pytest.raises(DQOError) as caught:
            attempt()
        message = str(caught.value)
        assert f"could not {action}: the artifact store 'mlflow-artifacts:/{experiment}/{parent}/artifacts/" in message
        assert "does not take the files" in message and "s3:PutObject" in message
        for secret in (administrator.password, administrator.s3["AWS_SECRET_ACCESS_KEY"]):
            assert secret not in message


def test_s3_without_a_server_between_that_refuses_writes_is_named(
    read_only_s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Teams whose experiments lie in S3 directly: clients hold the keys."""
    for name, value in read_only_s3.s3.items():
        monkeypatch.setenv(name, value)
    mlflow.set_tracking_uri(tracking.default_uri(tmp_path))
    client = mlflow.MlflowClient()
    experiment = client.create_experiment("direct", artifact_location=f"s3://{read_only_s3.bucket}/direct")
    run = tracking.Run(client.create_run(experiment).info.run_id)
    with pytest.raises(DQOError) as caught:
        attempts(run, tmp_path)["upload 'folder' as 'data'"]()
    message = str(caught.value)
    assert (
        f"the artifact store 's3://{read_only_s3.bucket}/direct/{run.id}/artifacts' does not take the files" in message
    )
    assert "AccessDenied" in message and read_only_s3.s3["AWS_SECRET_ACCESS_KEY"] not in message


def test_a_local_folder_that_takes_no_files_is_named(recipe: Recipe, tmp_path: Path):
    store = tmp_path / "store"
    parent = tracking.open_parent(recipe, tracking.connect(recipe, tracking.default_uri(store)), tmp_path)
    folder = store / "mlflow-artifacts"
    shutil.rmtree(folder)
    folder.write_text("a file where the folder was")
    for action, attempt in attempts(tracking.Run(parent), tmp_path).items():
        with pytest.raises(DQOError) as caught:
            attempt()
        message = str(caught.value)
        assert (
            f"could not {action}: the artifact store '{folder}/{parent}/artifacts' does not take the files" in message
        )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(recipe: Recipe, tmp_path: Path):
    store = tmp_path / "store"
    parent = tracking.open_parent(recipe, tracking.connect(recipe, tracking.default_uri(store)), tmp_path)
    folder = store / "mlflow-artifacts" / parent / "artifacts"
    folder.chmod(0o500)
    try:
        with pytest.raises(DQOError, match=r"the artifact store .* does not take the files"):
            attempts(tracking.Run(parent), tmp_path)["upload 'folder' as 'data'"]()
    finally:
        folder.chmod(0o700)


def test_errors_of_another_origin_pass_as_they_are(mlflow_uri: str, parent: str):
    with pytest.raises(FileNotFoundError), tracking.child_run(parent, "sft", "sft", "key"):
        Path("/no/such/file").read_text()
