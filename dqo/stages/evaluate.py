"""Stage 4: sample from every model of the run under the same conditions, measure, and write the report."""

import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dqo import __version__, tracking
from dqo.bundled import locate
from dqo.checkpoint import CheckpointCard
from dqo.data import DataCard, read_rows
from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.evaluation import figures, report
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.figures import ModelResult
from dqo.evaluation.metrics import group_metrics
from dqo.evaluation.statistics import Interval, bootstrap_interval, paired_difference
from dqo.files import read_jsonl, write_jsonl, write_text
from dqo.gate import AskedJudge, decide
from dqo.generation import sample_texts
from dqo.health import judge as judge_health
from dqo.judges import build as build_judge
from dqo.judges import check as check_judge
from dqo.labels import label
from dqo.policy import default_device, end_of_turn_ids, load_for_inference, load_tokenizer
from dqo.progress import Progress
from dqo.recipe import Recipe
from dqo.rewards import Reward, build, score
from dqo.shell import dqo_command
from dqo.stages.context import Context, StageFolder, reward_identity, running, stage_key, with_identity
from dqo.stages.judging import Judged, ask, audit_figures, in_workspace, key_of, model_figures
from dqo.tasks import get_task


def run(context: Context, data: Path, checkpoints: list[Path], evaluation: Path) -> None:
    """Evaluate the base model and every checkpoint.

    Args:
        context: The pipeline run.
        data: Folder written by `prepare`.
        checkpoints: Folders written by `sft` and `rl`.
        evaluation: Folder to write: evaluation.json, responses.jsonl, plane.png, report.html; with a judge its audit,
            verdicts and scores.

    A judge that is down, or whose budget is spent, does not end the evaluation: it is handed on without the verdicts
    that are missing, its gate refuses, and the stage is not finished, so that a repeat asks for them.

    Raises:
        DQOError: If a checkpoint of the recipe is missing, or the judge can never answer (wrong key, unknown model).
    """
    recipe = context.recipe
    card = DataCard.read(data / "card.json")
    folders: dict[str, Path | None] = {"base": None}
    folders |= {CheckpointCard.read(path).model: path for path in checkpoints}
    missing = [name for name in recipe.model_names if name not in folders]
    if missing:
        raise DQOError(f"evaluation: no checkpoint of {', '.join(missing)} was handed over; got {', '.join(folders)}")
    keys = {name: _sampling_key(recipe, card, folders[name]) for name in recipe.model_names}
    # The parent run belongs to the key: the report links to it. The costly part, sampling, has keys without it.
    key = stage_key(
        models=keys,
        evaluation=recipe.evaluation.model_dump(),
        gate=recipe.gate.model_dump(),
        judge=key_of(recipe.judge),
        encoder=with_identity(recipe.encoder),
        health=recipe.rl.health.model_dump(),
        parent_run=context.parent_run_id,
    )
    with running(context, "evaluate", key) as (folder, progress):
        experiment = tracking.connect(recipe, context.mlflow_uri)
        with tracking.child_run(context.parent_run_id, "evaluate", "evaluate", key) as run_:
            if not folder.finished:
                if recipe.judge is not None:
                    check_judge(recipe.judge)  # before anything is sampled: its key may be missing
                rows = read_rows(data / "eval.jsonl")[: recipe.evaluation.prompts]
                # One for all models, loaded when the first of them has no responses in the workspace.
                reward = cache(lambda: build(recipe, get_task(recipe.task), default_device()))
                sampled = {
                    name: _sample(context, name, folders[name], keys[name], rows, reward, progress)
                    for name in recipe.model_names
                }
                judged = None
                if recipe.judge is not None:
                    reward.cache_clear()  # a reward model as judge may need its room
                    judge = build_judge(in_workspace(recipe.judge, context.workspace))
                    done = len(recipe.model_names)
                    judged = ask(judge, recipe, rows, sampled, lambda text: progress("step", done, done, text))
                    _tell(context, run_, judged, progress)
                _measure(context, folder, run_, experiment, card, rows, sampled, folders, judged)
                if recipe.judge is None or judged is None or judged.settled(recipe.judge.audit):
                    folder.finish()
            run_.folder(folder.output, "evaluation")
        folder.publish(evaluation)


def _tell(context: Context, run: tracking.Run, judged: Judged, progress: Progress) -> None:
    """Say on the runs, and to who watches, which judge it was and whether it is done."""
    state = {tracking.JUDGE_TAG: "complete" if judged.complete else "incomplete"}
    for handle in (run, tracking.Run(context.parent_run_id)):
        handle.tags(state)
    run.params({f"judge.{name}": value for name, value in judged.identity.items()})
    if not judged.complete:
        progress("warning", message=f"the judge is not done: {judged.reason}")
    elif not judged.audit.passed:
        progress("warning", message=f"the judge has not passed its audit: {'; '.join(judged.audit.faults)}")


