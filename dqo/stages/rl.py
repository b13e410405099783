"""Stage 3: DQO-RL and its baselines, policy gradient on the reward plus alpha times the group's volume."""

from pathlib import Path

from dqo import tracking
from dqo.data import DataCard, read_rows
from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.policy import CheckpointCard, default_device
from dqo.rewards import TrlReward, build
from dqo.stages.context import Context, reward_identity, running, stage_key, with_identity
from dqo.stages.training import configuration, parameters, publish, train
from dqo.tasks import get_task


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
    card = DataCard.read(data / "card.json")
    task = get_task(recipe.task)
    alpha = recipe.method.alpha if variant == "dqo" else 0.0
    key = stage_key(
        # Not what only says how often to write, or where the rollout server is: a change must not lose checkpoints.
        rl=recipe.rl.model_dump(
            exclude={"save_every": True, "log_completions_every": True, "rollout": {"server_base_url"}}
        ),
        # alpha alone tells the variants apart, so a changed alpha does not repeat the baseline.
        method=recipe.method.model_dump(exclude={"baselines", "alpha"}) | {"alpha": alpha},
        encoder=with_identity(recipe.encoder),
        reward=reward_identity(recipe, task),
        policy=with_identity(recipe.policy),
        seed=recipe.seed,
        task=recipe.task,
        data=card.digest,
        parent=CheckpointCard.read(parent).stage_key,
    )
    name = f"rl-{variant}"
    with running(context, name, key) as (folder, progress):
        tracking.connect(recipe, context.mlflow_uri)
        with tracking.child_run(context.parent_run_id, name, "rl", key) as run_:
            rollout = recipe.rl.rollout
            args = configuration(
                recipe,
                recipe.rl,
                folder.path,
                quality="reward",
                alpha=alpha,
                max_completion_length=recipe.rl.sampling.max_new_tokens,
                temperature=recipe.rl.sampling.temperature,
                top_p=recipe.rl.sampling.top_p,
                top_k=recipe.rl.sampling.top_k,
                beta=recipe.rl.beta,
                loss_type=recipe.rl.loss_type,
                scale_rewards=recipe.method.quality_scale,
                **recipe.method.defences.model_dump(),
                use_vllm=rollout.engine == "vllm",
                vllm_mode=rollout.mode,
                vllm_server_base_url=rollout.server_base_url,
                vllm_gpu_memory_utilization=rollout.gpu_memory_utilization,
            )
            rows = read_rows(data / "train.jsonl")
            run_.params({"variant": variant, **parameters(recipe, args)})
            run_.dataset(rows, card.task, card.digest, card.source, "training")
            if not folder.finished:
                device = default_device()
                encoder = ResponseEncoder(recipe.encoder, device)  # of the volume and, it may be, of the reward
                train(
                    context, folder, progress, run_,
                    model_name=variant, key=key, args=args, rows=rows, parent=parent, card=card,
                    prompts_per_step=recipe.rl.prompts_per_step,
                    encoder=encoder,
                    reward=TrlReward(build(recipe, task, device, encoder), task),
                    table_every=recipe.rl.log_completions_every,
                )  # fmt: skip
            publish(folder, run_, checkpoint)
