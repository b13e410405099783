"""Kubeflow component `register`: the DQO checkpoint becomes a model version; the gate decides about `champion`."""

from typing import List  # noqa: UP035  (Kubeflow 2.17 takes a list of artifacts only in this form)

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def register(
    recipe: str,
    workspace: str,
    mlflow_uri: str,
    library: str,
    pipeline_run: str,
    data: dsl.Input[dsl.Dataset],
    variants: dsl.Input[List[dsl.Model]],  # noqa: UP006
    evaluation: dsl.Input[dsl.Artifact],
    registration: dsl.Output[dsl.Artifact],
):
    """Register the DQO checkpoint with its lineage.

    Args:
        recipe: The recipe as one JSON string.
        workspace: Folder that outlives the task.
        mlflow_uri: MLflow tracking URI.
        library: Version and source digest of the library, and the models' identities; part of the cache key only.
        pipeline_run: Name of the Kubeflow run.
        data: Output of `prepare`.
        variants: Outputs of `dqo_rl`.
        evaluation: Output of `evaluate`.
        registration: JSON: name, version, aliases, gate.
    """
    from pathlib import Path

    from dqo.recipe import parse
    from dqo.stages import register
    from dqo.stages.context import Context

    context = Context.after_prepare(parse(recipe), Path(workspace), mlflow_uri, Path(data.path))
    checkpoints = [Path(variant.path) for variant in variants]
    register.run(context, checkpoints, Path(evaluation.path), Path(registration.path), pipeline_run)
