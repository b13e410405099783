"""The exit handler against a real MLflow store: every way a pipeline can end."""

import json
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from dqo import tracking
from dqo.errors import DQOError
from dqo.recipe import Recipe, parse
from dqo.stages import finish
from dqo.stages.context import Context


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return tracking.default_uri(tmp_path_factory.mktemp("store"))


class Pipeline:
    """What the stages of one pipeline would do to MLflow."""

    def __init__(self, store: str, folder: Path, name: str) -> None:
        self.recipe: Recipe = parse(f"name: {name}")
        self.context = Context(self.recipe, folder, store)
        self.experiment = tracking.connect(self.recipe, store)
        self.client = mlflow.MlflowClient(store)
        self.parent = ""

    def prepare(self) -> None:
        self.parent = tracking.open_parent(self.recipe, self.experiment, self.context.workspace)
        self.stage("prepare")

    def stage(self, name: str, error: BaseException | None = None) -> None:
        try:
            with tracking.child_run(self.parent, name, name, "key"):
                if error is not None:
                    raise error
        except BaseException as raised:
            if raised is not error:
                raise

    def killed(self, name: str) -> str:
        """A stage whose process was killed: nobody ends its run."""
        tags = {tracking.PARENT_TAG: self.parent, "dqo.name": name, **tracking.kubeflow_tags()}
        return self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id

    def ended(self) -> tuple[str, dict[str, str]]:
        run = self.client.get_run(self.parent)
        names = {"dqo.state": "state", "dqo.failed_task": "task", "dqo.error": "error"}
        return run.info.status, {short: run.data.tags[tag] for tag, short in names.items() if tag in run.data.tags}


@pytest.fixture
def pipeline(store, tmp_path, request, monkeypatch) -> Pipeline:
    name = request.node.name.replace("_", "-").split("[")[0][5:50].strip("-")
    monkeypatch.setenv(tracking.KUBEFLOW_VARIABLE, f"run-of-{name}")
    return Pipeline(store, tmp_path, name)


def test_a_failure_names_task_and_reason(pipeline):
    pipeline.prepare()
    pipeline.stage("sft", ValueError("the loss is not finite"))
    assert finish.run(pipeline.context, "FAILED", "exit-handler-1", "a generic word") == [pipeline.parent]
    assert pipeline.ended() == ("FAILED", {"state": "FAILED", "task": "sft", "error": "the loss is not finite"})


def test_a_killed_pod_leaves_nothing_running(pipeline):
    pipeline.prepare()
    left = pipeline.killed("rl-dqo")
    finish.run(pipeline.context, "FAILED", "exit-handler-1", "")
    assert pipeline.client.get_run(left).info.status == "FAILED"
    status, tags = pipeline.ended()
    assert (status, tags["task"]) == ("FAILED", "rl-dqo") and "out of memory" in tags["error"]


def test_a_failure_outside_of_all_stages_keeps_kubeflows_words(pipeline):
    pipeline.prepare()
    finish.run(pipeline.context, "FAILED", "dqo-sft", "ImagePullBackOff")
    assert pipeline.ended() == ("FAILED", {"state": "FAILED", "task": "dqo-sft", "error": "ImagePullBackOff"})


def test_mlflow_learns_of_the_end_where_training_jobs_cannot_be_looked_for(pipeline, monkeypatch):
    """Jobs go first, for the sake of their GPUs; here is no cluster to ask."""
    from components.finish.component import finish as component

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    pipeline.prepare()
    content = {
        "name": pipeline.recipe.name,
        "distributed": {"nodes": 2, "processes": 2},
        "resources": {"workspace_claim": "w"},
    }
    recipe = parse(json.dumps(content))
    status = SimpleNamespace(state="CANCELLED", pipeline_task_name="rl", error_message="")
    with pytest.raises(DQOError, match="several nodes train on a cluster only"):
        component.python_func(recipe.to_json(), str(pipeline.context.workspace), pipeline.context.mlflow_uri, status)
    assert pipeline.ended()[0] == "KILLED"


