"""Finding an evaluation in MLflow: of a pipeline's run, of a run within it, or of a version of a registered model."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dqo import tracking
from dqo.errors import DQOError
from dqo.mlflow_errors import in_words

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

DEFAULT_MODEL = "dqo"
"""The model of an evaluation where nothing names another."""
LISTED = 5
"""How many of what there is a message names."""
_NAME_TAG = "dqo.name"


@dataclass(frozen=True)
class Located:
    """Where an evaluation is.

    Attributes:
        evaluation: The run that holds `evaluation/evaluation.json` and `evaluation/responses.jsonl`.
        pipeline: The pipeline's run, which holds `recipe.yaml`.
        model: The model of the evaluation that the run it was found from has trained.
    """

    evaluation: "Run"
    pipeline: "Run"
    model: str


def find_run(client: "MlflowClient", given: str, run_id: str) -> "Run":
    """A run by its id.

    Args:
        client: MLflow.
        given: What the user typed, for messages.
        run_id: The id.

    Raises:
        DQOError: If there is none, or it is deleted.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException:
        raise DQOError(f"{given}: MLflow knows no run of this id, and it is no folder; {_runs_there(client)}") from None
    if run.info.lifecycle_stage != "active":
        raise DQOError(f"{given}: this run is deleted in MLflow; restore it or give another one")
    return run


def _runs_there(client: "MlflowClient") -> str:
    """The newest pipeline runs, for a message."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(
        experiments, f"tags.`{tracking.STAGE_TAG}` = 'pipeline'", max_results=LISTED,
        order_by=["attributes.start_time DESC"],
    )  # fmt: skip
    runs = ", ".join(f"{run.info.run_id} ({run.info.run_name})" for run in found)
    return f"the newest pipeline runs are {runs}" if runs else "it holds no pipeline run"


def locate(client: "MlflowClient", given: str, run: "Run") -> Located:
    """Find the evaluation of a pipeline's run, of a run within it, or the run of the evaluation itself.

    Args:
        client: MLflow.
        given: What the user typed, for messages.
        run: The run that it names.

    Raises:
        DQOError: If the run is not one of a pipeline, or the pipeline has not been evaluated.
    """
    stage, parent = run.data.tags.get(tracking.STAGE_TAG), pipeline_of(client, given, run)
    own = stage in ("sft", "rl", "model")
    trained = run.data.tags.get(_NAME_TAG, "").removeprefix("rl-") if own else DEFAULT_MODEL
    return Located(run if stage == "evaluate" else evaluation_of(client, given, parent), parent, trained)


def pipeline_of(client: "MlflowClient", given: str, run: "Run") -> "Run":
    """The pipeline's run that a run belongs to, or is.

    Raises:
        DQOError: If it belongs to none.
    """
    stage = run.data.tags.get(tracking.STAGE_TAG)
    above = run.data.tags.get(tracking.PARENT_TAG)
    parent = run if stage == "pipeline" else None
    if above is not None and stage in ("prepare", "sft", "rl", "model", "evaluate", "register"):
        parent = client.get_run(above)
    if parent is None:
        raise DQOError(
            f"{given}: the run {run.info.run_name!r} ({stage or 'of another program'}) is not one of a pipeline and "
            f"has no evaluation; {_runs_there(client)}"
        )
    return parent


def evaluation_of(client: "MlflowClient", given: str, parent: "Run") -> "Run":
    """The newest finished evaluation of a pipeline's run.

    Raises:
        DQOError: If there is none.
    """
    children = stages_of(client, parent)
    found = [run for run in children if run.data.tags.get(tracking.STAGE_TAG) == "evaluate"]
    finished = [run for run in found if run.info.status == "FINISHED"]
    if not finished:
        state = f"its evaluation is {found[0].info.status}" if found else "it has not been evaluated"
        stages = ", ".join(f"{run.info.run_name} ({run.info.status})" for run in reversed(children)) or "none"
        raise DQOError(
            f"{given}: {state}; stages of the pipeline's run {parent.info.run_name!r}: {stages}. Finish the pipeline "
            f"first, or give another one: {_runs_there(client)}"
        )
    return finished[0]


def stages_of(client: "MlflowClient", parent: "Run") -> list["Run"]:
    """The runs within a pipeline's run, the newest first."""
    return list(
        client.search_runs(
            [parent.info.experiment_id], f"tags.`{tracking.PARENT_TAG}` = '{parent.info.run_id}'",
            order_by=["attributes.start_time DESC"],
        )
    )  # fmt: skip


