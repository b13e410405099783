"""The MLflow model registry: versions with their lineage, aliases, loading."""

import json
from pathlib import Path
from typing import Any

from dqo import __version__
from dqo.gate import GateResult
from dqo.mlflow_errors import in_words
from dqo.policy import CheckpointCard

CHALLENGER, CHAMPION = "challenger", "champion"


def log_model(run_id: str, checkpoint: Path, name: str) -> str:
    """Log a checkpoint as a loadable MLflow model on its training run; returns the model's URI.

    The model holds the adapter and names its base model and revision; nothing is pickled.
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
    with in_words(f"log the model {name!r}", run_id), mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(Path(__file__).with_name("serving.py")),
            artifacts={"checkpoint": str(checkpoint)},
            signature=signature,
            pip_requirements=[f"dqo-pipelines=={__version__}"],
            metadata={"base_model": card.base_model, "base_revision": card.base_revision},
        )
    return info.model_uri


@in_words("register the model")
def register(
    name: str, run_id: str, model_uri: str, tags: dict[str, Any], metrics: dict[str, float], gate: GateResult
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

    Returns:
        The version and the aliases it now holds.
    """
    import time
    from contextlib import suppress

    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    with suppress(MlflowException):  # it exists
        client.create_registered_model(name, description="Trained with Diversity Quality Optimization.")
    key = str(tags["dqo.stage_key"])
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("dqo.stage_key") == key]
    found = next((v for v in known if v.run_id == run_id), None)
    # A server asks for the logged model's id beside its address; a local store takes either.
    model_id = model_uri.removeprefix("models:/") if model_uri.startswith("models:/m-") else None
    version = found or client.create_model_version(name, model_uri, run_id, model_id=model_id)
    everything = {
        **tags,
        **{f"eval.{metric}": f"{value:.4f}" for metric, value in metrics.items()},
        "gate.passed": str(gate.passed).lower(),
        "gate.reasons": "\n".join(gate.reasons),
    }
    for tag, value in everything.items():
        client.set_model_version_tag(name, version.version, tag, str(value))
    client.set_registered_model_alias(name, CHALLENGER, version.version)
    if gate.passed:
        previous = client.get_registered_model(name).aliases.get(CHAMPION)
        client.set_registered_model_alias(name, CHAMPION, version.version)
        client.set_model_version_tag(
            name, version.version, "promoted_at", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        )
        if previous is not None and str(previous) != str(version.version):
            client.set_model_version_tag(name, version.version, "previous_champion", str(previous))
    # Asked for, not assumed: a version that was promoted before keeps `champion` until another one takes it.
    held = client.get_registered_model(name).aliases
    return str(version.version), sorted(alias for alias, holder in held.items() if str(holder) == str(version.version))


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
