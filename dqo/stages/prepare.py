"""Stage 1: rows of a source become validated, split prompts; opens the pipeline's MLflow run."""

import json
from pathlib import Path

from dqo import rewards, tracking
from dqo.bundled import identity
from dqo.data import prepare, read_rows, source_fingerprint
from dqo.files import write_text
from dqo.policy import load_tokenizer, stop_ids
from dqo.stages.context import PIPELINE_FILE, Context, running, stage_key
from dqo.tasks import get_task


def run(context: Context, data: Path) -> None:
    """Prepare the data and open the pipeline's MLflow run.

    Args:
        context: The pipeline run.
        data: Folder to write: train.jsonl, eval.jsonl, quarantine.jsonl, card.json, card.md, and
            pipeline.json, which names the MLflow run.

    Raises:
        DQOError: If MLflow does not answer or the data, a model or the reward cannot be used.
    """
    recipe = context.recipe
    task = get_task(recipe.task)
    rewards.check(recipe, task)  # rather than after the hours of SFT
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
        parent = tracking.open_parent(recipe, experiment, context.workspace)
        with tracking.child_run(parent, "prepare", "prepare", key) as run_:
            if not folder.finished:
                card = prepare(recipe, task, load_tokenizer(recipe.policy), folder.output, stop_ids(recipe.policy))
                folder.finish()
                progress("step", 1, 1, f"{card.train_rows} train, {card.eval_rows} evaluation prompts")
            run_.folder(folder.output, "data")
            for name in ("train", "eval"):
                rows = read_rows(folder.output / f"{name}.jsonl")
                run_.metrics({f"data/{name}_prompts": len(rows)})
            run_.metrics({"data/quarantined": len(read_rows(folder.output / "quarantine.jsonl"))})
        folder.publish(data)
        write_text(data / PIPELINE_FILE, json.dumps({"mlflow_run_id": parent}) + "\n")
