"""The MLflow model registry: versions with their lineage, aliases, loading."""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqo import __version__, alias_trail, promotion, tracking
from dqo.alias_trail import CHALLENGER
from dqo.checkpoint import CheckpointCard
from dqo.evaluation.runs import versions_of
from dqo.gate import GateResult
from dqo.mlflow_errors import in_words

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def log_model(run_id: str, checkpoint: Path, name: str, readme: str | None = None) -> str:
    """Log a checkpoint as a loadable MLflow model on its training run; returns the model's URI.

    The model holds the adapter and names its base model and revision; nothing is pickled.

    Args:
        run_id: The training run.
        checkpoint: Folder of the checkpoint.
        name: The logged model's name.
        readme: Its card, which becomes README.md beside the weights; `None` leaves what the checkpoint holds.

    Raises:
        DQOError: If the folder is no checkpoint; if MLflow or its artifact store does not take it.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.string, "responses")]),
        params=ParamSchema(
            [
                ParamSpec("n", DataType.long, 8),
                ParamSpec("temperature", DataType.double, 1.0),
                ParamSpec("top_p", DataType.double, 1.0),
                ParamSpec("max_new_tokens", DataType.long, 64),
                ParamSpec("seed", DataType.long, 0),
            ]
        ),
    )
    card = CheckpointCard.read(checkpoint)
    with (
        in_words(f"log the model {name!r}", run_id),
        _with_readme(checkpoint, readme) as folder,
        mlflow.start_run(run_id=run_id),
    ):
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(Path(__file__).with_name("serving.py")),
            artifacts={"checkpoint": str(folder)},
            signature=signature,
            pip_requirements=[f"dqo-pipelines=={__version__}"],
            metadata={"base_model": card.base_model, "base_revision": card.base_revision},
        )
    return info.model_uri


@in_words("look for the version that was registered before")
def logged_before(name: str, run_id: str, stage_key: str) -> str | None:
    """URI of the logged model behind the version that an earlier call has made of a checkpoint, if there is one.

    Args:
        name: Registered model.
        run_id: The training run.
        stage_key: That of the checkpoint.

    Raises:
        DQOError: If MLflow does not answer.
    """
    import mlflow

    version = _version_of(mlflow.MlflowClient(), name, run_id, stage_key)
    return version.source if version is not None and str(version.source).startswith("models:/m-") else None


def _version_of(client: "MlflowClient", name: str, run_id: str, stage_key: str) -> "ModelVersion | None":
    return next(
        (
            one
            for one in versions_of(client, name).values()
            if one.run_id == run_id and one.tags.get("dqo.stage_key") == stage_key
        ),
        None,
    )


@in_words("renew the card of the model")
def replace_readme(model_uri: str, readme: str) -> None:
    """Put another card into a logged model, for an evaluation that was made anew.

    Raises:
        DQOError: If MLflow or its artifact store does not take it.
    """
    import mlflow

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "README.md"
        path.write_text(readme, encoding="utf-8")
        client = mlflow.MlflowClient()
        client.log_model_artifact(model_uri.removeprefix("models:/"), str(path), "artifacts/checkpoint")


@contextmanager
def _with_readme(checkpoint: Path, readme: str | None) -> Iterator[Path]:
    """A folder like the checkpoint's, which is finished and stays as it is, with a README.md of ours in it."""
    if readme is None:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        shutil.copytree(checkpoint, folder, copy_function=_link)
        (folder / "README.md").unlink(missing_ok=True)  # peft writes one with nothing in it; a link, so not written to
        (folder / "README.md").write_text(readme, encoding="utf-8")
        yield folder


