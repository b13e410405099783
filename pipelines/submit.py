"""The command `submit`: a recipe's pipeline on a Kubeflow server, a run of it, and its progress."""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import kfp_server_api as api
from rich.console import Console

from dqo.errors import DQOError
from dqo.recipe import Recipe
from pipelines.display import Display, Follower, StageState
from pipelines.kubeflow import Access, Server, Unreachable, connected, parameters, require_no_password

_SECONDS = 3.0  # between two questions
_PATIENCE = 600.0  # seconds without an answer after which watching gives up; the run goes on
_ENDED = {"SUCCEEDED": 0, "FAILED": 1, "CANCELED": 1}
_PENDING = 300.0  # seconds after which a task that no node has taken is spoken of
_STAGES = {
    "preflight": "preflight",
    "prepare": "prepare",
    "dqo-sft": "sft",
    "evaluate": "evaluate",
    "register": "register",
    "finish": "finish",
}
_SEVERAL = "dqo-rl"


def run(
    recipe: Recipe,
    access: Access,
    mlflow_uri: str | None = None,
    watch: bool = False,
    start: bool = True,
    service_account: str | None = None,
) -> int:
    """Upload a recipe's pipeline, start a run and print its link; returns the exit status.

    Args:
        recipe: The recipe.
        access: The server.
        mlflow_uri: MLflow's address as the tasks see it; None leaves the recipe's, or that of their environment.
        watch: Follow the run; the status is then the run's.
        start: Whether to start a run; without it, only the pipeline version is uploaded.
        service_account: Account that the run's tasks run as; None takes Kubeflow's.

    Raises:
        DQOError: If MLflow's address holds a password, or the server cannot be used or refuses something.
    """
    require_no_password(mlflow_uri, "--mlflow-uri")
    console = Console(highlight=False)
    with connected(access) as server:
        experiment = server.experiment_id() if start else ""
        uploaded = server.upload(recipe)
        state = "uploaded" if uploaded.new else "there already"
        console.print(f"Pipeline version {uploaded.name} ({state})", soft_wrap=True)
        if not start:
            return 0
        body = api.V2beta1Run(
            display_name=f"{recipe.name} {time.strftime('%Y-%m-%d %H:%M:%S')}",
            experiment_id=experiment,
            pipeline_version_reference=uploaded.reference,
            runtime_config=parameters(recipe, mlflow_uri),
            service_account=service_account,
        )
        started = server.call("start a run", server.runs.run_service_create_run, body)
        if not started.run_id:
            raise server.page()
        console.print(f"Run: {server.run_link(started.run_id)}", soft_wrap=True, markup=False)
        return _watch(console, server, recipe, started.run_id) if watch else 0


class RunFollower(Follower):
    """Reads the states of a run's tasks from Kubeflow and tells them as the stages of a local run would."""

    def __init__(self, recipe: Recipe, server: Server, run_id: str) -> None:
        super().__init__(recipe)
        # Only a cluster's pipeline has these two (pipelines/pipeline.py).
        self.stages = {"preflight": StageState("Preflight"), **self.stages, "finish": StageState("Finish")}
        self._variants = recipe.variants
        self._server = server
        self._run_id = run_id
        self._told: dict[str, set[str]] = {}
        self._pending: dict[str, tuple[float, float]] = {}  # stage -> monotonic and wall clock when first seen so
        self._heard = time.monotonic()
        self.state = ""
        self.reason = ""

    def _read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Ask once.

        Raises:
            DQOError: If the server refuses, answers with something else than the run, or has not answered for ten
                minutes.
        """
        try:
            answer = self._server.call("ask for the run", self._server.runs.run_service_get_run, self._run_id)
        except Unreachable:
            if time.monotonic() - self._heard > _PATIENCE:
                raise
            return
        if not answer.run_id:
            raise self._server.page()
        self._heard = time.monotonic()
        self.state = answer.state or ""
        tasks = (answer.run_details and answer.run_details.task_details) or []
        found = stages(tasks, self._variants)
        for stage, task in found:
            for event in self._events(stage, task):
                yield stage, event
        for stage in self._waiting(tasks, found):
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._pending[stage][1]))
            yield stage, {"event": "warning", "message": f"waits for a node (PENDING since {since})"}
        self.reason = "; ".join(self._reasons(tasks, found, answer.error))

    def _waiting(self, tasks: list[Any], found: list[tuple[str, Any]]) -> list[str]:
        """Stages of which something has been pending for long, each once."""
        owner = _owners(tasks, found)
        pending = {owner[task.task_id] for task in tasks if task.state == "PENDING" and task.task_id in owner}
        now, long = (time.monotonic(), time.time()), []
        self._pending = {stage: self._pending.get(stage, now) for stage in pending}
        for stage in self.stages:
            told = self._told.setdefault(stage, set())
            if stage not in pending:
                self.stages[stage].warnings.clear()  # a node has it
            elif now[0] - self._pending[stage][0] >= _PENDING and "pending" not in told:
                told.add("pending")
                long.append(stage)
        return long

    def _reasons(self, tasks: list[Any], found: list[tuple[str, Any]], error: Any) -> list[str]:
        """Why a run failed: what its failed tasks say, the stages' own words first, nothing twice."""
        stage_of = {task.task_id: stage for stage, task in found}
        owner = _owners(tasks, found)
        parts: dict[str, str] = {}  # stage -> what the first failed part of it says
        for task in tasks:
            if task.state == "FAILED" and task.task_id in owner and _words(task):
                parts.setdefault(owner[task.task_id], _words(task))
        lines, said = [], set()
        for task in sorted(tasks, key=lambda task: task.task_id not in stage_of):  # else in the server's order
            words = _words(task)
            if task.task_id in stage_of and task.state in ("FAILED", "CANCELED"):
                stage = stage_of[task.task_id]
                words = words or parts.get(stage, "")
                lines.append(f"{self.stages[stage].title}: {words or _no_words(task)}")
            elif words and words not in said and task.state == "FAILED":
                # What a stage is made of, or a group of stages; these often repeat what is told already.
                title = self.stages[owner[task.task_id]].title if task.task_id in owner else task.display_name
                lines.append(f"{title or 'a task'}: {words}")
            else:
                continue
            said.add(words)
        if error and error.message and error.message not in said:
            lines.append(error.message)
        return lines

    def _events(self, stage: str, task: Any) -> Iterator[dict[str, Any]]:
        """What is new of a task, each thing once."""
        told, state = self._told.setdefault(stage, set()), task.state
        begin = _seconds(task.start_time) or _seconds(task.create_time) or time.time()
        end = _seconds(task.end_time) or time.time()
        wanted: list[dict[str, Any]] = []
        if state == "SKIPPED":  # Kubeflow's cache had it
            wanted = [{"event": "cached", "time": begin}, {"event": "done", "time": end}]
        elif state in ("RUNNING", "CANCELING"):
            wanted = [{"event": "start", "time": begin}]
        elif state == "SUCCEEDED":
            wanted = [{"event": "start", "time": begin}, {"event": "done", "time": end}]
        elif state in ("FAILED", "CANCELED"):
            words = _words(task) or _no_words(task)
            wanted = [{"event": "start", "time": begin}, {"event": "error", "time": end, "message": words}]
        for event in wanted:
            if event["event"] not in told:
                told.add(event["event"])
                yield event


