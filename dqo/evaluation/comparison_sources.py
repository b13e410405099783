"""Where the models of a comparison come from: an MLflow run, a version or alias of a registered model, or a folder."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dqo import tracking
from dqo.errors import DQOError
from dqo.evaluation import runs
from dqo.evaluation.comparison import Conditions, Evaluated, evaluated
from dqo.evaluation.figures import styles
from dqo.files import read_jsonl

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


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
        client = tracking.client_of(uri, "compared")
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
    return _from_run(client, given, runs.find_run(client, given, name), model, None)


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
        held = sorted(path.name for path in folder.iterdir())[: runs.LISTED]
        raise DQOError(
            f"{given}: the folder holds no evaluation ({', '.join(held) or 'it is empty'}); expected evaluation.json, "
            "or a folder `runs/NAME-DIGEST` of a finished `dqo run`"
        )
    recipe = folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    one = _read(given, place, model or runs.DEFAULT_MODEL, str(place), text)
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


def _from_run(client: "MlflowClient", given: str, run: "Run", model: str, name: str | None) -> _Found:
    """Read the evaluation that a run leads to.

    Args:
        client: MLflow.
        given: What the user typed.
        run: The run that it names.
        model: The model of that evaluation; empty for the one that the run has trained.
        name: What to call it; `None` for a name made of the run's.
    """
    located = runs.locate(client, given, run)
    evaluation, parent = located.evaluation, located.pipeline
    with tempfile.TemporaryDirectory() as folder:
        for file in ("evaluation.json", "responses.jsonl"):
            if runs.download(evaluation, f"evaluation/{file}", Path(folder)) is None:
                raise DQOError(f"{given}: the run {evaluation.info.run_id} holds no artifact `evaluation/{file}`")
        recipe = runs.download(parent, "recipe.yaml", Path(folder))
        text = recipe.read_text(encoding="utf-8") if recipe is not None else None
        one = _read(given, Path(folder), model or located.model, f"of MLflow run {evaluation.info.run_id}", text)
    one = replace(one, run_id=evaluation.info.run_id)
    if name is not None:
        label = f"{name}:{model}" if model and model != located.model else name
        return _Found(one, (label, given), parent.info.experiment_id)
    names = _names(one.model, parent.info.run_name or given, evaluation.info.run_id[:6])
    return _Found(one, names, parent.info.experiment_id)


def _from_version(client: "MlflowClient", given: str, name: str, model: str) -> _Found:
    version = runs.version_of(client, given, name)
    run = runs.run_of_version(client, given, version)
    return _from_run(client, given, run, model, f"{version.name}/{version.version}")


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
