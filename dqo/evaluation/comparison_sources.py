"""Where the models of a comparison come from: an MLflow run, a version or alias of a registered model, or a folder."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dqo import tracking
from dqo.errors import DQOError
from dqo.evaluation.comparison import Conditions, Evaluated, evaluated
from dqo.evaluation.figures import styles
from dqo.files import read_jsonl

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

DEFAULT_MODEL = "dqo"
_LISTED = 5
_NAME_TAG = "dqo.name"


@dataclass(frozen=True)
class _Found:
    """A model before the labels are known."""

    model: Evaluated
    names: tuple[str, ...]
    """What it may be called, the shortest first; the last one belongs to no other."""
    experiment: str | None = None


def load(given: Sequence[str], uri: str | None) -> tuple[list[Evaluated], str | None]:
    """Read the evaluations of what was given.

    Args:
        given: Names as documented in docs/comparison.md.
        uri: MLflow's address; `None` if there is none, which serves folders only.

    Returns:
        The models in the order given, each with a label of its own, and the id of the MLflow experiment of the first
        that has one.

    Raises:
        DQOError: Naming what was given and what there is.
    """
    client = None
    if uri is not None:
        import mlflow

        tracking.check_reachable(uri, "--uri", "compared")
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = mlflow.MlflowClient()
    found = [_load(client, one, uri) for one in given]
    experiments = [one.experiment for one in found if one.experiment is not None]
    return _labelled(found), experiments[0] if experiments else None


def _labelled(found: Sequence[_Found]) -> list[Evaluated]:
    """Give each model the shortest kind of name under which no two are the same."""
    for level in range(max(len(one.names) for one in found)):
        labels = [one.names[min(level, len(one.names) - 1)] for one in found]
        if len(set(labels)) == len(labels):
            break
    return [replace(one.model, label=label) for one, label in zip(found, labels, strict=True)]


def _load(client: "MlflowClient | None", given: str, uri: str | None) -> _Found:
    local = _folder(given)
    if local is not None:
        return _from_folder(given, *local, uri)
    if client is None:
        raise DQOError(
            f"{given}: no such folder, and no MLflow store to look in; give its folder with --out or its address with "
            "--uri"
        )
    name, _, model = given.removeprefix("models:/").partition(":")
    if "@" in name or "/" in name:
        return _from_version(client, given, name, model)
    return _from_run(client, given, _run(client, given, name), model, None)


# --- a folder ---


def _folder(given: str) -> tuple[Path, str] | None:
    """The folder and the model that a name means."""
    path, colon, model = given.rpartition(":")
    for folder, name in ((given, ""), (path, model if colon else "")):
        if folder and Path(folder).is_dir():
            return Path(folder), name
    return None


def _from_folder(given: str, folder: Path, model: str, uri: str | None) -> _Found:
    """Read a folder of `dqo run`, or one with evaluation.json and responses.jsonl."""
    places = [folder / "evaluation.json", folder / "evaluation" / "evaluation.json"]
    # Kubeflow's runner names its folders by time.
    places += sorted(folder.glob("artifacts/*/evaluate/evaluation/evaluation.json"), reverse=True)
    place = next((path.parent for path in places if path.is_file()), None)
    if place is None:
        held = sorted(path.name for path in folder.iterdir())[:_LISTED]
        raise DQOError(
            f"{given}: the folder holds no evaluation ({', '.join(held) or 'it is empty'}); expected evaluation.json, "
            "or a folder `runs/NAME-DIGEST` of a finished `dqo run`"
        )
    recipe = folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    one = _read(given, place, model or DEFAULT_MODEL, str(place), text)
    return _Found(one, _names(one.model, folder.resolve().name, given), _experiment_of(folder, uri))


def _experiment_of(folder: Path, uri: str | None) -> str | None:
    """The MLflow experiment of a folder of `dqo run`, if it is in this store."""
    result = folder / "result.json"
    try:
        content = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        same_store = uri is not None and content["mlflow_uri"] == tracking.public(uri)
        return content["mlflow_experiment"] if same_store else None
    except (ValueError, KeyError, TypeError):
        return None


# --- MLflow ---


def _run(client: "MlflowClient", given: str, run_id: str) -> "Run":
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
        experiments, f"tags.`{tracking.STAGE_TAG}` = 'pipeline'", max_results=_LISTED,
        order_by=["attributes.start_time DESC"],
    )  # fmt: skip
    runs = ", ".join(f"{run.info.run_id} ({run.info.run_name})" for run in found)
    return f"the newest pipeline runs are {runs}" if runs else "it holds no pipeline run"


def _from_run(client: "MlflowClient", given: str, run: "Run", model: str, name: str | None) -> _Found:
    """Find the evaluation of a pipeline's run, of a run within it, or the run of the evaluation itself.

    Args:
        client: MLflow.
        given: What the user typed.
        run: The run that it names.
        model: The model of that evaluation; empty for the one that the run has trained.
        name: What to call it; `None` for a name made of the run's.
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
    evaluation = run if stage == "evaluate" else _evaluation_of(client, given, parent)
    own = stage in ("sft", "rl", "model")
    trained = run.data.tags.get(_NAME_TAG, "").removeprefix("rl-") if own else DEFAULT_MODEL
    with tempfile.TemporaryDirectory() as folder:
        for file in ("evaluation.json", "responses.jsonl"):
            if _download(evaluation, f"evaluation/{file}", Path(folder)) is None:
                raise DQOError(f"{given}: the run {evaluation.info.run_id} holds no artifact `evaluation/{file}`")
        recipe = _download(parent, "recipe.yaml", Path(folder))
        text = recipe.read_text(encoding="utf-8") if recipe is not None else None
        one = _read(given, Path(folder), model or trained, f"of MLflow run {evaluation.info.run_id}", text)
    one = replace(one, run_id=evaluation.info.run_id)
    if name is not None:
        label = f"{name}:{model}" if model and model != trained else name
        return _Found(one, (label, given), parent.info.experiment_id)
    names = _names(one.model, parent.info.run_name or given, evaluation.info.run_id[:6])
    return _Found(one, names, parent.info.experiment_id)


