"""What SFT and RL share: the trainer's configuration, checkpoints and resuming, logging, the finished checkpoint."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from dqo.bundled import locate
from dqo.data import DataCard
from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.files import read_jsonl, write_jsonl
from dqo.policy import CheckpointCard, default_device, load_tokenizer, resolve_dtype, trainable
from dqo.progress import Progress
from dqo.recipe import Recipe, Rl, Sft
from dqo.stages.context import Context, StageFolder, full_disk_message
from dqo.tracking import Run
from dqo.trainer import DQOConfig, DQOTrainer

_COMPLETE = "complete"
# Names under which a step's figures appear in history.jsonl, MLflow and the report; TRL's own names on the right.
_METRICS = {
    "loss": "loss",
    "quality": "quality",
    "bonus": "bonus",
    "log_volume": "log_volume",
    "duplicate_rate": "duplicate_rate",
    "truncation_rate": "truncation_rate",
    "unscorable_rate": "unscorable_rate",
    "no_bonus_rate": "no_bonus_rate",
    "encoder_cut_share": "encoder_cut_share",
    "mean_tokens": "mean_tokens",
    "demonstration_nll": "demonstration_nll",
    "entropy": "entropy",
    "kl": "kl",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "reward_std": "reward_std",
    "clip_ratio": "clip_ratio/region_mean",
    "step_seconds": "step_time",
}


def configuration(recipe: Recipe, section: Sft | Rl, folder: Path, **settings: Any) -> DQOConfig:
    """Translate a recipe's training section into the trainer's configuration.

    Every TRL default that changes what is optimised is set here explicitly.

    Raises:
        DQOError: If the step does not divide over the processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    k = settings.pop("num_generations", recipe.method.k)
    rows = section.prompts_per_step * k
    micro = section.micro_batch or rows // world
    if rows % (world * micro):
        raise DQOError(
            f"prompts_per_step * k = {rows} sequences do not divide over {world} processes with micro_batch {micro}; "
            "change prompts_per_step or micro_batch"
        )
    device = default_device()
    accumulation = rows // (world * micro)
    return DQOConfig(
        output_dir=str(folder / "checkpoints"),
        max_steps=section.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        learning_rate=section.learning_rate,
        lr_scheduler_type="constant_with_warmup" if section.schedule == "constant" else section.schedule,
        warmup_steps=section.warmup_steps,
        max_grad_norm=section.max_grad_norm,
        weight_decay=0.0,
        gradient_checkpointing=recipe.policy.gradient_checkpointing,
        bf16=resolve_dtype(recipe.policy, device) == torch.bfloat16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        save_steps=section.save_every,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=recipe.seed,
        num_iterations=1,
        epsilon=0.2,
        mask_truncated_completions=False,
        num_generations=k,
        score=recipe.method.score,
        kernel_scale=recipe.method.kernel_scale,
        distinct_threshold=recipe.method.distinct_threshold,
        advantage=recipe.method.advantage,
        **settings,
    )


