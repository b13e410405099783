"""The command `experiment`: a grid of runs from one file, each a model trained and evaluated.

A job is one recipe: the stages prepare, SFT, RL and evaluate in one process of its own, without Kubeflow, so that a
grid on a laptop does not pay for five starts a run. Jobs share the workspace, so equal stages (the data, the SFT
checkpoint of a seed) are done once. A finished job leaves one row in the results file and its responses beside it;
these are all that the page of results is made of, so a grid can be run in pieces and on several machines.
"""

import gzip
import hashlib
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from dqo.errors import DQOError
from dqo.files import read_jsonl, write_jsonl, write_text
from dqo.recipe import Recipe, load, parse
from dqo.shell import dqo_command, short

_NAME = r"^[a-z0-9]([a-z0-9.-]{0,46}[a-z0-9])?$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Section):
    """A question that some of the runs answer together: one table and one picture of the page.

    Attributes:
        name: Name in the page's anchors and files.
        title: Heading.
        text: What is asked, a paragraph of Markdown.
        recipes: Which of the experiment's recipes; all by default.
        runs: Name -> fields of the recipe to set, e.g. `{reward-only: {method.alpha: 0}}`.
        grid: Field of the recipe -> values; every combination is run, for each of `runs`.
        seeds: Every run is repeated with each of them.
        against: The run of this part that the others are compared with.
    """

    name: Annotated[str, Field(pattern=_NAME)]
    title: str
    text: str = ""
    recipes: list[str] | None = None
    runs: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = {"dqo": {}}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    against: str | None = None


class Experiment(_Section):
    """What an experiment file says.

    Attributes:
        name: Name of the MLflow run above all others, and of the results file.
        title: Heading of the page.
        text: What stands above the parts, Markdown.
        recipes: Label -> recipe file, relative to the experiment file.
        set: Fields of the recipe to set in every run.
        parts: See `Part`.
    """

    name: Annotated[str, Field(pattern=_NAME)]
    title: str
    text: str = ""
    recipes: Annotated[dict[str, str], Field(min_length=1)]
    set: dict[str, Any] = {}
    parts: Annotated[list[Part], Field(min_length=1)]