def _evaluation_of(client: "MlflowClient", given: str, parent: "Run") -> "Run":
    """The newest finished evaluation of a pipeline's run."""
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`{tracking.PARENT_TAG}` = '{parent.info.run_id}'",
        order_by=["attributes.start_time DESC"],
    )  # fmt: skip
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


def _download(run: "Run", artifact: str, folder: Path) -> Path | None:
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


def _from_version(client: "MlflowClient", given: str, name: str, model: str) -> _Found:
    from mlflow.exceptions import MlflowException

    registered, alias = name.rpartition("@")[::2] if "@" in name else (name.rpartition("/")[0], "")
    try:
        known = client.get_registered_model(registered)
    except MlflowException:
        names = ", ".join(one.name for one in client.search_registered_models(max_results=_LISTED)) or "none"
        raise DQOError(f"{given}: MLflow knows no registered model {registered!r}; registered are: {names}") from None
    if alias:
        if alias not in known.aliases:
            held = ", ".join(f"{key} (version {version})" for key, version in sorted(known.aliases.items())) or "none"
            raise DQOError(f"{given}: {registered} has no alias {alias!r}; its aliases are: {held}")
        number = str(known.aliases[alias])
    else:
        number = name.rpartition("/")[2]
    versions = {str(one.version): one for one in client.search_model_versions(f"name = '{registered}'")}
    if number not in versions:
        there = ", ".join(sorted(versions, key=int)) or "none"
        raise DQOError(f"{given}: {registered} has no version {number!r}; its versions are: {there}")
    run = _run_of_version(client, given, versions[number])
    return _from_run(client, given, run, model, f"{registered}/{number}")


def _run_of_version(client: "MlflowClient", given: str, version: "ModelVersion") -> "Run":
    """The run that a version was trained in, or the pipeline's run that its tag names."""
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


# --- both ---


def _read(given: str, place: Path, model: str, where: str, recipe: str | None) -> Evaluated:
    try:
        document = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))
        rows = read_jsonl(place / "responses.jsonl")
    except FileNotFoundError as error:
        raise DQOError(f"{given}: the evaluation {where} lacks {Path(error.filename).name}") from None
    except (ValueError, OSError) as error:
        raise DQOError(f"{given}: the evaluation {where} cannot be read ({error})") from None
    return replace(evaluated(document, rows, model, given, where), conditions=_conditions(recipe))


def _conditions(recipe: str | None) -> Conditions | None:
    """What evaluations must share, from a recipe's text; read loosely, since an older version may have written it."""
    try:
        content: Any = yaml.safe_load(recipe) if recipe else None
        return Conditions(
            reward=(content["task"], content.get("reward")),
            encoder=content["encoder"],
            sampling=content["evaluation"]["sampling"],
        )
    except (yaml.YAMLError, KeyError, TypeError):
        return None


def _names(model: str, run: str, unique: str) -> tuple[str, ...]:
    label = styles([model])[model].label
    return label, run, f"{label} of {run}", f"{label} of {run} ({unique})"