def _link(source: str, target: str) -> None:
    """Link a file, or copy it where the two are on different file systems. MLflow takes no symbolic links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def attach_metrics(
    model_uri: str, run_id: str, metrics: Mapping[str, Mapping[str, float | None]], dataset: str, digest: str
) -> None:
    """Log an evaluation's figures on the logged model, with the data that they were measured on.

    Args:
        model_uri: What `log_model` returned.
        run_id: The run of the evaluation, which holds the data set as its input.
        metrics: Of each metric `mean`, `low` and `high`; those that could not be measured are left out.
        dataset: Name of the data set.
        digest: Its digest, cut to the 36 characters that MLflow has room for.

    Raises:
        DQOError: If MLflow refuses or does not answer.
    """
    figures = {
        name: value
        for metric, interval in metrics.items()
        for name, value in (
            (f"eval/{metric}", interval["mean"]),
            (f"eval/{metric}_low", interval["low"]),
            (f"eval/{metric}_high", interval["high"]),
        )
    }
    attach_figures(model_uri, run_id, figures, dataset, digest)


@in_words("attach the evaluation to the model")
def attach_figures(model_uri: str, run_id: str, figures: Mapping[str, float | None], dataset: str, digest: str) -> None:
    """As `attach_metrics`, for figures that have their names already.

    Raises:
        DQOError: If MLflow refuses or does not answer.
    """
    import mlflow
    from mlflow.entities import Metric

    stamp, model_id = int(time.time() * 1000), model_uri.removeprefix("models:/")
    entries = [
        Metric(name, float(value), stamp, 0, model_id=model_id, dataset_name=dataset, dataset_digest=digest[:36])
        for name, value in figures.items()
        if value is not None and math.isfinite(value)
    ]
    if entries:
        mlflow.MlflowClient().log_batch(run_id, metrics=entries)


@in_words("register the model")
def register(
    name: str,
    run_id: str,
    model_uri: str,
    tags: dict[str, Any],
    metrics: dict[str, float],
    gate: GateResult,
    report: str = "",
    contender: bool = True,
) -> tuple[str, list[str]]:
    """Make a model version, give it the alias `challenger`, and `champion` too if its gate has passed.

    A version that an interrupted or repeated call has already made of this model is used again.

    Args:
        name: Registered model.
        run_id: The training run.
        model_uri: What `log_model` returned.
        tags: Lineage.
        metrics: Means that the registry page shows, as tags `eval.<metric>`.
        gate: The gate's result.
        report: Artifact that holds the gate's report.
        contender: Whether it may have aliases; a baseline does not.

    Returns:
        The version and the aliases it now holds.

    Raises:
        DQOError: If the name belongs to something else; if MLflow refuses or does not answer.
    """
    import mlflow

    client = mlflow.MlflowClient()
    claim(client, name)
    found = _version_of(client, name, run_id, str(tags["dqo.stage_key"]))
    # A server asks for the logged model's id beside its address; a local store takes either.
    model_id = model_uri.removeprefix("models:/") if model_uri.startswith("models:/m-") else None
    everything = {
        **{tag: str(value) for tag, value in tags.items()},
        **{f"eval.{metric}": f"{value:.4f}" for metric, value in metrics.items()},
        "gate.passed": str(gate.passed).lower(),
        "gate.reasons": "\n".join(gate.reasons),
    }
    # With the version, not after it: each tag by itself is two requests, and a call that ends between leaves some out.
    made = found or client.create_model_version(name, model_uri, run_id, tags=everything, model_id=model_id)
    version = str(made.version)
    for tag in [tag for tag, value in everything.items() if made.tags.get(tag) != value]:
        client.set_model_version_tag(name, version, tag, everything[tag])
    if contender:
        alias_trail.move(client, name, alias_trail.new(CHALLENGER, "register"), lambda *_: version)
        promotion.crown(client, name, version, gate, report)
    # Asked for, not assumed: a version that was promoted before keeps `champion` until another one takes it.
    held = client.get_registered_model(name).aliases
    return version, sorted(alias for alias, holder in held.items() if str(holder) == version)


def claim(client: "MlflowClient", name: str) -> None:
    """Make sure that a registered model of this name is there and may hold ours.

    Raises:
        DQOError: If the name belongs to a prompt, or to models that other programs have made.
    """
    from mlflow.exceptions import MlflowException

    if not tracking.check_registered_name(client, name):
        try:
            client.create_registered_model(name, description="Trained with Diversity Quality Optimization.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process may have made it in this moment
                raise


def load(model: str) -> Any:
    """Load a registered model: `NAME@alias`, `NAME/version` or a `models:/` URI.

    Returns:
        An MLflow pyfunc model; `load(...).predict(pandas.DataFrame({"prompt": ["..."]}), params={"n": 8})` gives a
        list of groups.
    """
    import mlflow

    return mlflow.pyfunc.load_model(model if model.startswith("models:/") else f"models:/{model}")


def read_gate(path: Path) -> GateResult:
    """Read the gate's result from an evaluation folder."""
    return GateResult(**json.loads(path.read_text(encoding="utf-8"))["gate"])
