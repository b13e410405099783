"""Stage 2: DQO-SFT, the likelihood of demonstrations plus alpha times the volume of rollouts."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dqo import tracking
from dqo.data import DataCard, encode_demonstration, read_rows
from dqo.policy import load_tokenizer, stop_ids
from dqo.progress import Progress
from dqo.stages.context import Context, StageFolder, running, stage_key, with_identity
from dqo.stages.processes import carry_out
from dqo.stages.training import configuration, parameters, publish, train


def run(context: Context, data: Path, checkpoint: Path) -> None:
    """Train the base model on demonstrations.

    Args:
        context: The pipeline run.
        data: Folder written by `prepare`.
        checkpoint: Folder to write: weights, checkpoint.json, history.jsonl.

    Raises:
        DQOError: If a model cannot be loaded or a demonstration does not fit the chat template.
    """
    recipe = context.recipe
    card = DataCard.read(data / "card.json")
    rolls_out = recipe.sft.alpha > 0
    key = stage_key(
        sft=recipe.sft.model_dump(exclude={"save_every"}),
        method=recipe.method.model_dump(exclude={"baselines", "alpha"}) if rolls_out else {},
        encoder=with_identity(recipe.encoder) if rolls_out else None,
        sampling=recipe.rl.sampling.model_dump() if rolls_out else None,
        policy=with_identity(recipe.policy),
        seed=recipe.seed,
        layout=recipe.layout,
        data=card.digest,
    )
    with running(context, "sft", key) as (folder, progress):
        tracking.connect(recipe, context.mlflow_uri)
        with tracking.child_run(context.parent_run_id, "sft", "sft", key) as run_:
            run_.params({"variant": "sft", **parameters(recipe, _settings(context, folder))})
            run_.dataset(read_rows(data / "train.jsonl"), card.task, card.digest, card.source, "training")
            if not folder.finished:
                carry_out(work, context, folder, progress, run_, "sft", key, data=str(data))
            publish(folder, run_, checkpoint)


def work(
    context: Context, folder: StageFolder, progress: Progress, run: tracking.Run | None, key: str, data: str
) -> None:
    """What each process of the stage does; see `dqo.stages.training.train`."""
    recipe = context.recipe
    tokenizer, ends = load_tokenizer(recipe.policy), stop_ids(recipe.policy)
    rows = [
        {
            "prompt": row["prompt"],
            "demonstrations": [
                asdict(encode_demonstration(tokenizer, row["prompt"], reference, ends))
                for reference in row["references"]
            ],
        }
        for row in read_rows(Path(data) / "train.jsonl")
    ]
    train(
        context, folder, progress, run,
        model_name="sft", key=key, settings=_settings(context, folder), rows=rows, parent=None,
        card=DataCard.read(Path(data) / "card.json"), prompts_per_step=recipe.sft.prompts_per_step,
    )  # fmt: skip


def _settings(context: Context, folder: StageFolder) -> dict[str, Any]:
    recipe = context.recipe
    rolls_out, sampling = recipe.sft.alpha > 0, recipe.rl.sampling
    return configuration(
        recipe,
        recipe.sft,
        folder.path,
        quality="demonstration",
        alpha=recipe.sft.alpha,
        num_generations=recipe.sft_group,
        max_completion_length=sampling.max_new_tokens if rolls_out else recipe.sft.max_response_tokens,
        temperature=sampling.temperature if rolls_out else 1.0,
        top_p=sampling.top_p if rolls_out else 1.0,
        top_k=sampling.top_k if rolls_out else 0,
        beta=0.0,
        loss_type="dr_grpo",
        scale_rewards="none",
    )
