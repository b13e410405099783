"""The pipeline: prepare -> SFT -> one RL task a variant -> evaluate -> register.

On a cluster, `preflight` goes before them and the exit handler `finish` comes after.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from components.dqo_rl.component import dqo_rl
from components.dqo_sft.component import dqo_sft
from components.evaluate.component import evaluate
from components.finish.component import finish
from components.preflight.component import preflight
from components.prepare.component import prepare
from components.register.component import register
from dqo.recipe import Recipe, Step
from pipelines.placement import WORKSPACE, place_heavy, place_light


def build(recipe: Recipe, cluster: bool = True) -> Any:
    """Compose the pipeline of a recipe.

    The recipe is the default of one string parameter, so the compiled pipeline runs as it is and takes another recipe
    with the same variants at run time. The variants, images and resources are fixed when it is compiled.

    Args:
        recipe: The recipe.
        cluster: With what only a cluster has: where tasks run, the check before them and the exit handler. Kubeflow's
            local runner takes the tasks alone; what preflight asks, the command line has asked before it starts.
    """

    @dsl.pipeline(
        name=recipe.name,
        description=f"Diversity Quality Optimization on task {recipe.task}: prepare, SFT, RL, evaluate, register.",
    )
    def pipeline(
        recipe_json: str = recipe.to_json(),
        workspace: str = WORKSPACE,
        mlflow_uri: str = recipe.tracking.uri or "",
        library: str = "",
        source: str = "",
        skip_unchanged: bool = False,
    ):
        """Run prepare, SFT, RL, evaluate and register.

        Args:
            recipe_json: The recipe as one JSON string.
            workspace: Mounted folder for checkpoints and resuming.
            mlflow_uri: MLflow tracking URI.
            library: Version and source digest of the library, and the models' identities; part of the cache key.
            source: Digest of the data source, part of the cache key.
            skip_unchanged: End after preparation where an earlier run has finished with this recipe and these data.
        """
        where = {"recipe": recipe_json, "workspace": workspace, "mlflow_uri": mlflow_uri}
        shared = {**where, "library": library}
        light, heavy = (place_light, place_heavy) if cluster else (_as_it_is, _as_it_is)
        with _handler(recipe, where) if cluster else nullcontext():
            prepared = light(prepare(source=source, skip_unchanged=skip_unchanged, **shared), recipe, "prepare")
            if cluster:
                prepared.after(light(preflight(**where), recipe))
                # A cluster's data may change where the cache can't see it.
                prepared.set_caching_options(recipe.resources.caching.get("prepare", False))
            # Only a cluster's runs start by the clock.
            with dsl.If(prepared.outputs["Output"] == "changed", name="changed") if cluster else nullcontext():
                _train(recipe, prepared.outputs["data"], shared, light, heavy)

    return pipeline


_Place = Callable[..., dsl.PipelineTask]


def _as_it_is(task: dsl.PipelineTask, recipe: Recipe, step: Step | None = None) -> dsl.PipelineTask:
    """The image alone, which a local runner of containers starts."""
    return task.set_container_image(recipe.resources.image)


def _handler(recipe: Recipe, where: dict[str, Any]) -> dsl.ExitHandler:
    """Everything inside is followed by `finish`, however it ends."""
    ending = place_light(finish(**where), recipe)
    ending.set_retry(num_retries=3, backoff_duration="30s", backoff_factor=2.0)  # MLflow may be away for a moment
    return dsl.ExitHandler(ending, name="run")


def _train(recipe: Recipe, data: Any, shared: dict[str, Any], light: _Place, heavy: _Place) -> None:
    """All tasks after preparation.

    The MLflow run travels inside the data artifact: kfp.local 2.17 overwrites every task-output parameter that enters a
    ParallelFor with the loop's item.
    """
    sft = heavy(dqo_sft(data=data, **shared), recipe, "sft")
    # One variant at a time on a laptop's two cores, and with a vLLM server, which holds one policy; else a cluster
    # gives each its own node.
    served = recipe.rl.rollout.engine == "vllm" and recipe.rl.rollout.mode == "server"
    parallelism = len(recipe.variants) if recipe.resources.accelerator and not served else 1
    with dsl.ParallelFor(items=recipe.variants, parallelism=parallelism, name="variants") as variant:
        rl = heavy(dqo_rl(variant=variant, data=data, parent=sft.outputs["checkpoint"], **shared), recipe, "rl")

    def variants() -> dsl.Collected:
        return dsl.Collected(rl.outputs["checkpoint"])  # one for each use: the compiler changes it

    evaluated = heavy(
        evaluate(data=data, sft=sft.outputs["checkpoint"], variants=variants(), **shared), recipe, "evaluate"
    )
    if recipe.judge is not None and recipe.judge.reward is None:
        # A judge behind a server may have been away, which Kubeflow cannot see. The workspace holds what is finished.
        evaluated.set_caching_options(recipe.resources.caching.get("evaluate", False))
    light(
        register(
            data=data,
            pipeline_run=dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
            variants=variants(),
            evaluation=evaluated.outputs["evaluation"],
            **shared,
        ),
        recipe,
        "register",
    )


def compile_recipe(recipe: Recipe, path: Path) -> None:
    """Write the pipeline's intermediate representation; equal recipes give equal bytes."""
    unfinished = path.with_name(f".{path.stem}.part.yaml")
    try:
        compiler.Compiler().compile(build(recipe), str(unfinished))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
