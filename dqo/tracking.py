"""MLflow: where it is, the pipeline's parent run, and a child run for each stage and variant.

Every stage finds its own child run by the stage's key, so a stage that is repeated or resumed continues the same run
instead of leaving a second one behind.
"""

import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from dqo import __version__
from dqo.errors import DQOError
from dqo.files import write_text
from dqo.mlflow_errors import in_words, public, reason, refused
from dqo.recipe import Recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow reads these once, at import; an unreachable server must fail in seconds, before anything is trained.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

PARENT_TAG = "mlflow.parentRunId"
KEY_TAG = "dqo.stage_key"
STAGE_TAG = "dqo.stage"
DATA_TAG = "dqo.data_digest"
JUDGE_TAG = "dqo.judge"
"""Whether the judge is done with an evaluation: `complete` or `incomplete`; on the runs of recipes with a judge."""
UNCHANGED_TAG = "dqo.unchanged"
KUBEFLOW_TAG = "dqo.kubeflow_run_id"
ERROR_TAG = "dqo.error"
MESSAGE_LENGTH = 2000
KUBEFLOW_VARIABLE = "DQO_KUBEFLOW_RUN"
"""Variable that holds the id of the Kubeflow run in a task on a cluster; it takes no part in Kubeflow's cache key."""


def default_uri(folder: Path) -> str:
    """The sqlite store of a local installation."""
    return f"sqlite:///{(folder / 'mlflow.db').resolve()}"


def run_link(uri: str, experiment: str, run_id: str | None) -> str:
    """Address of a run, or of its experiment, in the page of an MLflow server; empty where `uri` is no server's."""
    if not uri.startswith(("http://", "https://")):
        return ""
    return f"{public(uri).rstrip('/')}/#/experiments/{experiment}" + (f"/runs/{run_id}" if run_id else "")


def check_reachable(uri: str, setting: str = "tracking.uri", done: str = "trained") -> None:
    """Fail now if MLflow does not answer, or does not know the user.

    Args:
        uri: Where it should be.
        setting: What the user corrects.
        done: What has not been done; ends the message.

    Raises:
        DQOError: Naming the URI, what happened and what to do.
    """
    if not uri:
        raise DQOError(
            f"{setting}: not set; expected MLflow's address there, or in MLFLOW_TRACKING_URI where the stages run"
        )
    parsed = urlparse(uri)
    if parsed.scheme in ("http", "https"):
        try:
            port = parsed.port or (443 if parsed.scheme == "https" else 80)
            socket.create_connection((parsed.hostname or "", port), timeout=5).close()
        except (OSError, ValueError) as error:
            raise DQOError(_unreachable(uri, str(error), setting, done)) from None
    elif parsed.scheme == "sqlite":
        folder = Path(uri.removeprefix("sqlite:///")).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DQOError(_unreachable(uri, f"{folder}: {error.strerror}", setting, done)) from None
    elif parsed.scheme.partition("+")[0] not in ("postgresql", "mysql", "mssql", "databricks"):
        raise DQOError(
            f"{setting} {public(uri)!r}: unknown kind of address; expected http(s)://host:port, sqlite:///file.db "
            "or a database URI that MLflow takes"
        )
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it narrates the creation of its tables
    try:
        mlflow.MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow lets database and HTTP errors of many kinds through
        if (words := refused(error, uri)) is not None:
            raise DQOError(f"{setting} {public(uri)!r}: MLflow answers, but {words}. Nothing was {done}.") from None
        raise DQOError(_unreachable(uri, reason(error, uri), setting, done)) from None


def _unreachable(uri: str, why: str, setting: str, done: str) -> str:
    return (
        f"{setting} {public(uri)!r}: MLflow does not answer ({why}); start it, correct {setting} or "
        f"MLFLOW_TRACKING_URI, or leave both out for a local sqlite store. Nothing was {done}."
    )


