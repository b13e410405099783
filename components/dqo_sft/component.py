"""Kubeflow component `dqo_sft`: likelihood of demonstrations plus alpha times the volume of rollouts."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def dqo_sft(
    recipe: str,
    workspace: str,
    mlflow_uri: str,
    library: str,
    data: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
):
    """Fine-tune the base model on demonstrations.

    Args:
        recipe: The recipe as one JSON string.
        workspace: Folder that outlives the task; checkpoints are resumed from it.
        mlflow_uri: MLflow tracking URI.
        library: Version and source digest of the library, and the models' identities; part of the cache key only.
        data: Output of `prepare`.
        checkpoint: Adapter or weights (safetensors), checkpoint.json, history.jsonl.
    """
    from pathlib import Path

    from dqo.recipe import parse
    from dqo.stages import sft
    from dqo.stages.context import Context

    settings, launcher = parse(recipe), None
    if settings.distributed.nodes > 1:
        from components.trainjob import TrainJobLauncher

        launcher = TrainJobLauncher.in_cluster()
    context = Context.after_prepare(settings, Path(workspace), mlflow_uri, Path(data.path), launcher)
    sft.run(context, Path(data.path), Path(checkpoint.path))
    checkpoint.metadata["model"] = "sft"
