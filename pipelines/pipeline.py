"""The pipeline: prepare -> SFT -> one RL task a variant -> evaluate -> register."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from components.dqo_rl.component import dqo_rl
from components.dqo_sft.component import dqo_sft
from components.evaluate.component import evaluate
from components.prepare.component import prepare
from components.register.component import register
from dqo.recipe import Recipe, Resources


def build(recipe: Recipe) -> Any:
    """Compose the pipeline of a recipe.

    The recipe is the default of one string parameter, so the compiled pipeline runs as it is and takes another recipe
    with the same variants at run time. The variants, images and resources are fixed when it is compiled.
    """

    @dsl.pipeline(
        name=recipe.name,
        description=f"Diversity Quality Optimization on task {recipe.task}: prepare, SFT, RL, evaluate, register.",
    )
    def pipeline(
        recipe_json: str = recipe.to_json(),
        workspace: str = "/workspace",
        mlflow_uri: str = recipe.tracking.uri or "",
        library: str = "",
        source: str = "",
    ):
        """Run prepare, SFT, RL, evaluate and register.

        Args:
            recipe_json: The recipe as one JSON string.
            workspace: Mounted folder for checkpoints and resuming.
            mlflow_uri: MLflow tracking URI.
            library: Version and source digest of the library, and the models' identities; part of the cache key.
            source: Digest of the data source, part of the cache key.
        """
        shared = {"recipe": recipe_json, "workspace": workspace, "mlflow_uri": mlflow_uri, "library": library}
        prepared = prepare(source=source, **shared)
        prepared.set_container_image(recipe.resources.image)
        # The MLflow run travels inside the data artifact: kfp.local 2.17 overwrites every task-output parameter that
        # enters a ParallelFor with the loop's item.
        data = prepared.outputs["data"]
        place = _placement(recipe.resources)
        sft = place(dqo_sft(data=data, **shared))
        # One variant at a time on a laptop's two cores, and with a vLLM server, which holds one policy; else a cluster
        # gives each its own node.
        served = recipe.rl.rollout.engine == "vllm" and recipe.rl.rollout.mode == "server"
        parallelism = len(recipe.variants) if recipe.resources.accelerator and not served else 1
        with dsl.ParallelFor(items=recipe.variants, parallelism=parallelism, name="variants") as variant:
            rl = place(dqo_rl(variant=variant, data=data, parent=sft.outputs["checkpoint"], **shared))
        evaluated = place(
            evaluate(
                data=data,
                sft=sft.outputs["checkpoint"],
                variants=dsl.Collected(rl.outputs["checkpoint"]),
                **shared,
            )
        )
        registered = register(
            data=data,
            pipeline_run=dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
            variants=dsl.Collected(rl.outputs["checkpoint"]),
            evaluation=evaluated.outputs["evaluation"],
            **shared,
        )
        registered.set_container_image(recipe.resources.image)

    return pipeline


def _placement(resources: Resources) -> Callable[[dsl.PipelineTask], dsl.PipelineTask]:
    """Ask for the recipe's image, processors, memory and accelerator."""

    def place(task: dsl.PipelineTask) -> dsl.PipelineTask:
        task.set_container_image(resources.image)
        task.set_cpu_request(resources.cpu)
        task.set_memory_limit(resources.memory)
        if resources.accelerator is not None:
            task.set_accelerator_type(resources.accelerator)
            task.set_accelerator_limit(resources.accelerator_count)
        return task

    return place


def compile_recipe(recipe: Recipe, path: Path) -> None:
    """Write the pipeline's intermediate representation; equal recipes give equal bytes."""
    unfinished = path.with_name(f".{path.stem}.part.yaml")
    try:
        compiler.Compiler().compile(build(recipe), str(unfinished))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
