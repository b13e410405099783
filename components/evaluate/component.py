"""Kubeflow component `evaluate`: sample from every model under the same conditions, measure, write the report."""

from typing import List  # noqa: UP035  (Kubeflow 2.17 takes a list of artifacts only in this form)

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def evaluate(
    recipe: str,
    workspace: str,
    mlflow_uri: str,
    library: str,
    data: dsl.Input[dsl.Dataset],
    sft: dsl.Input[dsl.Model],
    variants: dsl.Input[List[dsl.Model]],  # noqa: UP006
    evaluation: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
):
    """Measure quality and diversity of the base model and every checkpoint.

    Args:
        recipe: The recipe as one JSON string.
        workspace: Folder that outlives the task.
        mlflow_uri: MLflow tracking URI.
        library: Version and source digest of the library, and the models' identities; part of the cache key only.
        data: Output of `prepare`.
        sft: Output of `dqo_sft`.
        variants: Outputs of `dqo_rl`.
        evaluation: evaluation.json, responses.jsonl, plane.png, report.html; with a judge its audit and verdicts.
        report: The report on its own, for the Kubeflow page.
        metrics: Means of the DQO model.
    """
    import json
    import shutil
    from pathlib import Path

    from dqo.recipe import parse
    from dqo.stages import evaluate
    from dqo.stages.context import Context

    context = Context.after_prepare(parse(recipe), Path(workspace), mlflow_uri, Path(data.path))
    checkpoints = [Path(sft.path), *(Path(variant.path) for variant in variants)]
    evaluate.run(context, Path(data.path), checkpoints, Path(evaluation.path))
    shutil.copyfile(Path(evaluation.path) / "report.html", report.path)
    result = json.loads((Path(evaluation.path) / "evaluation.json").read_text())
    means = {name: interval["mean"] for name, interval in result["models"]["dqo"]["metrics"].items()}
    for name, mean in means.items():
        if mean is not None:
            metrics.log_metric(name, mean)
    # The local runner's cache takes an output that left no file for lost, and would evaluate again.
    Path(metrics.path).write_text(json.dumps(means))
