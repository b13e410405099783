"""What SFT and RL share: the trainer's configuration, checkpoints and resuming, logging, the finished checkpoint."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from dqo.bundled import locate
from dqo.checkpoint import CheckpointCard
from dqo.data import DataCard
from dqo.defences import embedded_text
from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.files import read_jsonl, write_jsonl
from dqo.health import Finding, Monitor
from dqo.policy import default_device, load_tokenizer, resolve_dtype, trainable
from dqo.progress import Progress
from dqo.recipe import Recipe, Rl, Sft
from dqo.stages.context import Context, StageFolder, full_disk_message
from dqo.tasks import get_task
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
    "no_bonus_min_quality": "no_bonus_rate/min_quality",
    "no_bonus_drop_truncated": "no_bonus_rate/drop_truncated",
    "no_bonus_max_tokens": "no_bonus_rate/max_tokens",
    "no_bonus_min_prompt_similarity": "no_bonus_rate/min_prompt_similarity",
    "no_bonus_no_answer": "no_bonus_rate/no_answer",
    "encoder_cut_share": "encoder_cut_share",
    "encoder_cut_prompts": "encoder_cut_share/prompts",
    "encoder_cut_references": "encoder_cut_share/references",
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


def configuration(recipe: Recipe, section: Sft | Rl, folder: Path, **settings: Any) -> dict[str, Any]:
    """Translate a recipe's training section into the settings of each process's `DQOConfig`.

    Every TRL default that changes what is optimised is set here explicitly. The recipe has checked that a step divides
    over the processes.
    """
    k = settings.pop("num_generations", recipe.method.k)
    rows = section.prompts_per_step * k // recipe.processes
    micro = section.micro_batch or rows
    device = default_device()
    accumulation = rows // micro
    return dict(
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
        combine=recipe.method.combine,
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
        self.logged = run.last_step("train/loss")
        self.rows: list[dict[str, float]] = []
        self._cut_told: set[str] = set()

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
        self._tell_what_is_cut(row)
        if state.global_step <= self.logged:
            return  # trained again after an interruption, and in MLflow already
        if self._tables is not None:
            self._tables(state.global_step)
        self._run.metrics({f"train/{name}": value for name, value in row.items()}, state.global_step)

    def _tell_what_is_cut(self, row: dict[str, float]) -> None:
        """Once for prompts and once for references: unlike responses, these do not change as training goes on."""
        for name in ("prompts", "references"):
            share = row.get(f"encoder_cut_{name}", 0.0)
            if share > 0 and name not in self._cut_told:
                self._cut_told.add(name)
                message = (
                    f"the encoder reads {share:.0%} of this step's {name} in part only: what comes behind its limit is "
                    "in no similarity (encoder.max_tokens, or the encoder's own limit)"
                )
                self._progress("warning", message=message)
                self._run.tags({f"dqo.encoder_cut_{name}": message})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._run.metrics({"train/checkpoint": state.global_step}, state.global_step)


class _Together(TrainerCallback):
    """What all processes have to agree on; stands behind the callbacks that decide something, in every process."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A process that stops or saves alone would leave the others waiting for it."""
        if torch.distributed.is_initialized():
            wanted = torch.tensor([control.should_training_stop, control.should_save], device=args.device).int()
            torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX)
            control.should_training_stop, control.should_save = map(bool, wanted.tolist())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint is complete when each process has written its part."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _COMPLETE).touch()


class _Health(TrainerCallback):
    """Judges each step that the recorder has written down; says what a rule finds, and ends training where it asks."""

    def __init__(self, monitor: Monitor, recorder: _Recorder, run: Run, progress: Progress) -> None:
        self._monitor = monitor
        self._recorder = recorder
        self._run = run
        self._progress = progress

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "train_runtime" in kwargs["logs"]:
            return
        found = self._monitor.update(self._recorder.rows[-1])
        report_findings(found, self._run, self._progress, self._recorder.logged)
        if self._monitor.stop is not None:
            control.should_save = control.should_training_stop = True


