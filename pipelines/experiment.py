"""The command `experiment`: a grid of runs from one file, each a model trained and evaluated.

A job is one recipe: the stages prepare, SFT, RL and evaluate in one process of its own, without Kubeflow, so that a
grid on a laptop does not pay for five starts a run. Jobs share the workspace, so equal stages (the data, the SFT
checkpoint of a seed) are done once. A finished job leaves one row in the results file and its responses beside it;
these are all that the page of results is made of, so a grid can be run in pieces and on several machines.
"""

import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from dqo.errors import DQOError
from dqo.files import read_jsonl, write_text
from dqo.recipe import Recipe, parse
from dqo.shell import dqo_command, short
from pipelines.grid import Cell, Experiment, Results, expand, measured, read

if TYPE_CHECKING:
    from dqo.tracking import Run


def run(
    path: Path,
    out: Path,
    results_folder: Path | None,
    parts: list[str] | None,
    page: Path | None,
    only: Literal["plan", "page"] | None,
) -> int:
    """Run what is missing of an experiment and write its page; returns the exit status, 1 if a job failed.

    Args:
        path: The experiment file.
        out: Folder of checkpoints and MLflow, as of `dqo run`.
        results_folder: Where results are kept; `None` takes `<out>/experiments`.
        parts: Only these parts; `None` takes all.
        page: Where the page of results is written; `None` takes `<name>.md` beside the results.
        only: `plan`: only say what would be run; `page`: only write the page of what is finished.

    Raises:
        DQOError: If the file is not valid or MLflow does not answer.
    """
    experiment = read(path)
    cells = expand(experiment, path)
    known = [part.name for part in experiment.parts]
    for name in parts or ():
        if name not in known:
            raise DQOError(f"--part: got {name!r}; expected one of: {', '.join(known)}")
    chosen = [cell for cell in cells if parts is None or cell.part in parts]
    results = Results(results_folder or out / "experiments", experiment.name)
    done, outdated = results.current(cells)
    jobs: dict[str, Cell] = {}
    for cell in chosen:
        jobs.setdefault(cell.key, cell)
    missing = [cell for key, cell in jobs.items() if key not in done]
    console = Console(highlight=False)
    console.print(
        f"Experiment [bold]{experiment.name}[/]: {len(chosen)} runs, {len(jobs)} of them different, {len(missing)} to "
        f"do; results: {short(results.path)}",
        soft_wrap=True,
    )
    for key, differences in outdated.items():
        if key in jobs:
            console.print(
                f"  {jobs[key].title}: has a result of another recipe, which does not count: {'; '.join(differences)}",
                markup=False,
                soft_wrap=True,
            )
    warned: dict[str, str] = {}
    for cell in jobs.values():
        for warning in cell.recipe.warnings:
            warned.setdefault(warning, cell.title)  # each once, of the first run that it is about
    for warning, title in warned.items():
        console.print(f"  warning: {title}: {warning}", markup=False, soft_wrap=True)
    if only == "plan":
        for key, cell in jobs.items():
            mark = "done" if key in done else "to do"
            console.print(f"  {mark:5}  {cell.part:12}  {cell.title}", markup=False, soft_wrap=True)
        return 0
    failed: list[Cell] = []
    try:
        if missing and only is None:
            failed = _run_missing(console, experiment, missing, out, results)
    except KeyboardInterrupt:
        console.print(
            f"Interrupted; repeat the command to continue:\n  {dqo_command('experiment', path)}", soft_wrap=True
        )
        return 130
    finally:
        if results.path.is_file():
            from pipelines.results import write_page  # heavy: matplotlib, scipy

            where = page or results.path.with_suffix(".md")
            # Not `dqo_command`: the page is read elsewhere than here.
            words = ["dqo", "experiment", short(path), "--results", short(results.folder), "--page", short(where)]
            write_page(experiment, cells, results, where, shlex.join(words))
            console.print(f"Results: {short(where)}", soft_wrap=True)
    if failed:
        console.print(f"{len(failed)} of {len(missing)} runs failed; repeat the command to try them again", style="red")
    return 1 if failed else 0


def _run_missing(
    console: Console, experiment: Experiment, missing: list[Cell], out: Path, results: Results
) -> list[Cell]:
    """Run jobs one after another; returns those that failed."""
    failed = []
    parent = _open_parent(experiment, missing[0].recipe, out)
    status = "KILLED"
    try:
        for number, cell in enumerate(missing, start=1):
            console.print(f"\\[{number}/{len(missing)}] {cell.title}", soft_wrap=True)
            error = _run_job(console, cell, out, parent.id, results)
            if error is not None:
                failed.append(cell)
                console.print(f"  failed: {error}", markup=False, soft_wrap=True)
        status = "FAILED" if failed else "FINISHED"
    finally:
        parent.finish(status)
    return failed


