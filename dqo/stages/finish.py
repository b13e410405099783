"""Exit handler: the pipeline's MLflow run says how the pipeline ended, whatever happened."""

import os
from typing import Any

from dqo import tracking
from dqo.stages.context import Context
from dqo.tracking import (
    ERROR_TAG,
    KUBEFLOW_TAG,
    KUBEFLOW_VARIABLE,
    MESSAGE_LENGTH,
    PARENT_TAG,
    STAGE_TAG,
    UNCHANGED_TAG,
)

STATE_TAG = "dqo.state"
FAILED_TASK_TAG = "dqo.failed_task"
_STATUS = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELLED": "KILLED"}
_SILENT = "ended without a word: its pod was evicted, ran out of memory or was killed"


def run(context: Context, state: str, task: str = "", message: str = "") -> list[str]:
    """Write a pipeline's final state to its MLflow run, and end what its tasks have left open.

    The run is the one that carries the Kubeflow run's id. Where the id is not known, it is every run of the recipe that
    is still open. Where none was opened and the pipeline did not succeed, one is made, so that the failure is seen.

    Args:
        context: The pipeline run.
        state: `SUCCEEDED`, `FAILED` or `CANCELLED`. Another state is what Kubeflow says of a pipeline whose loop has
            not told it how it ended (kubeflow/pipelines#13321); MLflow's runs decide then.
        task: Kubeflow's name of what failed.
        message: Kubeflow's message.

    Returns:
        Ids of the runs that were written to.

    Raises:
        DQOError: If MLflow does not answer.
    """
    import mlflow

    recipe = context.recipe
    experiment = tracking.connect(recipe, context.mlflow_uri)
    client = mlflow.MlflowClient()
    kubeflow = os.environ.get(KUBEFLOW_VARIABLE) or None
    which = (
        f"tags.`{KUBEFLOW_TAG}` = '{kubeflow}'"
        if kubeflow
        else f"tags.`dqo.recipe_digest` = '{recipe.digest}' and attributes.status = 'RUNNING'"
    )
    parents = list(client.search_runs([experiment], f"tags.`{STAGE_TAG}` = 'pipeline' and {which}"))
    if not parents and state not in _STATUS and kubeflow:
        unchanged = f"tags.`{UNCHANGED_TAG}` = '{kubeflow}'"
        if client.search_runs([experiment], unchanged, max_results=1):
            return []  # it stopped after preparation, on purpose
    if not parents and state != "SUCCEEDED":
        tags = {STAGE_TAG: "pipeline"} | tracking.recipe_tags(recipe) | tracking.kubeflow_tags()
        parents = [client.create_run(experiment, run_name=recipe.name, tags=tags)]
    for parent in parents:
        _close(client, parent, kubeflow, state, task, message)
    return [parent.info.run_id for parent in parents]


def _close(client: Any, parent: Any, kubeflow: str | None, state: str, task: str, message: str) -> None:
    """End a pipeline's run and its stages', and say in tags what happened."""
    run_id = parent.info.run_id
    which = f" and tags.`{KUBEFLOW_TAG}` = '{kubeflow}'" if kubeflow else ""
    stages = client.search_runs([parent.info.experiment_id], f"tags.`{PARENT_TAG}` = '{run_id}'{which}")
    silent = [stage for stage in stages if stage.info.status == "RUNNING"]
    failed = [stage for stage in stages if stage.info.status == "FAILED"]
    if state not in _STATUS:
        if silent or failed:
            state = "FAILED"
        elif any(stage.info.status == "KILLED" for stage in stages):
            state = "CANCELLED"
        else:  # `register` ends the run of a pipeline that has reached it
            state = "SUCCEEDED" if parent.info.status == "FINISHED" else "FAILED"
    for stage in silent:
        client.set_terminated(stage.info.run_id, "KILLED" if state == "CANCELLED" else "FAILED")
        client.set_tag(stage.info.run_id, ERROR_TAG, _SILENT)
    if parent.info.status != _STATUS[state]:
        client.set_terminated(run_id, _STATUS[state])
    client.set_tag(run_id, STATE_TAG, state)
    told: dict[str, str] = {}
    if state != "SUCCEEDED":
        names = {stage.data.tags.get("dqo.name", ""): stage.data.tags.get(ERROR_TAG, "") for stage in failed}
        names |= {stage.data.tags.get("dqo.name", ""): _SILENT for stage in silent}
        told[FAILED_TASK_TAG] = ", ".join(names) or task
        told[ERROR_TAG] = "; ".join(filter(None, names.values())) or message
    for tag in (FAILED_TASK_TAG, ERROR_TAG):
        if told.get(tag):
            client.set_tag(run_id, tag, told[tag][:MESSAGE_LENGTH])
        elif tag in parent.data.tags:
            client.delete_tag(run_id, tag)
