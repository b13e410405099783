"""Stage 1: rows of a source become validated, split prompts; opens the pipeline's MLflow run."""

import json
import sys
from pathlib import Path

from dqo import defences, rewards, tracking
from dqo.bundled import identity
from dqo.data import DataCard, prepare, read_rows, source_fingerprint
from dqo.errors import DQOError
from dqo.files import write_text
from dqo.policy import highest_entropy, load_tokenizer, stop_ids
from dqo.recipe import Recipe
from dqo.stages.context import PIPELINE_FILE, Context, running, stage_key
from dqo.tasks import get_task
from dqo.tracking import DATA_TAG

CHANGED, UNCHANGED = "changed", "unchanged"


def run(context: Context, data: Path, skip_unchanged: bool = False) -> str:
    """Prepare the data and open the pipeline's MLflow run.

    Args:
        context: The pipeline run.
        data: Folder to write: train.jsonl, eval.jsonl, quarantine.jsonl, card.json, card.md, and
            pipeline.json, which names the MLflow run.
        skip_unchanged: Look for an earlier run of the same recipe and data that has finished; where there is one, no
            new run is opened.

    Returns:
        `unchanged` where such a run was looked for and found, else `changed`.

    Raises:
        DQOError: If MLflow does not answer or the data, a model or the reward cannot be used.
    """
    recipe = context.recipe
    task = get_task(recipe.task)
    rewards.check(recipe, task)  # rather than after the hours of SFT
    defences.check(recipe, task)
    _check_entropy(recipe)
    key = stage_key(
        task=recipe.task,
        data=recipe.data.model_dump(),
        source=source_fingerprint(recipe.data, task),
        tokenizer=identity(recipe.policy.model, recipe.policy.revision),
        policy=recipe.policy.model,
        max_response_tokens=recipe.sft.max_response_tokens,
    )
    with running(context, "prepare", key) as (folder, progress):
        experiment = tracking.connect(recipe, context.mlflow_uri)
        digest = None
        if skip_unchanged:
            # The data before the run: whether one is needed depends on them.
            if not folder.finished:
                card = prepare(recipe, task, load_tokenizer(recipe.policy), folder.output, stop_ids(recipe.policy))
                folder.finish()
            digest = DataCard.read(folder.output / "card.json").digest
            earlier = tracking.finished_run(recipe, experiment, digest)
            if earlier is not None:
                folder.publish(data)
                write_text(data / PIPELINE_FILE, json.dumps({"mlflow_run_id": earlier}) + "\n")
                message = f"data and recipe are unchanged since MLflow run {earlier} finished: nothing is trained"
                progress("step", 1, 1, message)
                sys.stdout.write(f"{message}\n")
                return UNCHANGED
        parent = tracking.open_parent(recipe, experiment, context.workspace, digest)
        with tracking.child_run(parent, "prepare", "prepare", key) as run_:
            if not folder.finished:
                card = prepare(recipe, task, load_tokenizer(recipe.policy), folder.output, stop_ids(recipe.policy))
                folder.finish()
                progress("step", 1, 1, f"{card.train_rows} train, {card.eval_rows} evaluation prompts")
            run_.folder(folder.output, "data")
            for name in ("train", "eval"):
                rows = read_rows(folder.output / f"{name}.jsonl")
                run_.metrics({f"data/{name}_prompts": len(rows)})
            tracking.Run(parent).tags({DATA_TAG: DataCard.read(folder.output / "card.json").digest})
            run_.metrics({"data/quarantined": len(read_rows(folder.output / "quarantine.jsonl"))})
        folder.publish(data)
        write_text(data / PIPELINE_FILE, json.dumps({"mlflow_run_id": parent}) + "\n")
    return CHANGED


def _check_entropy(recipe: Recipe) -> None:
    """Refuse bounds of the entropy that the model's vocabulary never lets it pass, or always does."""
    bounds = recipe.rl.health.entropy
    set_here = {name: bound for name, bound in bounds.limits.items() if bound != getattr(type(bounds)(), name)}
    if not set_here:
        return  # as the defaults have them: far from any vocabulary's
    most = highest_entropy(recipe.policy)
    for name, bound in set_here.items():
        if bound >= most:
            raise DQOError(
                f"rl.health.entropy.{name}: got {bound:g}; expected less than {most:.4g} nats, the entropy of "
                f"{recipe.policy.model!r} where every token is as likely as any other"
            )
