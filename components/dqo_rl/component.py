"""Kubeflow component `dqo_rl`: policy gradient on the reward plus alpha times the group's volume."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def dqo_rl(
    recipe: str,
    variant: str,
    workspace: str,
    mlflow_uri: str,
    library: str,
    data: dsl.Input[dsl.Dataset],
    parent: dsl.Input[dsl.Model],
    checkpoint: dsl.Output[dsl.Model],
):
    """Train one variant from the SFT checkpoint; `reward_only` is the same with alpha = 0.

    Args:
        recipe: The recipe as one JSON string.
        variant: `dqo` or a baseline of the recipe.
        workspace: Folder that outlives the task; checkpoints are resumed from it.
        mlflow_uri: MLflow tracking URI.
        library: Version and source digest of the library, and the models' identities; part of the cache key only.
        data: Output of `prepare`.
        parent: Output of `dqo_sft`.
        checkpoint: Adapter or weights (safetensors), checkpoint.json, history.jsonl.
    """
    from pathlib import Path

    from dqo.recipe import parse
    from dqo.stages import rl
    from dqo.stages.context import Context

    settings, launcher = parse(recipe), None
    if settings.distributed.nodes > 1:
        from components.trainjob import TrainJobLauncher

        launcher = TrainJobLauncher.in_cluster()
    context = Context.after_prepare(settings, Path(workspace), mlflow_uri, Path(data.path), launcher)
    rl.run(context, variant, Path(data.path), Path(parent.path), Path(checkpoint.path))
    checkpoint.metadata["model"] = variant