def _sampling_key(recipe: Recipe, card: DataCard, checkpoint: Path | None) -> str:
    return stage_key(
        model=None if checkpoint is None else CheckpointCard.read(checkpoint).stage_key,
        policy=with_identity(recipe.policy),
        evaluation=recipe.evaluation.model_dump(include={"prompts", "n", "sampling", "batch_prompts"}),
        reward=reward_identity(recipe, get_task(recipe.task)),
        seed=recipe.seed,
        task=recipe.task,
        data=card.digest,
    )


def _sample(
    context: Context,
    name: str,
    checkpoint: Path | None,
    key: str,
    rows: list[dict[str, Any]],
    reward: Callable[[], Reward],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Responses and qualities of one model, a row a prompt; kept in the workspace by the model's own key."""
    recipe = context.recipe
    folder = StageFolder(context.workspace, f"responses-{name}", key)
    kept = folder.path / "responses.jsonl"
    batches = range(0, len(rows), recipe.evaluation.batch_prompts)
    position = recipe.model_names.index(name) * len(batches)
    total = len(recipe.model_names) * len(batches)
    if kept.is_file():
        progress("step", position + len(batches), total, label(recipe, name))
        return read_jsonl(kept)
    device = default_device()
    tokenizer = load_tokenizer(recipe.policy)
    model = load_for_inference(recipe.policy, device, checkpoint)
    ends = end_of_turn_ids(tokenizer, model)
    results = []
    for done, start in enumerate(batches):
        progress("step", position + done, total, label(recipe, name))
        batch = rows[start : start + recipe.evaluation.batch_prompts]
        # The same stream of random numbers for every model.
        generator = torch.Generator(device).manual_seed(recipe.seed * 1_000_003 + start)
        groups = sample_texts(
            model,
            tokenizer,
            [row["prompt"] for row in batch],
            recipe.evaluation.n,
            recipe.evaluation.sampling,
            ends,
            generator,
        )
        for row, group in zip(batch, groups, strict=True):
            results.append(
                {
                    "id": row["id"],
                    "prompt": row["prompt"][-1]["content"],
                    "model": name,
                    "responses": [one.text for one in group],
                    "qualities": score(reward(), [one.text for one in group], [row] * len(group)),
                    "truncated": [one.truncated for one in group],
                    "tokens": [one.tokens for one in group],
                }
            )
    write_jsonl(kept, results)
    return results


def _measure(
    context: Context,
    folder: StageFolder,
    run: tracking.Run,
    experiment: str,
    card: DataCard,
    rows: list[dict[str, Any]],
    sampled: dict[str, list[dict[str, Any]]],
    folders: dict[str, Path | None],
    judged: Judged | None,
) -> None:
    recipe = context.recipe
    settings = recipe.evaluation
    encoder = ResponseEncoder(recipe.encoder, default_device())
    intervals: dict[str, dict[str, Interval]] = {}
    models: dict[str, Any] = {}
    for name, results in sampled.items():
        texts = [text for result in results for text in result["responses"]]
        vectors = encoder(texts).vectors.view(len(results), settings.n, -1).cpu()
        per_prompt = group_metrics(
            [result["responses"] for result in results],
            vectors,
            [result["qualities"] for result in results],
            [result["truncated"] for result in results],
            [result["tokens"] for result in results],
        )
        intervals[name] = {
            metric: bootstrap_interval(values, settings.bootstrap_draws, settings.confidence, recipe.seed)
            for metric, values in per_prompt.items()
        }
        for result, volume in zip(results, per_prompt["log_volume"], strict=True):
            result["log_volume"] = round(float(volume), 4)
        models[name] = {
            "metrics": {metric: _finite(asdict(interval)) for metric, interval in intervals[name].items()},
            "per_prompt": {metric: [_number(v) for v in values] for metric, values in per_prompt.items()},
        }
    cards = {name: CheckpointCard.read(path) for name, path in folders.items() if path is not None}
    histories = {name: read_jsonl(path / "history.jsonl") for name, path in folders.items() if path is not None}
    method = recipe.method
    health = {
        name: judge_health(recipe.rl.health, histories[name], method.k, method.kernel_scale) for name in recipe.variants
    }
    output = folder.fresh_output()
    write_jsonl(output / "responses.jsonl", [result for results in sampled.values() for result in results])
    document: dict[str, Any] = {
        "models": models,
        "n": settings.n,
        "prompts": len(rows),
        "confidence": settings.confidence,
        "bootstrap_draws": settings.bootstrap_draws,
        "seed": recipe.seed,
        "directions": {name: metric.direction for name, metric in METRICS.items()},
        "stopped": {name: one.stopped["reason"] for name, one in cards.items() if one.stopped is not None},
        "health": {name: [finding.to_dict() for finding in findings] for name, findings in health.items()},
        "data_digest": card.digest,
        "recipe_digest": recipe.digest,
    }
    if judged is not None:
        document["judge"] = judged.document()
        judged.write(output)
    gate = decide(recipe.gate, document, asked=AskedJudge.of_the_evaluation(recipe.judge))
    document["gate"] = asdict(gate)
    write_text(output / "evaluation.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    runs = {name: checkpoint.mlflow_run_id for name, checkpoint in cards.items()}
    local = not context.mlflow_uri.startswith("http")
    against = recipe.gate.against
    data = report.ReportData(
        recipe=recipe,
        models=[
            ModelResult(
                name, label(recipe, name), intervals[name], _link(context.mlflow_uri, experiment, runs.get(name))
            )
            for name in sampled
        ],
        prompts=len(rows),
        histories=histories,
        examples=report.first_examples(
            [result for results in sampled.values() for result in results],
            {row["id"]: row.get("concepts", ()) for row in rows},
        ),
        data_card=asdict(card),
        links=report.Links(
            command=_ui_command(context) if local else None,
            experiment=_link(context.mlflow_uri, experiment, None),
            run=_link(context.mlflow_uri, experiment, context.parent_run_id),
        ),
        environment={
            "dqo-pipelines": __version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
            + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
            "policy": f"{recipe.policy.model} {locate(recipe.policy.model, recipe.policy.revision).revision or ''}",
            "encoder": f"{recipe.encoder.model} {locate(recipe.encoder.model, recipe.encoder.revision).revision or ''}",
            "recipe digest": recipe.digest,
            "MLflow run": context.parent_run_id,
        },
        differences={
            metric: paired_difference(
                models["dqo"]["per_prompt"][metric],
                models[against]["per_prompt"][metric],
                settings.bootstrap_draws,
                settings.confidence,
                recipe.seed,
            )
            for metric in METRICS
        },
        gate=report.Gate(gate.passed, gate.reasons),
        health=health,
        judge=document.get("judge"),
        said=_first_words(judged, rows),
    )
    report.write(data, output / "report.html")
    plane = figures.plane_figure(data.models, n=settings.n)
    plane.savefig(output / "plane.png", dpi=160)
    run.figure(plane, "plane.png")
    curves = {name: rows_ for name, rows_ in data.histories.items() if name != "sft"}
    run.figure(figures.learning_curves_figure(curves), "learning_curves.png")
    _log(run, runs, intervals, sampled, card, rows, context, document.get("judge"))


def _first_words(judged: Judged | None, rows: list[dict[str, Any]], count: int = 6) -> list[report.Said]:
    """What the judge said of the first pair of the first prompts by id, which the report shows the responses of."""
    if judged is None or "dqo" not in judged.comparisons:
        return []
    prompts = {row["id"]: row["prompt"][-1]["content"] for row in rows}
    compared = sorted(judged.comparisons["dqo"].prompts, key=lambda one: one.id)[:count]
    return [
        report.Said(prompts[one.id], one.comparisons[0].verdict, one.comparisons[0].orders, one.comparisons[0].reasons)
        for one in compared
    ]


def _log(
    run: tracking.Run,
    runs: dict[str, str],
    intervals: dict[str, dict[str, Interval]],
    sampled: dict[str, list[dict[str, Any]]],
    card: DataCard,
    rows: list[dict[str, Any]],
    context: Context,
    judge: dict[str, Any] | None,
) -> None:
    """The same metric names on every model's own run, so that MLflow's compare page lines them up."""
    run.dataset(rows, card.task, card.digest, card.source, "evaluation")
    run.params({"n": context.recipe.evaluation.n, "prompts": len(rows)})
    columns: dict[str, list[Any]] = {"prompt": [row["prompt"][-1]["content"] for row in rows]}
    for name, results in sampled.items():
        columns[name] = ["\n".join(result["responses"]) for result in results]
    run.table(columns, "responses_side_by_side.json")
    if judge is not None:
        requests = {} if judge["requests"] is None else {"judge/requests": float(judge["requests"])}
        run.metrics(audit_figures(judge) | requests)
    summary: dict[str, list[Any]] = {"model": [], "metric": [], "mean": [], "low": [], "high": []}
    for name, metrics in intervals.items():
        values: dict[str, float] = {}
        for metric, interval in metrics.items():
            values |= {
                f"eval/{metric}": interval.mean,
                f"eval/{metric}_low": interval.low,
                f"eval/{metric}_high": interval.high,
            }
            for column, value in zip(summary, (name, metric, interval.mean, interval.low, interval.high), strict=True):
                summary[column].append(value)
        if judge is not None:
            values |= model_figures(judge, name)
        if name in runs:
            tracking.Run(runs[name]).metrics(values)
        else:
            with tracking.child_run(context.parent_run_id, name, "model", stage_key(model=name)) as base:
                base.metrics(values)
                base.params({"policy.model": context.recipe.policy.model})
        if name == "dqo":
            tracking.Run(context.parent_run_id).metrics(values)
    run.table(summary, "metrics.json")


def _link(uri: str, experiment: str, run_id: str | None) -> str:
    """Address in MLflow's page; a local sqlite store is served by `dqo ui` on MLflow's usual port."""
    return tracking.run_link(uri if uri.startswith("http") else "http://127.0.0.1:5000", experiment, run_id)


def _ui_command(context: Context) -> str:
    """The command that serves the local store, which lies beside the workspace."""
    folder = context.workspace.resolve().parent
    return dqo_command("ui") if folder == Path.cwd() / "runs" else dqo_command("ui", "--out", folder)


def _number(value: float) -> float | None:
    return float(value) if value == value else None


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}