def test_cancelled(pipeline):
    pipeline.prepare()
    left = pipeline.killed("sft")
    finish.run(pipeline.context, "CANCELLED")
    assert pipeline.client.get_run(left).info.status == "KILLED"
    assert pipeline.ended()[0] == "KILLED"


def test_success_ends_a_run_that_was_left_open(pipeline):
    """As where `register` came from Kubeflow's cache, or the pipeline stopped after preparation."""
    pipeline.prepare()
    assert pipeline.ended()[0] == "RUNNING"
    finish.run(pipeline.context, "SUCCEEDED")
    assert pipeline.ended() == ("FINISHED", {"state": "SUCCEEDED"})


def test_a_repeat_that_succeeds_takes_the_old_failure_back(pipeline):
    pipeline.prepare()
    pipeline.stage("sft", ValueError("no"))
    finish.run(pipeline.context, "FAILED")
    pipeline.prepare()
    pipeline.stage("sft")
    finish.run(pipeline.context, "SUCCEEDED")
    assert pipeline.ended() == ("FINISHED", {"state": "SUCCEEDED"})
    (sft,) = [
        run
        for run in pipeline.client.search_runs(
            [pipeline.experiment], f"tags.`mlflow.parentRunId` = '{pipeline.parent}'"
        )
        if run.data.tags["dqo.name"] == "sft"
    ]
    assert "dqo.error" not in sft.data.tags


@pytest.mark.parametrize(
    ("what", "status", "state"),
    [
        ("fails", "FAILED", "FAILED"),
        ("is interrupted", "KILLED", "CANCELLED"),
        ("ends", "FINISHED", "SUCCEEDED"),
        ("never begins", "FAILED", "FAILED"),
    ],
)
def test_kubeflow_does_not_know_how_it_ended(store, tmp_path, monkeypatch, what: str, status: str, state: str):
    """A loop's state may not reach the handler: kubeflow/pipelines#13321."""
    monkeypatch.setenv(tracking.KUBEFLOW_VARIABLE, f"unknown-{status}-{what}")
    pipeline = Pipeline(store, tmp_path, f"unknown-{what.replace(' ', '-')}")
    pipeline.prepare()
    if what == "ends":
        pipeline.client.set_terminated(pipeline.parent, "FINISHED")
    elif what != "never begins":
        pipeline.stage("rl-dqo", ValueError("no") if what == "fails" else KeyboardInterrupt())
    finish.run(pipeline.context, "RUNNING")
    assert pipeline.ended()[0] == status and pipeline.ended()[1]["state"] == state


def test_other_runs_of_the_recipe_are_left_alone(store, tmp_path, monkeypatch):
    """Two runs at once, each with a workspace of its own: one fails, the other trains on."""
    both = []
    for number in ("1", "2"):
        monkeypatch.setenv(tracking.KUBEFLOW_VARIABLE, f"at-once-{number}")
        both.append(Pipeline(store, tmp_path / number, "at-once"))
        both[-1].prepare()
    finish.run(both[1].context, "FAILED")
    assert [pipeline.ended()[0] for pipeline in both] == ["RUNNING", "FAILED"]


def test_a_failure_before_anything_was_opened_is_seen(pipeline):
    """Preflight fails: no stage has opened a run."""
    (made,) = finish.run(pipeline.context, "FAILED", "preflight", "no such Secret")
    pipeline.parent = made
    assert pipeline.ended() == ("FAILED", {"state": "FAILED", "task": "preflight", "error": "no such Secret"})


def test_a_run_whose_tasks_all_came_from_the_cache_writes_nothing(pipeline):
    assert finish.run(pipeline.context, "SUCCEEDED") == []


def test_without_kubeflows_id_every_open_run_of_the_recipe_is_ended(store, tmp_path, monkeypatch):
    monkeypatch.delenv(tracking.KUBEFLOW_VARIABLE, raising=False)
    ours, other = Pipeline(store, tmp_path / "a", "without-id"), Pipeline(store, tmp_path / "b", "another-recipe")
    ours.prepare()
    other.prepare()
    assert finish.run(ours.context, "FAILED") == [ours.parent]
    assert (ours.ended()[0], other.ended()[0]) == ("FAILED", "RUNNING")
