"""Kubeflow component `finish`: the exit handler, which writes the pipeline's final state to MLflow."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def finish(recipe: str, workspace: str, mlflow_uri: str, status: dsl.PipelineTaskFinalStatus):
    """End the pipeline's MLflow run, and those of stages that were killed, with state, failed task and message.

    Training jobs of several nodes that a killed task could not remove are removed.

    Args:
        recipe: The recipe as one JSON string.
        workspace: Folder that outlives the task.
        mlflow_uri: MLflow tracking URI.
        status: How the tasks before ended; Kubeflow passes it.
    """
    import sys
    from pathlib import Path

    from dqo.recipe import parse
    from dqo.stages import finish
    from dqo.stages.context import Context

    context = Context(parse(recipe), Path(workspace), mlflow_uri)
    try:
        if context.recipe.distributed.nodes > 1:
            from components.trainjob import remove_leftovers

            for name in remove_leftovers():
                sys.stdout.write(f"removed training job {name}, which its task had left\n")
    finally:
        runs = finish.run(context, status.state or "", status.pipeline_task_name or "", status.error_message or "")
        sys.stdout.write(f"{status.state}: MLflow runs {', '.join(runs) or 'none'}\n")