@dataclass(frozen=True)
class Cell:
    """One place in a part: a recipe under a run's name, grid values and seed.

    Attributes:
        part: Name of the part.
        label: Which of the experiment's recipes.
        run: Name of the run.
        values: The grid's fields with their values.
        seed: The recipe's seed.
        recipe: The recipe with everything set; equal recipes of several cells are one job.
    """

    part: str
    label: str
    run: str
    values: dict[str, Any]
    seed: int
    recipe: Recipe

    @property
    def key(self) -> str:
        """Names the job: 12 hex digits of what its recipe says beyond the defaults.

        A later version's new fields do not change it, so results outlive them; a row says which version made it.
        """
        text = json.dumps(self.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """What a person calls it."""
        values = [f"{field.rpartition('.')[2]} {value}" for field, value in self.values.items()]
        return " · ".join([self.label, self.run, *values, f"seed {self.seed}"])


def read(path: Path) -> Experiment:
    """Read an experiment file.

    Raises:
        DQOError: If it cannot be read or is not valid: file, field, value and what was expected.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DQOError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DQOError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise DQOError(f"{path}: expected a mapping with name, title, recipes and parts, got {type(content).__name__}")
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, one['loc'])) or 'the file'}: got {one.get('input')!r}; {one['msg']}"
            for one in error.errors()
        ]
        raise DQOError("\n".join([f"{path}: not a valid experiment", *lines])) from None


def expand(experiment: Experiment, path: Path) -> list[Cell]:
    """List every cell, the first seed of each part first.

    Args:
        experiment: What the file says.
        path: The file, for its recipes' folder and for messages.

    Raises:
        DQOError: If a recipe does not exist, or a combination of settings is not a valid recipe: the message names the
            part, the run and the field.
    """
    bases = {label: load(path.parent / name) for label, name in experiment.recipes.items()}
    names = [part.name for part in experiment.parts]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise DQOError(f"{path}: parts: got {sorted(doubled)[0]!r} twice; expected each name once")
    cells = []
    for part in experiment.parts:
        for label in part.recipes or bases:
            if label not in bases:
                raise DQOError(f"{path}: parts.{part.name}.recipes: got {label!r}; expected one of: {', '.join(bases)}")
        if part.against is not None and part.against not in part.runs:
            raise DQOError(
                f"{path}: parts.{part.name}.against: got {part.against!r}; expected one of: {', '.join(part.runs)}"
            )
        for seed, label, (run, settings), *values in itertools.product(
            part.seeds, part.recipes or bases, part.runs.items(), *part.grid.values()
        ):
            grid = dict(zip(part.grid, values, strict=True))
            where = f"{path}: part {part.name!r}, run {run!r}"
            recipe = _with(bases[label], experiment.set | settings | grid | {"seed": seed}, where)
            cells.append(Cell(part.name, label, run, grid, seed, recipe))
    return cells


def _with(recipe: Recipe, settings: dict[str, Any], where: str) -> Recipe:
    """A recipe with fields set by their dotted names, for one model beside the base and SFT models."""
    document = recipe.model_dump(mode="json")
    for name, value in (settings | {"method.baselines": [], "gate.against": "sft"}).items():
        *sections, field = name.split(".")
        target = document
        for section in sections:
            target = target.get(section) if isinstance(target, dict) else None  # type: ignore[assignment]
        if not isinstance(target, dict) or field not in target:
            raise DQOError(f"{where}: {name!r} is no field of a recipe; see docs/recipe.md")
        target[field] = value
    return parse(json.dumps(document), where)


@dataclass(frozen=True)
class Results:
    """The results of an experiment: one row a finished job, and its responses beside it.

    Attributes:
        folder: Holds `<name>.jsonl` and `responses/<key>.jsonl.gz`.
        name: The experiment's.
    """

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        """The rows."""
        return self.folder / f"{self.name}.jsonl"

    def rows(self) -> dict[str, dict[str, Any]]:
        """Finished jobs by their key.

        Raises:
            DQOError: If the file is damaged.
        """
        if not self.path.is_file():
            return {}
        try:
            return {row["key"]: row for row in read_jsonl(self.path)}
        except (ValueError, KeyError, TypeError) as error:
            raise DQOError(f"{self.path}: not a results file ({error}); restore it or name another folder") from None

    def add(self, row: dict[str, Any], responses: list[dict[str, Any]]) -> None:
        """Keep a finished job; its responses first, so that a row is never without them."""
        packed = self.folder / "responses" / f"{row['key']}.jsonl.gz"
        packed.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in responses)
        unfinished = packed.with_name(f".{packed.name}")
        unfinished.write_bytes(gzip.compress(text.encode(), mtime=0))
        unfinished.replace(packed)
        write_jsonl(self.path, [*(self.rows() | {row["key"]: row}).values()])

    def responses(self, key: str) -> list[dict[str, Any]]:
        """Responses of a job: rows as in `responses.jsonl` of the stage `evaluate`."""
        text = gzip.decompress((self.folder / "responses" / f"{key}.jsonl.gz").read_bytes()).decode()
        return [json.loads(line) for line in text.splitlines()]


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
    done = results.rows()
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
            from pipelines.results import write_page

            where = page or results.path.with_suffix(".md")
            write_page(experiment, cells, results, where)
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
    for number, cell in enumerate(missing, start=1):
        console.print(f"\\[{number}/{len(missing)}] {cell.title}", soft_wrap=True)
        error = _run_job(console, cell, out, parent, results)
        if error is not None:
            failed.append(cell)
            console.print(f"  failed: {error}", markup=False, soft_wrap=True)
    return failed


def _open_parent(experiment: Experiment, recipe: Recipe, out: Path) -> str:
    """The MLflow run above all jobs."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from dqo import tracking
    from pipelines.local import tracking_uri

    uri = tracking_uri(recipe, out.resolve())
    experiment_id = tracking.connect(recipe, uri)
    memory = out / "workspace" / "runs" / f"experiment-{experiment.name}.json"
    client = MlflowClient(uri)
    if memory.is_file():
        run_id: str = json.loads(memory.read_text(encoding="utf-8"))["run_id"]
        try:
            if client.get_run(run_id).info.lifecycle_stage == "active":
                return run_id
        except MlflowException:
            pass  # another store; a new run is made there
    run_id = client.create_run(
        experiment_id, run_name=experiment.name, tags={tracking.STAGE_TAG: "experiment"}
    ).info.run_id
    write_text(memory, json.dumps({"run_id": run_id}) + "\n")
    return run_id


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