def download(run: "Run", artifact: str, folder: Path) -> Path | None:
    """Copy one file among a run's artifacts into a folder, under its own name; `None` if it is not there."""
    import mlflow

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        place = mlflow.artifacts.download_artifacts(
            run_id=run.info.run_id, artifact_path=artifact, dst_path=str(folder)
        )
    except (mlflow.exceptions.MlflowException, OSError):
        return None
    # Some stores keep the artifact's folders below the one given.
    return Path(place).rename(folder / Path(artifact).name)


def registered_model(client: "MlflowClient", given: str, name: str) -> "RegisteredModel":
    """A registered model by its name.

    Raises:
        DQOError: If there is none, naming those that there are.
    """
    from mlflow.exceptions import MlflowException

    with in_words(f"look up the registered model {name!r}"):
        try:
            return client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise  # it does not answer, or does not allow this: not a matter of the name
            names = ", ".join(one.name for one in client.search_registered_models(max_results=LISTED)) or "none"
            raise DQOError(f"{given}: MLflow knows no registered model {name!r}; registered are: {names}") from None


def version_of(client: "MlflowClient", given: str, name: str) -> "ModelVersion":
    """A version of a registered model by `NAME/3` or `NAME@alias`.

    Args:
        client: MLflow.
        given: What the user typed, for messages.
        name: The name and the version or alias.

    Raises:
        DQOError: If there is no such model, alias or version, naming those that there are.
    """
    registered, alias = name.rpartition("@")[::2] if "@" in name else (name.rpartition("/")[0], "")
    known = registered_model(client, given, registered)
    if alias:
        if alias not in known.aliases:
            held = ", ".join(f"{key} (version {version})" for key, version in sorted(known.aliases.items())) or "none"
            raise DQOError(f"{given}: {registered} has no alias {alias!r}; its aliases are: {held}")
        number = str(known.aliases[alias])
    else:
        number = name.rpartition("/")[2]
    versions = versions_of(client, registered)
    if number not in versions:
        raise DQOError(
            f"{given}: {registered} has no version {number!r}; its versions are: {', '.join(versions) or 'none'}"
        )
    return versions[number]


def versions_of(client: "MlflowClient", name: str) -> dict[str, "ModelVersion"]:
    """Every version of a registered model by its number, in their order."""
    quote = '"' if "'" in name else "'"
    found = {str(one.version): one for one in client.search_model_versions(f"name = {quote}{name}{quote}")}
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def run_of_version(client: "MlflowClient", given: str, version: "ModelVersion") -> "Run":
    """The run that a version was trained in, or the pipeline's run that its tag names.

    Raises:
        DQOError: If neither is in MLflow.
    """
    from mlflow.exceptions import MlflowException

    for run_id in (version.run_id, version.tags.get("dqo.pipeline_mlflow_run")):
        if run_id:
            try:
                run = client.get_run(run_id)
            except MlflowException:
                continue
            if run.info.lifecycle_stage == "active" and tracking.STAGE_TAG in run.data.tags:
                return run
    raise DQOError(
        f"{given}: version {version.version} of {version.name} names no run of a pipeline that is still in MLflow "
        f"(run {version.run_id or 'none'}), so there is no evaluation of it; expected a version that the stage "
        "`register` has made"
    )
