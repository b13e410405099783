"""The whole pipeline from the command line, against the server with passwords."""

import mlflow
import pandas
import pytest
from pipeline.tiny_runs import STAGES, run, started, write_recipe
from pipeline.tiny_runs import events as events_of
from services.servers import Server

from dqo import registry


@pytest.mark.slow
def test_a_pipeline_runs_is_registered_and_leaves_no_password(
    administrator: Server, tiny_policy, tiny_encoder, tmp_path
):
    tracking = {"uri": administrator.uri, "experiment": "pipeline"}
    recipe = write_recipe(
        tmp_path / "tiny.yaml", tiny_policy, tiny_encoder, tracking=tracking, registry={"name": "tiny-server"}
    )
    out = tmp_path / "runs"
    done = run(recipe, out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert started(events_of(out)) == STAGES
    assert f"{administrator.uri}/#/experiments/" in done.stdout

    mlflow.set_tracking_uri(administrator.uri)
    mlflow.set_registry_uri(administrator.uri)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("pipeline")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(STAGES) <= set(runs)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = next(run for run in runs.values() if run.data.tags["dqo.stage"] == "pipeline")
    assert all(runs[name].data.tags["mlflow.parentRunId"] == parent.info.run_id for name in STAGES)
    evaluation = {entry.path for entry in client.list_artifacts(runs["evaluate"].info.run_id, "evaluation")}
    assert {"evaluation/evaluation.json", "evaluation/report.html"} <= evaluation

    version = client.get_model_version_by_alias("tiny-server", "challenger")
    assert version.tags["dqo.pipeline_mlflow_run"] == parent.info.run_id
    groups = registry.load("tiny-server@challenger").predict(
        pandas.DataFrame({"prompt": ["Write about rain."]}), params={"n": 2, "max_new_tokens": 4}
    )
    assert [len(group) for group in groups] == [2]

    for path in (path for path in out.rglob("*") if path.is_file()):
        assert administrator.password.encode() not in path.read_bytes(), path