def report_findings(findings: list[Finding], run: Run, progress: Progress, logged: int) -> None:
    """Say what health rules found: in the display, and in MLflow as a metric of its step and a tag with the reason.

    Args:
        findings: New ones.
        run: The training run.
        progress: The stage's.
        logged: Step up to which the run holds its metrics already.
    """
    for finding in findings:
        ending = "training stopped, " if finding.action == "stop" else ""
        progress("warning", message=ending + finding.reason)
        if finding.step > logged:
            run.metrics({f"health/{finding.rule}": finding.value}, finding.step)
        run.tags({f"dqo.health.{finding.rule}": finding.reason})
        if finding.action == "stop":
            run.tags({"dqo.stopped": finding.reason})


def _history_until(folder: Path, step: int) -> list[dict[str, float]]:
    """Rows of the steps that a checkpoint holds; those behind it are trained again."""
    history = folder / "history.jsonl"
    return [row for row in read_jsonl(history) if row["step"] <= step] if history.is_file() else []


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a stage folder; incomplete ones, left by a kill, are removed."""
    found = sorted(
        (folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-"))
    )
    complete = [path for path in found if (path / _COMPLETE).is_file()]
    for path in set(found).difference(complete):
        shutil.rmtree(path, ignore_errors=True)  # another process of the stage may be removing it too
    return complete[-1] if complete else None


def _load_trained(trainer: DQOTrainer, checkpoint: Path) -> None:
    """Load the weights of a checkpoint behind which nothing is trained; every process has to call it.

    Args:
        trainer: New: its model is not wrapped yet.
        checkpoint: A complete checkpoint of the same number of processes and the same strategy.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        # What the training loop does before its first step. Split weights are not loaded without it, and DeepSpeed's
        # engine, which alone puts them together, is not there.
        trainer._prepare_for_training(trainer.args.max_steps, trainer.get_train_dataloader(), str(checkpoint))
    else:
        trainer._load_from_checkpoint(str(checkpoint))


def _whole_weights(trainer: DQOTrainer) -> dict[str, torch.Tensor] | None:
    """Put the trained weights together where the processes share them out; every process has to call it.

    Args:
        trainer: With a model that was trained, or loaded by `_load_trained`.

    Returns:
        By name, in the first process; of an adapter that ZeRO-3 has trained, the trained weights alone. `None` where
        the model holds its weights itself, and what the strategy makes of it in the other processes.
    """
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        return None
    wrapped: Any = trainer.model_wrapped  # DeepSpeed's engine, or FSDP's model; `trainer.model` is never the engine
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        # What accelerate's `get_state_dict` calls, which refuses where zero3_save_16bit_model is false. That says what
        # the checkpoints between hold; the finished one always holds whole weights. transformers calls it likewise, to
        # leave out frozen weights, which would all be copied to the CPU for nothing.
        weights: dict[str, torch.Tensor] | None = wrapped._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters=isinstance(trainer.model, PeftModel)
        )
        return weights
    gathered: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(wrapped)
    return gathered