class _Recorder(TrainerCallback):
    """Sends each step's figures to history.jsonl, MLflow and the progress display; marks complete checkpoints."""

    def __init__(self, folder: Path, run: Run, progress: Progress, tables: Callable[[int], None] | None) -> None:
        self._history = folder / "history.jsonl"
        self._run = run
        self._progress = progress
        self._tables = tables
        self._logged = run.last_step("train/loss")
        self.rows: list[dict[str, float]] = []

    def cut_back(self, step: int) -> None:
        """Forget the rows of steps behind a checkpoint: they are trained again."""
        if self._history.is_file():
            self.rows = [row for row in read_jsonl(self._history) if row["step"] <= step]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress("step", state.global_step, state.max_steps)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        if "train_runtime" in logs or not state.is_world_process_zero:
            return
        row = {name: logs[source] for name, source in _METRICS.items() if logs.get(source) is not None}
        self.rows.append({"step": state.global_step, **row})
        write_jsonl(self._history, self.rows)
        self._progress("step", state.global_step, state.max_steps, metrics=row)
        if state.global_step <= self._logged:
            return  # trained again after an interruption, and in MLflow already
        if self._tables is not None:
            self._tables(state.global_step)
        self._run.metrics({f"train/{name}": value for name, value in row.items()}, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            (checkpoint / _COMPLETE).touch()
            self._run.metrics({"train/checkpoint": state.global_step}, state.global_step)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a stage folder; incomplete ones, left by a kill, are removed."""
    found = sorted(
        (folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-"))
    )
    for path in found:
        if not (path / _COMPLETE).is_file():
            shutil.rmtree(path)
    return next((path for path in reversed(found) if path.is_dir()), None)


def train(
    context: Context,
    folder: StageFolder,
    progress: Progress,
    run: Run,
    *,
    model_name: str,
    key: str,
    args: DQOConfig,
    rows: list[dict[str, Any]],
    parent: Path | None,
    card: DataCard,
    prompts_per_step: int,
    encoder: ResponseEncoder | None = None,
    reward: Callable[..., list[float | None]] | None = None,
    table_every: int | None = None,
) -> None:
    """Train from the newest complete checkpoint to the last step and leave the finished checkpoint in the output.

    Args:
        context: The pipeline run.
        folder: The stage's folder.
        progress: Reports steps.
        run: The stage's MLflow run.
        model_name: `sft`, `reward_only` or `dqo`.
        key: The stage's key, recorded as lineage.
        args: See `configuration`.
        rows: Training rows; column `prompt` and whatever the reward needs.
        parent: Checkpoint to start from, `None` for the base model.
        card: The data's card.
        prompts_per_step: Prompts in a step, for the check that the data fills one.
        encoder: The recipe's encoder where it is loaded already; `None` loads it if it is needed.
        reward: TRL reward function; `None` trains on demonstrations.
        table_every: Steps between tables of responses in MLflow; `None` logs none.

    Raises:
        DQOError: If the data does not fill one step, or as the trainer's parts raise it.
    """
    recipe = context.recipe
    if len(rows) < prompts_per_step:
        raise DQOError(
            f"{len(rows)} training prompts do not fill one step of {prompts_per_step}; lower prompts_per_step or give "
            "more data"
        )
    device = default_device()
    tokenizer = load_tokenizer(recipe.policy)
    set_seed(recipe.seed)  # a new adapter is drawn before the trainer sets its seed
    model = trainable(recipe.policy, device, parent)
    embeds = args.alpha > 0 or (args.measure_diversity and reward is not None)
    if embeds and encoder is None:
        encoder = ResponseEncoder(recipe.encoder, device)

    def tables(step: int) -> None:
        if table_every is None or (step % table_every and step != 1 and step != args.max_steps):
            return
        logs: dict[str, Any] = trainer._logs
        columns: dict[str, list[Any]] = {
            "prompt": [prompt[-1]["content"] for prompt in logs["prompt"]],
            "response": [completion[-1]["content"] for completion in logs["completion"]],
        }
        columns |= {name: list(values) for name, values in logs["rewards"].items()}
        columns["advantage"] = list(logs["advantages"])
        run.table({"step": [step] * len(columns["prompt"]), **columns}, "completions.json", append=True)

    recorder = _Recorder(folder.path, run, progress, tables if reward is not None else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = DQOTrainer(
            args=args,
            model=model,
            encoder=encoder,
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        checkpoint = newest_checkpoint(folder.path)
        done = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
        recorder.cut_back(done)
        if checkpoint is not None:
            progress("step", done, args.max_steps, f"continuing from {checkpoint.name}")
        try:
            if checkpoint is not None and done >= args.max_steps:
                # Only the end of the stage was interrupted. The training loop would take one more step before it looks.
                trainer._load_from_checkpoint(str(checkpoint))
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Exception as error:
            message = full_disk_message(error, folder.path)
            if message is None:
                raise
            newest_checkpoint(folder.path)  # drops the half-written one, so that the reason can be written at all
            raise DQOError(message) from error
    if not trainer.accelerator.is_main_process:
        return
    output = folder.fresh_output()
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    if recipe.policy.lora is None:
        trained.save_pretrained(output)
    else:
        # The recipe's name of the base model, not this machine's path to it.
        trained.peft_config["default"].base_model_name_or_path = recipe.policy.model
        trained.save_pretrained(output, selected_adapters=["default"])
    tokenizer.save_pretrained(output)
    (output / "README.md").unlink(missing_ok=True)  # peft's template, with nothing filled in
    CheckpointCard(
        model=model_name,
        weights="full" if recipe.policy.lora is None else "adapter",
        base_model=recipe.policy.model,
        base_revision=locate(recipe.policy.model, recipe.policy.revision).revision
        or getattr(trained.config, "_commit_hash", None),
        stage_key=key,
        data_digest=card.digest,
        recipe_digest=recipe.digest,
        parent=None if parent is None else CheckpointCard.read(parent).stage_key,
        steps=args.max_steps,
        mlflow_run_id=run.id,
    ).write(output)
    write_jsonl(output / "history.jsonl", recorder.rows)
    run.folder(output, "checkpoint")
    folder.finish()
    shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)


def publish(folder: StageFolder, run: Run, destination: Path) -> None:
    """Hand the finished checkpoint to the pipeline, naming the MLflow run of this pipeline.

    A checkpoint that another pipeline has trained (same key) is shown in this pipeline's run as well: its history is
    logged there too.
    """
    if CheckpointCard.read(folder.output).mlflow_run_id != run.id:
        logged = run.last_step("train/loss")
        for row in read_jsonl(folder.output / "history.jsonl"):
            step = int(row.pop("step"))
            if step > logged:
                run.metrics({f"train/{name}": value for name, value in row.items()}, step)
        run.tags({"dqo.trained_in_run": CheckpointCard.read(folder.output).mlflow_run_id})
    folder.publish(destination)
    replace(CheckpointCard.read(destination), mlflow_run_id=run.id).write(destination)


def parameters(recipe: Recipe, args: DQOConfig) -> dict[str, Any]:
    """What MLflow's compare page shows of a training run."""
    names = (
        "alpha", "advantage", "score", "kernel_scale", "num_generations", "max_steps", "learning_rate", "temperature",
        "top_p", "max_completion_length", "beta", "loss_type", "scale_rewards", "seed", "bf16",
        "per_device_train_batch_size", "gradient_accumulation_steps",
    )  # fmt: skip
    return {
        "policy.model": recipe.policy.model,
        "policy.lora": json.dumps(recipe.policy.lora.model_dump()) if recipe.policy.lora else "full fine-tuning",
        "encoder.model": recipe.encoder.model,
        **{name: getattr(args, name) for name in names},
    }