def _open_parent(experiment: Experiment, recipe: Recipe, out: Path) -> "Run":
    """The MLflow run above all jobs, running from now on."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from dqo import tracking
    from pipelines.local import tracking_uri

    uri = tracking_uri(recipe, out.resolve())
    experiment_id = tracking.connect(recipe, uri)
    memory = out / "workspace" / "runs" / f"experiment-{experiment.name}.json"
    client = MlflowClient(uri)
    if memory.is_file():
        run = tracking.Run(json.loads(memory.read_text(encoding="utf-8"))["run_id"])
        try:
            if client.get_run(run.id).info.lifecycle_stage == "active":
                client.update_run(run.id, "RUNNING")
                return run
        except MlflowException:
            pass  # another store; a new run is made there
    created = client.create_run(experiment_id, run_name=experiment.name, tags={tracking.STAGE_TAG: "experiment"})
    write_text(memory, json.dumps({"run_id": created.info.run_id}) + "\n")
    return tracking.Run(created.info.run_id)


def _run_job(console: Console, cell: Cell, out: Path, parent: str, results: Results) -> str | None:
    """Run one job in a process of its own and keep its result; returns why it failed, else None."""
    from pipelines.display import Follower, watch
    from pipelines.local import stop, tracking_uri

    folder = (out / "jobs" / cell.key).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "recipe": cell.recipe.to_json(),
        "workspace": str((out / "workspace").resolve()),
        "mlflow_uri": tracking_uri(cell.recipe, out.resolve()),
        "parent": parent,
        "title": cell.title,
    }
    write_text(folder / "job.json", json.dumps(job))
    (folder / "result.json").unlink(missing_ok=True)
    follower = Follower(
        cell.recipe, Path(job["workspace"]) / "progress" / f"{cell.recipe.name}-{cell.recipe.digest}.jsonl"
    )
    follower.stages.pop("register")
    log = folder / "log.txt"
    begin = time.time()
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.experiment", str(folder)],
            stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        watch(console, follower, process)
    except KeyboardInterrupt:
        stop(process)
        raise
    if process.returncode != 0 or not (folder / "result.json").is_file():
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{follower.error or (words[-1] if words else 'no reason was given')} (log: {short(log)})"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    row = {
        "key": cell.key,
        "label": cell.label,
        "run": cell.run,
        "seed": cell.seed,
        "seconds": round(time.time() - begin),
        **result,
    }
    results.add(row, read_jsonl(folder / "evaluation" / "responses.jsonl"))
    return None


def _work(folder: Path) -> None:
    """Body of a job's process: the stages one after another."""
    from mlflow import MlflowClient

    from dqo.stages import evaluate, prepare, rl, sft
    from dqo.stages.context import Context
    from dqo.tracking import PARENT_TAG, Run
    from pipelines.local import library_digest

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    recipe = parse(job["recipe"])
    workspace, uri = Path(job["workspace"]), job["mlflow_uri"]
    data, first, trained = folder / "data", folder / "sft", folder / "rl"
    prepare.run(Context(recipe, workspace, uri), data)
    context = Context.after_prepare(recipe, workspace, uri, data)
    client = MlflowClient(uri)
    client.set_tag(context.parent_run_id, PARENT_TAG, job["parent"])
    client.set_tag(context.parent_run_id, "mlflow.runName", job["title"])
    sft.run(context, data, first)
    rl.run(context, "dqo", data, first, trained)
    evaluate.run(context, data, [first, trained], folder / "evaluation")
    Run(context.parent_run_id).finish()
    evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    result = {
        "task": recipe.task,
        "recipe": measured(recipe),
        "stopped": evaluation["stopped"].get("dqo"),
        "method": recipe.method.model_dump(mode="json", exclude={"baselines"}),
        "temperature": recipe.evaluation.sampling.temperature,
        "library": library_digest(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "mlflow_run": context.parent_run_id,
        "data_digest": evaluation["data_digest"],
        "prompts": evaluation["prompts"],
        "n": evaluation["n"],
        "models": {
            name: {
                metric: [None if value is None else round(value, 5) for value in values]
                for metric, values in model["per_prompt"].items()
            }
            for name, model in evaluation["models"].items()
        },
        "history": [
            {name: float(f"{value:.5g}") for name, value in row.items()}
            for row in read_jsonl(trained / "history.jsonl")
        ],
    }
    write_text(folder / "result.json", json.dumps(result))


if __name__ == "__main__":
    try:
        _work(Path(sys.argv[1]))
    except DQOError as failure:
        sys.exit(str(failure))
