"""Stage 3: DQO-RL and its baselines, policy gradient on the reward plus alpha times the group's volume."""

from pathlib import Path
from typing import Any

from dqo import tracking
from dqo.checkpoint import CheckpointCard
from dqo.data import DataCard, read_rows
from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.files import read_jsonl
from dqo.health import Monitor, judge
from dqo.policy import default_device
from dqo.progress import Progress
from dqo.recipe import Recipe
from dqo.rewards import TrlReward, build
from dqo.stages.context import Context, StageFolder, reward_identity, running, stage_key, with_identity
from dqo.stages.processes import carry_out
from dqo.stages.training import configuration, parameters, publish, report_findings, train
from dqo.tasks import get_task

_WHERE_ROLLOUTS_ARE_MADE = {
    "server_base_url",
    "server_timeout",
    "group_port",
    "gpu_memory_utilization",
    "enable_sleep_mode",
}


def run(context: Context, variant: str, data: Path, parent: Path, checkpoint: Path) -> None:
    """Train one variant from the SFT checkpoint.

    Args:
        context: The pipeline run.
        variant: `dqo`, or a baseline of the recipe; `reward_only` is the same with alpha = 0.
        data: Folder written by `prepare`.
        parent: Checkpoint written by `sft`.
        checkpoint: Folder to write: weights, checkpoint.json, history.jsonl.

    Raises:
        DQOError: If the variant is not the recipe's, a model cannot be loaded or no response can be scored.
    """
    recipe = context.recipe
    if variant not in recipe.variants:
        raise DQOError(f"variant {variant!r}: not in this recipe; expected one of: {', '.join(recipe.variants)}")
    card, task = DataCard.read(data / "card.json"), get_task(recipe.task)
    key = stage_key(
        # Not what only says how often to write, where the rollout server is or what memory it takes: a change must not
        # lose checkpoints.
        rl=recipe.rl.model_dump(
            exclude={
                "save_every": True,
                "log_completions_every": True,
                "health": True,
                "rollout": _WHERE_ROLLOUTS_ARE_MADE,
            }
        ),
        # A rule that only warns changes nothing that is trained.
        **({"stops": recipe.rl.health.stops} if recipe.rl.health.stops else {}),
        # alpha alone tells the variants apart, so a changed alpha does not repeat the baseline.
        method=recipe.method.model_dump(exclude={"baselines", "alpha"}) | {"alpha": _alpha(recipe, variant)},
        encoder=with_identity(recipe.encoder),
        reward=reward_identity(recipe, task),
        policy=with_identity(recipe.policy),
        seed=recipe.seed,
        layout=recipe.layout,
        task=recipe.task,
        data=card.digest,
        parent=CheckpointCard.read(parent).stage_key,
    )
    name = f"rl-{variant}"
    with running(context, name, key) as (folder, progress):
        tracking.connect(recipe, context.mlflow_uri)
        with tracking.child_run(context.parent_run_id, name, "rl", key) as run_:
            settings = _settings(context, folder, variant)
            run_.params({"variant": variant, **parameters(recipe, settings)})
            run_.dataset(read_rows(data / "train.jsonl"), card.task, card.digest, card.source, "training")
            if not folder.finished:
                inputs = {"variant": variant, "data": str(data), "parent": str(parent)}
                carry_out(work, context, folder, progress, run_, name, key, **inputs)
            else:
                # Trained by an earlier run, maybe with other warnings; a rule that stops belongs to the key.
                method, rows = recipe.method, read_jsonl(folder.output / "history.jsonl")
                found = judge(recipe.rl.health, rows, method.k, method.kernel_scale)
                report_findings(found, run_, progress, run_.last_step("train/loss"))
            publish(folder, run_, checkpoint)


def work(
    context: Context,
    folder: StageFolder,
    progress: Progress,
    run: tracking.Run | None,
    key: str,
    variant: str,
    data: str,
    parent: str,
) -> None:
    """What each process of the stage does; see `dqo.stages.training.train`."""
    recipe = context.recipe
    task, device = get_task(recipe.task), default_device()
    encoder = ResponseEncoder(recipe.encoder, device)  # of the volume and, it may be, of the reward
    train(
        context, folder, progress, run,
        model_name=variant, key=key, settings=_settings(context, folder, variant),
        rows=read_rows(Path(data) / "train.jsonl"), parent=Path(parent), card=DataCard.read(Path(data) / "card.json"),
        prompts_per_step=recipe.rl.prompts_per_step,
        encoder=encoder,
        reward=TrlReward(build(recipe, task, device, encoder), task),
        table_every=recipe.rl.log_completions_every,
        monitor=Monitor(recipe.rl.health, recipe.method.k, recipe.method.kernel_scale),
    )  # fmt: skip


def _settings(context: Context, folder: StageFolder, variant: str) -> dict[str, Any]:
    recipe = context.recipe
    rollout = recipe.rl.rollout
    vllm = rollout.model_dump(exclude={"engine", "mode"})
    return configuration(
        recipe,
        recipe.rl,
        folder.path,
        quality="reward",
        alpha=_alpha(recipe, variant),
        max_completion_length=recipe.rl.sampling.max_new_tokens,
        temperature=recipe.rl.sampling.temperature,
        top_p=recipe.rl.sampling.top_p,
        top_k=recipe.rl.sampling.top_k,
        beta=recipe.rl.beta,
        loss_type=recipe.rl.loss_type,
        scale_rewards=recipe.method.quality_scale,
        **recipe.method.defences.model_dump(exclude={"embed", "strip_reasoning"}),
        use_vllm=rollout.engine == "vllm",
        vllm_mode=rollout.mode,
        **{f"vllm_{name}": value for name, value in vllm.items()},
    )


def _alpha(recipe: Recipe, variant: str) -> float:
    return recipe.method.alpha if variant == "dqo" else 0.0