def stages(tasks: list[Any], variants: list[str]) -> list[tuple[str, Any]]:
    """A run's tasks that are stages of the pipeline, with the stages' names.

    The tasks of the loop over variants have one name. Which variant each trains is read from the number of its
    iteration, or else from the order in which they were made.
    """
    by_id = {task.task_id: task for task in tasks}
    found = [(_STAGES[task.display_name], task) for task in tasks if task.display_name in _STAGES]
    loop = [task for task in tasks if task.display_name == _SEVERAL]
    loop.sort(key=lambda task: _seconds(task.create_time))
    told = [_iteration(task, by_id) for task in loop]
    numbers = [number for number in told if number is not None]
    if len(set(numbers)) < len(loop):
        numbers = list(range(len(loop)))
    found += [(f"rl-{variants[n]}", task) for n, task in zip(numbers, loop, strict=True) if n < len(variants)]
    return found


def _owners(tasks: list[Any], found: list[tuple[str, Any]]) -> dict[str, str]:
    """Id of a task -> the stage that it is, or is a part of; tasks that are of none are left out."""
    by_id = {task.task_id: task for task in tasks}
    stage_of = {task.task_id: stage for stage, task in found}
    owner = {}
    for task in tasks:
        above: Any = task
        for _ in tasks:  # no task stands deeper
            if above is None or above.task_id in stage_of:
                break
            above = by_id.get(above.parent_task_id)
        if above is not None and above.task_id in stage_of:
            owner[task.task_id] = stage_of[above.task_id]
    return owner


def _words(task: Any) -> str:
    """What a task says of its failure; empty where it says nothing."""
    told = [task.error, *(entry.error for entry in reversed(task.state_history or []))]
    return next((error.message.strip() for error in told if error and error.message and error.message.strip()), "")


def _no_words(task: Any) -> str:
    return "stopped" if task.state == "CANCELED" else "failed; see its log"


def _iteration(task: Any, by_id: dict[str, Any]) -> int | None:
    """Number of the loop's iteration that a task is part of, from the names of what it stands below."""
    while task is not None:
        # Argo's `iteration-iterations(1:...)`, or `for-loop-1-iteration-1`
        match = re.search(r"iteration[\w-]*?(?:\((\d+)|-(\d+))", task.display_name or "")
        if match:
            return int(match[1] or match[2])
        task = by_id.get(task.parent_task_id)
    return None


def _seconds(moment: Any) -> float:
    """Kubeflow writes the year 1970 for what has not happened."""
    return max(moment.timestamp(), 0.0) if moment is not None else 0.0


def _watch(console: Console, server: Server, recipe: Recipe, run_id: str) -> int:
    """Draw a run until it ends; the status is 0 where it succeeded."""
    follower = RunFollower(recipe, server, run_id)
    try:
        with Display(console, follower) as display:
            while True:
                display.refresh()
                if follower.state in _ENDED:
                    break
                time.sleep(_SECONDS)
            if follower.state == "SUCCEEDED":
                follower.finish()
    except KeyboardInterrupt:
        console.print(f"Stopped watching; the run goes on: {server.run_link(run_id)}", soft_wrap=True, markup=False)
        return 130
    except DQOError as error:
        raise DQOError(f"{error}\nThe run goes on: {server.run_link(run_id)}") from None
    console.print(f"Run {follower.state.lower()}", soft_wrap=True)
    if follower.state != "SUCCEEDED" and follower.reason:
        console.print(f"  {follower.reason}", soft_wrap=True, markup=False)
    return _ENDED[follower.state]


def same_parameters(one: Any, other: Any) -> bool:
    """Whether two runtime configurations mean the same; the server may order and type them anew."""
    first, second = ((config and config.parameters) or {} for config in (one, other))
    return json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