def train(
    context: Context,
    folder: StageFolder,
    progress: Progress,
    run: Run | None,
    *,
    model_name: str,
    key: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    parent: Path | None,
    card: DataCard,
    prompts_per_step: int,
    encoder: ResponseEncoder | None = None,
    reward: Callable[..., list[float | None]] | None = None,
    table_every: int | None = None,
    monitor: Monitor | None = None,
) -> None:
    """Train from the newest complete checkpoint to the last step and leave the finished checkpoint in the output.

    Where a stage has several processes, each of them calls this; the first one writes.

    Args:
        context: The pipeline run.
        folder: The stage's folder.
        progress: Reports steps.
        run: The stage's MLflow run; `None` in all processes but the first, which report nothing.
        model_name: `sft`, `reward_only` or `dqo`.
        key: The stage's key, recorded as lineage.
        settings: See `configuration`.
        rows: Training rows; column `prompt` and whatever the reward needs.
        parent: Checkpoint to start from, `None` for the base model.
        card: The data's card.
        prompts_per_step: Prompts in a step, for the check that the data fills one.
        encoder: The recipe's encoder where it is loaded already; `None` loads it if it is needed.
        reward: TRL reward function; `None` trains on demonstrations.
        table_every: Steps between tables of responses in MLflow; `None` logs none.
        monitor: New, with the health rules that may end training; `None` asks for none.

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
    # Before the configuration: with ZeRO-3, every model that is loaded behind it is split over the processes.
    embeds = settings["alpha"] > 0 or reward is not None
    if embeds and encoder is None:
        encoder = ResponseEncoder(recipe.encoder, device)
    args = DQOConfig(**settings)
    set_seed(recipe.seed)  # a new adapter is drawn before the trainer sets its seed
    model = trainable(recipe.policy, device, parent)

    def tables(step: int) -> None:
        if run is None or table_every is None or (step % table_every and step != 1 and step != args.max_steps):
            return
        logs: dict[str, Any] = trainer._logs
        columns: dict[str, list[Any]] = {
            "prompt": [prompt[-1]["content"] for prompt in logs["prompt"]],
            "response": [completion[-1]["content"] for completion in logs["completion"]],
        }
        columns |= {name: list(values) for name, values in logs["rewards"].items()}
        columns["advantage"] = list(logs["advantages"])
        run.table({"step": [step] * len(columns["prompt"]), **columns}, "completions.json", append=True)

    recorder = None if run is None else _Recorder(folder.path, run, progress, tables if reward is not None else None)
    callbacks: list[TrainerCallback] = []
    if run is not None and recorder is not None:
        callbacks.append(recorder)
        if monitor is not None:
            callbacks.append(_Health(monitor, recorder, run, progress))  # judges the row that the recorder has written
    callbacks.append(_Together())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = DQOTrainer(
            args=args,
            model=model,
            encoder=encoder,
            embedded_text=embedded_text(
                recipe.method.defences.embed, recipe.method.defences.strip_reasoning, get_task(recipe.task)
            ),
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        checkpoint = newest_checkpoint(folder.path)
        done = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
        before = _history_until(folder.path, done)
        if monitor is not None:
            # In every process, so that all know whether training goes on.
            for row in before:
                found = monitor.update(row)
                if run is not None and recorder is not None:
                    report_findings(found, run, progress, recorder.logged)
        if recorder is not None:
            recorder.rows = before
            if checkpoint is not None:
                progress("step", done, args.max_steps, f"continuing from {checkpoint.name}")
        try:
            if checkpoint is not None and (done >= args.max_steps or (monitor is not None and monitor.stop)):
                # Only the end of the stage was interrupted. The training loop would take one more step before it looks.
                _load_trained(trainer, checkpoint)
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Exception as error:
            message = full_disk_message(error, folder.path)
            if message is None:
                raise
            newest_checkpoint(folder.path)  # drops the half-written one, so that the reason can be written at all
            raise DQOError(message) from error
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    weights = _whole_weights(trainer)
    if run is None or recorder is None:
        return
    stopped = None if monitor is None else monitor.stop
    output = folder.fresh_output()
    if recipe.policy.lora is None:
        trained.save_pretrained(output, state_dict=weights)
    else:
        # The recipe's name of the base model, not this machine's path to it.
        trained.peft_config["default"].base_model_name_or_path = recipe.policy.model
        trained.save_pretrained(output, selected_adapters=["default"], state_dict=weights)
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
        steps=args.max_steps if stopped is None else stopped.step,
        mlflow_run_id=run.id,
        stopped=None if stopped is None else stopped.to_dict(),
    ).write(output)
    write_jsonl(output / "history.jsonl", recorder.rows)


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


def parameters(recipe: Recipe, settings: dict[str, Any]) -> dict[str, Any]:
    """What MLflow's compare page shows of a training run; the names are those of docs/metrics.md."""
    names = (
        "alpha", "advantage", "score", "combine", "kernel_scale", "distinct_threshold", "num_generations", "max_steps",
        "learning_rate", "temperature", "top_p", "max_completion_length", "beta", "loss_type", "scale_rewards", "seed",
        "bf16", "per_device_train_batch_size", "gradient_accumulation_steps",
    )  # fmt: skip
    # Conditions of a bonus are those of RL; what is embedded of a response counts in SFT too.
    everywhere = {"embed", "strip_reasoning"}
    defences = {
        name: value
        for name, value in recipe.method.defences.model_dump().items()
        if name in settings or name in everywhere
    }
    return {
        "policy.model": recipe.policy.model,
        "policy.lora": json.dumps(recipe.policy.lora.model_dump()) if recipe.policy.lora else "full fine-tuning",
        "encoder.model": recipe.encoder.model,
        **{f"distributed.{name}": value for name, value in recipe.layout.items()},
        **{name: settings[name] for name in names},
        **{f"defences.{name}": value for name, value in defences.items()},
    }
