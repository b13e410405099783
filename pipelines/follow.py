"""The commands `run` and `ui`: what they print, and how they end."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from dqo.errors import DQOError
from dqo.recipe import Recipe
from dqo.shell import dqo_command, short
from pipelines import local
from pipelines.display import Follower, summary, watch


def run(
    recipe: Recipe, recipe_path: Path, out: Path, fresh: bool, runner: str = "subprocess", network: str | None = None
) -> int:
    """Run a recipe's pipeline on this machine, show its progress and its result; returns the exit status.

    Args:
        recipe: The recipe.
        recipe_path: Its file.
        out: Folder of runs.
        fresh: Forget finished stages and checkpoints.
        runner: `subprocess`, or `docker` for a container each stage.
        network: Docker network of the containers; None chooses one.

    Raises:
        DQOError: If it cannot start, or a stage stopped for a reason that the user can change.
    """
    console = Console(highlight=False)
    if network is not None and runner != "docker":
        raise DQOError("--network: is for containers; expected --runner docker with it")
    where = () if out == Path("runs") else ("--out", out)
    how = (*(("--runner", runner) if runner == "docker" else ()), *(("--network", network) if network else ()))
    again = dqo_command("run", recipe_path, *where, *how)
    folder = local.RunFolder.of(recipe, out)
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DQOError(f"--out {out}: cannot be created ({error.strerror})") from None
    begin = time.time()
    console.print(f"Recipe [bold]{recipe.name}[/] ({recipe.digest}); log: {short(folder.log)}", soft_wrap=True)
    progress = folder.workspace / "progress" / f"{recipe.name}-{recipe.digest}.jsonl"
    follower = Follower(recipe, progress, fresh)
    docker = local.Docker(network=network) if runner == "docker" else None
    process = local.start(recipe, folder, fresh, docker)
    try:
        watch(console, follower, process)
    except KeyboardInterrupt:
        console.print("Stopping the running stage ...")
        local.stop(process)
        console.print(
            f"Interrupted. Nothing is lost behind the newest checkpoint; continue with:\n  {again}", soft_wrap=True
        )
        return 130
    finally:
        if docker is not None:
            from pipelines.containers import stop_all

            stop_all(docker.token)  # should the runner have been killed
    if process.returncode != 0 or not folder.result.is_file():
        reason = follower.error or _last_lines(folder.log)
        raise DQOError(f"{reason}\nThe log is {short(folder.log)}. When it is mended, continue with:\n  {again}")
    result = json.loads(folder.result.read_text(encoding="utf-8"))
    console.print()
    summary(console, _labels(recipe), result["metrics"], result["confidence"])
    registration = result["registration"]
    console.print()
    for reason in registration["gate"]["reasons"]:
        console.print(f"  gate: {reason}", soft_wrap=True)
    state = "passed" if registration["gate"]["passed"] else "not passed"
    console.print(f"  gate {state}; registered {registration['name']} version {registration['version']} as "
                  f"{', '.join(registration['aliases'])}", soft_wrap=True)  # fmt: skip
    console.print()
    console.print(f"Report: {short(folder.report)}", soft_wrap=True)
    console.print(f"MLflow: {_mlflow(result, folder, where)}", soft_wrap=True)
    memory = f", at most {result['peak_memory_gib']:.1f} GiB in a stage" if result["peak_memory_gib"] > 0.1 else ""
    hint = "a repeat reuses what is there (--fresh trains anew)"
    console.print(f"[dim]{time.time() - begin:.0f} s{memory}; {hint}[/]", soft_wrap=True)
    return 0


def open_mlflow(out: Path, port: int) -> int:
    """Serve MLflow's page on the local store until Ctrl-C; returns the exit status.

    Raises:
        DQOError: If there is no store.
    """
    store = out.resolve() / "mlflow.db"
    if not store.is_file():
        raise DQOError(f"{store}: no MLflow store; run a recipe first, or give its folder with --out")
    from dqo.tracking import default_uri

    link = f"http://127.0.0.1:{port}/"
    latest = _latest_run(default_uri(out))
    print(f"MLflow: {link}{latest}  (Ctrl-C ends it)", flush=True)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", default_uri(out)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.execv(sys.executable, command)


def _latest_run(uri: str) -> str:
    """Path of the newest pipeline run in MLflow's page; empty where there is none."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(
        # By its end: a repeated run keeps its start.
        experiments,
        "tags.`dqo.stage` = 'pipeline'",
        max_results=1,
        order_by=["attributes.end_time DESC"],
    )
    return f"#/experiments/{found[0].info.experiment_id}/runs/{found[0].info.run_id}" if found else ""


def _labels(recipe: Recipe) -> dict[str, str]:
    from dqo.labels import label

    return {name: label(recipe, name) for name in recipe.model_names}


def _mlflow(result: dict[str, Any], folder: local.RunFolder, where: tuple[str | Path, ...]) -> str:
    """The one command, or the address, that opens this run in MLflow."""
    from dqo.tracking import default_uri, run_link

    uri = result["mlflow_uri"]
    if uri == default_uri(folder.root):
        return dqo_command("ui", *where)
    return run_link(uri, result["mlflow_experiment"], result["mlflow_run"]) or f"run {result['mlflow_run']} in {uri}"


def _last_lines(log: Path, count: int = 8) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "the pipeline failed; its last words:\n  " + "\n  ".join(lines[-count:])
