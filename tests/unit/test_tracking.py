"""MLflow on a real sqlite store: what is refused, what is continued, how runs end."""

import math
import socket
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from dqo import tracking
from dqo.errors import DQOError
from dqo.recipe import Recipe, parse


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all tests of this file: making its tables takes seconds."""
    return tracking.default_uri(tmp_path_factory.mktemp("store"))


@pytest.fixture
def recipe() -> Recipe:
    return parse("name: a\ntracking: {experiment: tests}")


@pytest.fixture
def experiment(store: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return tracking.connect(recipe, store)


@pytest.fixture
def parent(experiment: str, recipe: Recipe, tmp_path: Path) -> str:
    return tracking.open_parent(recipe, experiment, tmp_path)


def run_of(run_id: str) -> mlflow.entities.Run:
    return mlflow.MlflowClient().get_run(run_id)


# --- an address that cannot be used ---


def test_a_port_that_nobody_listens_on_is_refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(DQOError) as caught:
            tracking.check_reachable(uri)
    message = str(caught.value)
    assert message.startswith(f"tracking.uri {uri!r}: MLflow does not answer (")
    assert "Nothing was trained." in message


@pytest.mark.parametrize("uri", ["http://127.0.0.1:99999", "https://no-such-host.invalid"])
def test_an_address_that_leads_nowhere_is_refused(uri: str):
    with pytest.raises(DQOError, match="does not answer"):
        tracking.check_reachable(uri)


@pytest.mark.parametrize("uri", ["ftp://host", "mlruns", "file:///tmp/mlruns"])
def test_a_kind_of_address_that_mlflow_does_not_take_here_is_refused(uri: str):
    with pytest.raises(DQOError, match="expected http") as caught:
        tracking.check_reachable(uri)
    assert str(caught.value).startswith(f"tracking.uri {uri!r}: ")


def test_no_address_at_all_says_where_to_give_one():
    with pytest.raises(DQOError, match=r"tracking.uri: not set; .*MLFLOW_TRACKING_URI"):
        tracking.check_reachable("")


@pytest.mark.parametrize("uri", ["mysql+pymysql://127.0.0.1:9/x", "postgresql://127.0.0.1:9/x"])
def test_a_database_that_does_not_answer_is_refused(uri: str):
    with pytest.raises(DQOError, match="does not answer"):
        tracking.check_reachable(uri)


def test_an_address_shown_to_others_holds_no_password():
    uri = "https://ann:secret@mlflow.example:8443/base"
    assert tracking.public(uri) == "https://mlflow.example:8443/base"
    assert tracking.run_link(uri, "3", "abc") == "https://mlflow.example:8443/base/#/experiments/3/runs/abc"
    assert tracking.run_link("sqlite:///x.db", "3", "abc") == ""
    with pytest.raises(DQOError) as caught:
        tracking.check_reachable("http://ann:secret@127.0.0.1:9")
    assert "secret" not in str(caught.value) and "'http://127.0.0.1:9'" in str(caught.value)


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path):
    path = tmp_path / "mlflow.db"
    path.write_text("not a database, but somebody's notes\n" * 10)
    with pytest.raises(DQOError, match="does not answer"):
        tracking.check_reachable(f"sqlite:///{path}")
    assert path.read_text().startswith("not a database")


def test_a_store_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DQOError, match="does not answer"):
        tracking.check_reachable(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_a_deleted_experiment_is_refused_by_name(store: str, experiment: str):
    client = mlflow.MlflowClient()
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(DQOError, match=r"tracking.experiment 'gone': deleted"):
        tracking.connect(parse("name: a\ntracking: {experiment: gone}"), store)


# --- the experiment and the parent run ---


def test_connecting_again_finds_the_same_experiment_with_artifacts_beside_the_store(
    store: str, experiment: str, recipe: Recipe
):
    assert tracking.connect(recipe, store) == experiment
    found = mlflow.MlflowClient().get_experiment(experiment)
    assert found.name == "tests"
    folder = Path(store.removeprefix("sqlite:///")).parent / "mlflow-artifacts"
    assert found.artifact_location == folder.as_uri()


def test_the_parent_is_remembered_and_continued(experiment: str, recipe: Recipe, tmp_path: Path):
    first = tracking.open_parent(recipe, experiment, tmp_path)
    mlflow.MlflowClient().set_terminated(first, "FAILED")
    assert tracking.open_parent(recipe, experiment, tmp_path) == first
    run = run_of(first)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "a"
    assert run.data.tags["dqo.stage"] == "pipeline"
    assert run.data.tags["dqo.recipe_digest"] == recipe.digest
    assert parse(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/recipe.yaml")) == recipe


def test_another_recipe_or_workspace_has_a_parent_of_its_own(experiment: str, recipe: Recipe, tmp_path: Path):
    first = tracking.open_parent(recipe, experiment, tmp_path / "one")
    other = parse("name: a\nseed: 1\ntracking: {experiment: tests}")
    assert tracking.open_parent(other, experiment, tmp_path / "one") != first
    assert tracking.open_parent(recipe, experiment, tmp_path / "two") != first


def test_a_deleted_parent_is_replaced(experiment: str, recipe: Recipe, tmp_path: Path):
    first = tracking.open_parent(recipe, experiment, tmp_path)
    mlflow.MlflowClient().delete_run(first)
    second = tracking.open_parent(recipe, experiment, tmp_path)
    assert second != first
    assert tracking.open_parent(recipe, experiment, tmp_path) == second


def test_the_run_that_kubeflow_injects_is_the_parent(
    experiment: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    injected = mlflow.MlflowClient().create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", injected)
    assert tracking.open_parent(recipe, experiment, tmp_path) == injected
    assert run_of(injected).data.tags["dqo.recipe"] == "a"
    assert not (tmp_path / "runs").exists()


# --- the children ---


def test_a_stage_continues_its_own_child_run(parent: str):
    with tracking.child_run(parent, "rl-dqo", "rl", "key1") as first:
        assert first.new
        assert run_of(first.id).info.status == "RUNNING"
    assert run_of(first.id).info.status == "FINISHED"
    with tracking.child_run(parent, "rl-dqo", "rl", "key1") as again:
        assert (again.id, again.new) == (first.id, False)
        assert run_of(again.id).info.status == "RUNNING"
    tags = run_of(first.id).data.tags
    assert (tags["mlflow.parentRunId"], tags["dqo.stage"], tags["dqo.stage_key"]) == (parent, "rl", "key1")


def test_another_key_name_or_parent_is_another_run(parent: str, experiment: str):
    other_parent = mlflow.MlflowClient().create_run(experiment).info.run_id
    ids = set()
    for whose, name, key in (
        (parent, "rl-dqo", "key1"),
        (parent, "rl-dqo", "key2"),
        (parent, "rl-reward_only", "key1"),
        (other_parent, "rl-dqo", "key1"),
    ):
        with tracking.child_run(whose, name, "rl", key) as run:
            assert run.new
            ids.add(run.id)
    assert len(ids) == 4


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED"), (DQOError, "FAILED"), (SystemExit, "FAILED")],
)
def test_how_a_stage_ends_is_the_status_of_its_run_and_the_error_goes_on(
    parent: str, error: type[BaseException], status: str
):
    with pytest.raises(error), tracking.child_run(parent, "sft", "sft", "key") as run:
        raise error("stop")
    assert run_of(run.id).info.status == status
    assert run_of(parent).info.status == status  # the pipeline's run shares an unhappy end ...
    with tracking.child_run(parent, "sft", "sft", "key") as again:
        assert again.id == run.id
        assert run_of(parent).info.status == "RUNNING"  # ... until the stage is taken up again
    assert run_of(run.id).info.status == "FINISHED"


def test_params_of_a_second_call_add_and_never_change(parent: str):
    with tracking.child_run(parent, "sft", "sft", "key") as run:
        run.params({"alpha": 1.0, "k": 8})
        run.params({"alpha": 2.0, "steps": 3, "long": "x" * 7000})
        params = run_of(run.id).data.params
        assert params == {"alpha": "1.0", "k": "8", "steps": "3", "long": "x" * 6000}
        # What `params` spares the caller: MLflow itself refuses.
        with pytest.raises(MlflowException):
            mlflow.MlflowClient().log_param(run.id, "alpha", 2.0)


def test_metrics_keep_their_steps_and_leave_out_what_is_not_finite(parent: str):
    with tracking.child_run(parent, "sft", "sft", "key") as run:
        run.metrics({"loss": 3.0, "entropy": math.nan}, step=1)
        run.metrics({"loss": 2.0}, step=2)
        run.metrics({"entropy": math.inf}, step=2)
    history = mlflow.MlflowClient().get_metric_history(run.id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 3.0), (2, 2.0)]
    assert "entropy" not in run_of(run.id).data.metrics


def test_a_data_set_is_an_input_with_its_digest_and_context(parent: str):
    rows = [{"prompt": [{"role": "user", "content": "Write."}], "references": ["One.", "Two."]}]
    with tracking.child_run(parent, "sft", "sft", "key") as run:
        run.dataset(rows, "stories", "d" * 40, "stories.jsonl", "training")
    (entry,) = run_of(run.id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("stories", "d" * 36)
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]


def test_folders_and_tables_reach_the_run(parent: str, tmp_path: Path):
    (tmp_path / "card.md").write_text("# Card")
    with tracking.child_run(parent, "prepare", "prepare", "key") as run:
        run.folder(tmp_path, "data")
        for value in ("a", "b"):
            run.table({"prompt": [value]}, "completions.json", append=True)
            run.table({"prompt": [value]}, "metrics.json")  # a repeated stage logs the same table again
    base = run_of(run.id).info.artifact_uri
    assert mlflow.artifacts.load_text(f"{base}/data/card.md") == "# Card"
    assert mlflow.artifacts.load_dict(f"{base}/completions.json")["data"] == [["a"], ["b"]]
    assert mlflow.artifacts.load_dict(f"{base}/metrics.json")["data"] == [["a"]]


def test_the_last_step_of_a_metric(parent: str):
    with tracking.child_run(parent, "sft", "sft", "key") as run:
        assert run.last_step("train/loss") == 0
        run.metrics({"train/loss": 1.0}, step=4)
        run.metrics({"train/loss": 0.5}, step=7)
        assert run.last_step("train/loss") == 7