def client_of(uri: str, done: str, setting: str = "--uri") -> "MlflowClient":
    """Point MLflow at the store that a command was given; returns its client.

    Args:
        uri: Where it should be.
        done: What has not been done where it does not answer; ends the message.
        setting: What the user corrects.

    Raises:
        DQOError: As `check_reachable`.
    """
    check_reachable(uri, setting, done)
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return mlflow.MlflowClient()


def connect(recipe: Recipe, uri: str) -> str:
    """Point MLflow at a store and make sure the experiment exists; returns the experiment id.

    Raises:
        DQOError: If MLflow does not answer or does not let this user in.
    """
    check_reachable(uri)
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with in_words(f"open the experiment {recipe.tracking.experiment!r}"):
        return _experiment(recipe, uri)


def _experiment(recipe: Recipe, uri: str) -> str:
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(recipe.tracking.experiment)
    if experiment is None:
        location = None
        if uri.startswith("sqlite:///"):
            location = (Path(uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts").resolve().as_uri()
        try:
            client.create_experiment(
                recipe.tracking.experiment,
                artifact_location=location,
                # MLflow's page opens on training runs then, not on its view of chat traces.
                tags={"mlflow.experimentKind": "custom_model_development"},
            )
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process may have made it in this moment
                raise
        experiment = client.get_experiment_by_name(recipe.tracking.experiment)
        if experiment is None:
            raise DQOError(f"tracking.experiment {recipe.tracking.experiment!r}: MLflow could not create it")
    if experiment.lifecycle_stage != "active":
        raise DQOError(
            f"tracking.experiment {recipe.tracking.experiment!r}: deleted in MLflow; restore it or name another one"
        )
    return experiment.experiment_id


def check_registered_name(client: "MlflowClient", name: str) -> bool:
    """Find out before anything is trained whether a name in the model registry is free, or already ours.

    Returns:
        Whether there is a registered model of this name.

    Raises:
        DQOError: If it belongs to a prompt, or to models that other programs have made.
    """
    from mlflow.exceptions import MlflowException

    taken = f"registry.name {name!r}: taken in MLflow by {{}}; give another name"
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        if client.get_prompt(name) is not None:  # prompts share the names, and are not found as models
            raise DQOError(taken.format("a prompt")) from None
        return False
    versions = client.search_model_versions(f"name = '{name}'")
    if versions and not any(KEY_TAG in version.tags for version in versions):
        numbers = ", ".join(sorted((str(version.version) for version in versions), key=int)[:5])
        raise DQOError(taken.format(f"models of another program (versions {numbers}; dqo has made none of them)"))
    return True


def finished_run(recipe: Recipe, experiment_id: str, data_digest: str) -> str | None:
    """The newest pipeline run of a recipe and its data that has finished, None where there is none.

    The run is marked with the Kubeflow run, or else the time, that has found it: its exit handler then knows that there
    is no other run to end.

    Args:
        recipe: The recipe.
        experiment_id: MLflow's experiment.
        data_digest: Digest of the data card.
    """
    import mlflow

    client = mlflow.MlflowClient()
    found = client.search_runs(
        [experiment_id],
        f"tags.`{STAGE_TAG}` = 'pipeline' and tags.`dqo.recipe_digest` = '{recipe.digest}' and "
        f"tags.`{DATA_TAG}` = '{data_digest}' and attributes.status = 'FINISHED'",
        order_by=["attributes.end_time DESC"],
    )
    # Where the judge was away something is left to do. MLflow cannot search for runs without a tag.
    done = [run for run in found if run.data.tags.get(JUDGE_TAG) != "incomplete"]
    if not done:
        return None
    run_id: str = done[0].info.run_id
    by = os.environ.get(KUBEFLOW_VARIABLE) or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    client.set_tag(run_id, UNCHANGED_TAG, by)
    return run_id


def open_parent(recipe: Recipe, experiment_id: str, workspace: Path, data_digest: str | None = None) -> str:
    """Return the run that all stages of one pipeline run belong to, creating it on the first call.

    Kubeflow Pipelines' MLflow plugin injects MLFLOW_RUN_ID: then that run is the parent. Else the id is remembered in
    the workspace by recipe digest, so that repeating an interrupted pipeline continues the same run.

    Args:
        recipe: The recipe.
        experiment_id: MLflow's experiment.
        workspace: Folder that outlives the run.
        data_digest: Where it is known already: a remembered run with other data is not continued.

    Raises:
        DQOError: If MLflow does not answer, or does not allow it.
    """
    with in_words("open the pipeline's run"):
        return _parent(recipe, experiment_id, workspace, data_digest)


def _parent(recipe: Recipe, experiment_id: str, workspace: Path, data_digest: str | None) -> str:
    import mlflow

    client = mlflow.MlflowClient()
    memory = workspace / "runs" / f"{recipe.name}-{recipe.digest}.json"
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id is None and memory.is_file():
        remembered = json.loads(memory.read_text(encoding="utf-8"))["run_id"]
        if is_active(client, remembered):
            known = client.get_run(remembered).data.tags.get(DATA_TAG)
            run_id = remembered if data_digest is None or known in (None, data_digest) else None
    if run_id is None:
        run_id = client.create_run(experiment_id, run_name=recipe.name, tags={STAGE_TAG: "pipeline"}).info.run_id
        write_text(memory, json.dumps({"run_id": run_id}) + "\n")
    client.update_run(run_id, status="RUNNING")
    for key, value in (recipe_tags(recipe) | kubeflow_tags()).items():
        client.set_tag(run_id, key, value)
    client.log_text(run_id, recipe.to_yaml(), "recipe.yaml")
    return run_id


def recipe_tags(recipe: Recipe) -> dict[str, str]:
    """Tags by which a pipeline's run is found."""
    return {
        "dqo.recipe": recipe.name,
        "dqo.recipe_digest": recipe.digest,
        "dqo.task": recipe.task,
        "dqo.version": __version__,
    }


def kubeflow_tags() -> dict[str, str]:
    """Tag of the Kubeflow run that this task belongs to; empty where it belongs to none."""
    run = os.environ.get(KUBEFLOW_VARIABLE, "")
    return {KUBEFLOW_TAG: run} if run else {}


def is_active(client: Any, run_id: str) -> bool:
    """Whether a run is there and not deleted; an error that says nothing about it, such as no answer, is raised."""
    import mlflow

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


class Run:
    """A thin handle on one MLflow run: logs by id, so that no global "active run" is involved.

    Each method raises a `DQOError` in words where MLflow, its database or its artifact store refuses or is away.

    Attributes:
        id: The run's id.
        new: Whether this call has made it; False when an earlier call's run is continued.
    """

    def __init__(self, run_id: str, new: bool = False) -> None:
        import mlflow

        self.id = run_id
        self.new = new
        self._client = mlflow.MlflowClient()

    @in_words("log parameters")
    def params(self, values: dict[str, Any]) -> None:
        """Log parameters; those already logged with the same value are left alone (MLflow refuses a change)."""
        from mlflow.entities import Param

        known = self._client.get_run(self.id).data.params
        new = [Param(key, str(value)[:6000]) for key, value in values.items() if key not in known]
        if new:
            self._client.log_batch(self.id, params=new)

    @in_words("log metrics")
    def metrics(self, values: dict[str, float], step: int = 0) -> None:
        """Log finite metrics of one step in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(key, float(value), now, step) for key, value in values.items() if math.isfinite(value)]
        if entries:
            self._client.log_batch(self.id, metrics=entries)

    @in_words("set tags")
    def tags(self, values: dict[str, Any]) -> None:
        """Set tags in one request: a server with passwords checks them anew for each."""
        from mlflow.entities import RunTag

        if values:
            self._client.log_batch(self.id, tags=[RunTag(key, str(value)) for key, value in values.items()])

    def folder(self, path: Path, artifact_path: str) -> None:
        """Upload a folder's files."""
        with in_words(f"upload {path.name!r} as {artifact_path!r}", self.id):
            self._client.log_artifacts(self.id, str(path), artifact_path)

    @in_words("read metrics")
    def last_step(self, metric: str) -> int:
        """Newest step at which a metric was logged, 0 where it was not."""
        return max((entry.step for entry in self._client.get_metric_history(self.id, metric)), default=0)

    def table(self, columns: dict[str, list[Any]], name: str, append: bool = False) -> None:
        """Log a table that MLflow's page shows.

        Args:
            columns: Column name -> values.
            name: File name, ends in `.json`.
            append: Add the rows to a table of that name; without it, an existing one is left as it is, since a stage
                that is repeated would log the same rows again.
        """
        with in_words(f"log the table {name!r}", self.id):
            if append or not any(item.path == name for item in self._client.list_artifacts(self.id)):
                self._client.log_table(self.id, columns, name)

    def figure(self, figure: Any, name: str) -> None:
        """Log a matplotlib figure."""
        with in_words(f"log the figure {name!r}", self.id):
            self._client.log_figure(self.id, figure, name)

    @in_words("log the data set")
    def dataset(self, rows: list[dict[str, Any]], name: str, digest: str, source: str, context: str) -> None:
        """Attach a data set (by its digest and schema) as an input of the run."""
        import pandas
        from mlflow.data.pandas_dataset import from_pandas
        from mlflow.entities import DatasetInput, InputTag

        frame = pandas.DataFrame(
            {
                "prompt": [row["prompt"][-1]["content"] for row in rows],
                "references": ["\n".join(row["references"]) for row in rows],
            }
        )
        dataset = from_pandas(frame, source=source, name=name, digest=digest[:36])
        self._client.log_inputs(
            self.id,
            datasets=[
                DatasetInput(dataset=dataset._to_mlflow_entity(), tags=[InputTag("mlflow.data.context", context)])
            ],
        )

    @in_words("end the run")
    def finish(self, status: str = "FINISHED") -> None:
        """End the run with a status."""
        self._client.set_terminated(self.id, status)


@contextmanager
def child_run(parent_id: str, name: str, stage: str, key: str) -> Iterator[Run]:
    """Start or continue the child run of one stage; ends it as FINISHED, KILLED or FAILED.

    The pipeline's run shares an unhappy end; `register`, the last stage, finishes it.

    Args:
        parent_id: The pipeline's run.
        name: What the page shows, e.g. `rl-dqo`.
        stage: Value of the tag `dqo.stage`.
        key: The stage's key; with the name it identifies the run to continue.

    Raises:
        DQOError: If MLflow does not answer, or does not allow it.
    """
    with in_words(f"open the run of {name!r}"):
        run = _child(parent_id, name, stage, key)
    try:
        yield run
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        for ended in (run, Run(parent_id)):
            with suppress(DQOError):  # that MLflow is away may be the error itself
                ended.finish(status)
        with suppress(DQOError):
            run.tags({ERROR_TAG: (str(error) or type(error).__name__)[:MESSAGE_LENGTH]})
        raise
    run.finish()


def _child(parent_id: str, name: str, stage: str, key: str) -> Run:
    import mlflow

    client = mlflow.MlflowClient()
    experiment_id = client.get_run(parent_id).info.experiment_id
    found = client.search_runs(
        [experiment_id],
        f"tags.`{PARENT_TAG}` = '{parent_id}' and tags.`{KEY_TAG}` = '{key}' and tags.`dqo.name` = '{name}'",
        max_results=1,
    )
    if found:
        run = Run(found[0].info.run_id)
        client.update_run(run.id, status="RUNNING")
        client.update_run(parent_id, status="RUNNING")
        if ERROR_TAG in found[0].data.tags:
            client.delete_tag(run.id, ERROR_TAG)
    else:
        tags = {PARENT_TAG: parent_id, KEY_TAG: key, STAGE_TAG: stage, "dqo.name": name}
        run = Run(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id, new=True)
    for handle in (run, Run(parent_id)):  # an earlier Kubeflow run may have made them
        handle.tags(kubeflow_tags())
    return run
