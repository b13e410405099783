"""Kubeflow component `preflight`: what the run needs is there, or all that is missing is named within a minute."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def preflight(recipe: str, workspace: str, mlflow_uri: str, report: dsl.Output[dsl.Markdown]):
    """Check Secrets, volume, libraries, MLflow with its store, data, models, judge, and room for the accelerators.

    Nodes and quotas are looked at where the task's service account may list them (the chart's `runner.readCapacity`);
    else that is said, and stops nothing.
    Where a recipe trains on several nodes, Kubernetes is given its training job to check and not to start.

    Args:
        recipe: The recipe as one JSON string.
        workspace: Folder that outlives the task.
        mlflow_uri: MLflow tracking URI.
        report: A table of the checks.
    """
    from pathlib import Path

    try:
        from dqo.recipe import parse
        from dqo.stages import preflight
        from dqo.stages.context import Context
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the image holds no whole dqo-pipelines library ({error}); correct resources.image of the recipe"
        ) from error

    settings = parse(recipe)
    if settings.resources.accelerator is not None:
        from components.capacity import look

        nodes, quotas = look()
    else:
        nodes = quotas = "not asked"
    context = Context(settings, Path(workspace), mlflow_uri)
    further = []
    if settings.distributed.nodes > 1:

        def training_job() -> str:
            from components.trainjob import try_out

            return try_out(settings, context.workspace)

        further = [("Training job", training_job)]
    preflight.run(context, Path(report.path), nodes, quotas, further)
