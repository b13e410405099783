"""Stage 5: the DQO checkpoint becomes a model version with its lineage; the gate decides about `champion`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dqo import model_card, registry, tracking
from dqo.checkpoint import CheckpointCard, weights_digest
from dqo.errors import DQOError
from dqo.evaluation import runs
from dqo.files import write_text
from dqo.gate import AskedJudge, GateResult, decide
from dqo.mlflow_errors import in_words
from dqo.recipe import Recipe
from dqo.stages.context import Context, running, stage_key
from dqo.stages.judging import audit_figures, model_figures


def run(
    context: Context, checkpoints: list[Path], evaluation: Path, registration: Path, pipeline_run: str = ""
) -> None:
    """Register the DQO checkpoint, and where the recipe asks for it, the baselines before it.

    Args:
        context: The pipeline run.
        checkpoints: Folders written by `rl`.
        evaluation: Folder written by `evaluate`.
        registration: File to write: name, version, aliases, gate, the versions of the baselines (JSON).
        pipeline_run: The Kubeflow run's id, for lineage.

    Raises:
        DQOError: If no DQO checkpoint was handed over or MLflow does not answer.
    """
    recipe = context.recipe
    given = [(CheckpointCard.read(path), path) for path in checkpoints]
    found = [(card, path) for card, path in given if card.model == "dqo"]
    if len(found) != 1:
        raise DQOError(f"register: expected one checkpoint of the model 'dqo', got {len(found)}")
    card, checkpoint = found[0]
    beside = [(card, path) for card, path in given if card.model != "dqo"] if recipe.registry.baselines else []
    result = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    gate = registry.read_gate(evaluation / "evaluation.json")
    key = stage_key(
        checkpoint=card.stage_key,
        name=recipe.registry.name,
        gate=result["gate"],
        metrics=result["models"]["dqo"],
        parent_run=context.parent_run_id,
        beside=[card.stage_key for card, _ in beside],
        **({"judge": result["judge"]} if "judge" in result else {}),
    )
    with running(context, "register", key) as (folder, progress):
        experiment = tracking.connect(recipe, context.mlflow_uri)
        with tracking.child_run(context.parent_run_id, "register", "register", key) as run_:
            if not folder.finished:
                asked = AskedJudge.of_the_evaluation(recipe.judge)
                # Before it, so that the newest version of a pipeline is the one that stands for promotion.
                baselines = {
                    other.model: _register(
                        context,
                        other,
                        path,
                        result,
                        decide(recipe.gate, result, other.model, asked),
                        pipeline_run,
                        False,
                    )[0]
                    for other, path in beside
                }
                version, aliases = _register(context, card, checkpoint, result, gate, pipeline_run, True)
                output = folder.fresh_output()
                document = {
                    "name": recipe.registry.name,
                    "version": version,
                    "aliases": aliases,
                    "model_uri": f"models:/{recipe.registry.name}/{version}",
                    "gate": result["gate"],
                    "baselines": baselines,
                    "mlflow_experiment": experiment,
                    "mlflow_run": context.parent_run_id,
                }
                write_text(output / "registration.json", json.dumps(document, indent=2) + "\n")
                folder.finish()
                progress("step", 1, 1, f"{recipe.registry.name} version {version} ({', '.join(aliases)})")
            document = json.loads((folder.output / "registration.json").read_text(encoding="utf-8"))
            run_.tags({"dqo.model_version": f"{document['name']}/{document['version']}"})
        pipeline = tracking.Run(context.parent_run_id)
        pipeline.tags({"mlflow.note.content": _note(document)})
        pipeline.finish()
        write_text(registration, json.dumps(document, indent=2) + "\n")


def _register(
    context: Context,
    card: CheckpointCard,
    checkpoint: Path,
    result: dict[str, Any],
    gate: GateResult,
    pipeline_run: str,
    contender: bool,
) -> tuple[str, list[str]]:
    """Log a checkpoint as a model with its card and figures, and make it a version; the version and its aliases."""
    recipe = context.recipe
    tags = {
        "dqo.stage_key": card.stage_key,
        "dqo.model": card.model,
        "dqo.recipe": recipe.name,
        "dqo.recipe_digest": recipe.digest,
        "dqo.pipeline_mlflow_run": context.parent_run_id,
        "dqo.pipeline_run": pipeline_run,
        "dqo.data_digest": card.data_digest,
        "dqo.base_model": card.base_model,
        "dqo.base_revision": card.base_revision or "",
        "dqo.weights_digest": weights_digest(checkpoint),
        "dqo.alpha": recipe.method.alpha if card.model == "dqo" else 0.0,
        "dqo.k": recipe.method.k,
        "dqo.evaluated_on": evaluated_on(recipe, result),
    }
    if card.stopped is not None:
        tags["dqo.stopped"] = card.stopped["reason"]
    metrics = result["models"][card.model]["metrics"]
    means = {name: interval["mean"] for name, interval in metrics.items() if interval["mean"] is not None}
    evaluated = _evaluation_run(context)
    readme = model_card.render(recipe, card, result | {"gate": asdict(gate)})
    # A version keeps its logged model: what an evaluation made anew says has to stand on that one's page.
    uri = registry.logged_before(recipe.registry.name, card.mlflow_run_id, card.stage_key)
    if uri is None:
        uri = registry.log_model(card.mlflow_run_id, checkpoint, recipe.registry.name, readme)
    else:
        registry.replace_readme(uri, readme)
    if evaluated is not None:
        tags["dqo.evaluation_mlflow_run"] = evaluated
        registry.attach_metrics(uri, evaluated, metrics, recipe.task, result["data_digest"])
        if (judge := result.get("judge")) is not None and (said := model_figures(judge, card.model)):
            labelled = judge["audit"]["labelled"]
            registry.attach_figures(uri, evaluated, said, recipe.task, result["data_digest"])
            # Measured on other data, which is named beside it.
            registry.attach_figures(
                uri, evaluated, audit_figures(judge), f"labelled pairs {labelled['name']}", labelled["digest"]
            )
    report = f"runs:/{evaluated}/evaluation/evaluation.json" if evaluated else ""
    return registry.register(
        recipe.registry.name, card.mlflow_run_id, uri, tags, means, gate, report, contender=contender
    )


def _evaluation_run(context: Context) -> str | None:
    """The MLflow run of this pipeline's evaluation; `None` where MLflow has lost it."""
    import mlflow

    client = mlflow.MlflowClient()
    try:
        with in_words("find the evaluation"):
            return str(runs.evaluation_of(client, "register", client.get_run(context.parent_run_id)).info.run_id)
    except DQOError:
        return None


def evaluated_on(recipe: Recipe, result: dict[str, Any]) -> str:
    """What an evaluation was made on, in words: versions of which these are equal can be compared by their means."""
    return f"{recipe.task} {result['data_digest'][:8]}, {result['prompts']} prompts x {result['n']}"


def _note(document: dict[str, Any]) -> str:
    """What MLflow's page says of the pipeline's run: the model version, and the gate's rules with their outcome."""
    aliases = ", ".join(f"`{alias}`" for alias in document["aliases"])
    lines = [
        f"Registered as `{document['name']}` version {document['version']} ({aliases}). "
        f"Gate {'passed' if document['gate']['passed'] else 'not passed'}:",
        "",
        *(f"- {reason}" for reason in document["gate"]["reasons"]),
        "",
        *(f"Version {version} is `{model}`, to compare with.\n" for model, version in document["baselines"].items()),
        "The report is `evaluation/report.html` among the artifacts of the child run `evaluate`.",
    ]
    return "\n".join(lines)
