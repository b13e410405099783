"""Kubeflow component `prepare`: rows of a source become validated, split prompts."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def prepare(
    recipe: str,
    workspace: str,
    mlflow_uri: str,
    library: str,
    source: str,
    skip_unchanged: bool,
    data: dsl.Output[dsl.Dataset],
) -> str:
    """Validate, de-duplicate and split the prompts; open the pipeline's MLflow run.

    Args:
        recipe: The recipe as one JSON string.
        workspace: Folder that outlives the task.
        mlflow_uri: MLflow tracking URI.
        library: Version and source digest of the library, and the models' identities; part of the cache key only.
        source: Digest of the data source, part of the cache key only.
        skip_unchanged: Look for an earlier finished run of the same recipe and data.
        data: train.jsonl, eval.jsonl, quarantine.jsonl, card.json, card.md, pipeline.json (the MLflow run).

    Returns:
        `unchanged` where such a run was looked for and found: nothing is left to do. Else `changed`.
    """
    from pathlib import Path

    from dqo.recipe import parse
    from dqo.stages import prepare
    from dqo.stages.context import Context

    context = Context(parse(recipe), Path(workspace), mlflow_uri)
    return prepare.run(context, Path(data.path), skip_unchanged)
