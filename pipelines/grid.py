"""What an experiment file says, the runs that follow from it, and where their results are kept."""

import gzip
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from dqo.errors import DQOError
from dqo.evaluation.catalogue import METRICS
from dqo.files import read_jsonl, write_jsonl
from dqo.recipe import Recipe, document, load, parse

_NAME = r"^[a-z0-9]([a-z0-9.-]{0,46}[a-z0-9])?$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _known_metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"expected a metric: {', '.join(METRICS)}")
    return name


_Metric = Annotated[str, AfterValidator(_known_metric)]


class Claim(_Section):
    """What a part is to show of one of its runs beside the one it compares with; the page says whether it does.

    Attributes:
        run: The run of the part that it is about.
        higher: Metrics whose mean is to be higher, with intervals that do not overlap.
        not_lower: Metric -> how much lower its mean may be.
        text: What a reader of the verdict has to know, Markdown.
    """

    run: str
    higher: list[_Metric] = []
    not_lower: dict[_Metric, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    text: str = ""


class Part(_Section):
    """A question that some of the runs answer together: one table and one picture of the page.

    Attributes:
        name: Name in the page's anchors and files.
        title: Heading.
        text: What is asked, a paragraph of Markdown.
        recipes: Which of the experiment's recipes; all by default.
        set: Fields of the recipe to set in every run of the part.
        runs: Name -> fields of the recipe to set, e.g. `{reward-only: {method.alpha: 0}}`.
        grid: Field of the recipe -> values; every combination is run, for each of `runs`.
        seeds: Every run is repeated with each of them.
        against: The run of this part that the others are compared with.
        claim: What the part is to show; see `Claim`.
    """

    name: Annotated[str, Field(pattern=_NAME)]
    title: str
    text: str = ""
    recipes: list[str] | None = None
    set: dict[str, Any] = {}
    runs: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = {"dqo": {}}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    against: str | None = None
    claim: Claim | None = None


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


# Sections that say what becomes of the numbers and where they are made, not what they are.
_OTHERWISE = {"gate", "registry", "tracking", "resources"}


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
        """Names the job: 12 hex digits of what its recipe says beyond the defaults about what is measured.

        A later version's new fields do not change it, so results outlive them; `outdated` tells of changed defaults.
        """
        text = json.dumps(measured(self.recipe, exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def outdated(self, row: Mapping[str, Any]) -> list[str]:
        """What a kept row's recipe says otherwise than this one, e.g. `rl.warmup_steps 0, now 7`; empty where nothing.

        Fields that only one of the two versions knows do not count, and rows of versions that kept no recipe tell
        nothing.
        """
        return _changes(row.get("recipe", {}), measured(self.recipe))

    @property
    def title(self) -> str:
        """What a person calls it."""
        values = [f"{field.rpartition('.')[2]} {value}" for field, value in self.values.items()]
        return " · ".join([self.label, self.run, *values, f"seed {self.seed}"])


def measured(recipe: Recipe, exclude_defaults: bool = False) -> dict[str, Any]:
    """What a recipe says about what is measured, as JSON takes it."""
    said = recipe.model_dump(mode="json", exclude_defaults=exclude_defaults, exclude=_OTHERWISE)
    if not recipe.method.defences.conditional:  # what no response can fail pays nobody in another way
        said.get("method", {}).get("defences", {}).pop("unearned", None)
        if said.get("method", {}).get("defences") == {}:
            del said["method"]["defences"]
    return said


def _changes(then: Mapping[str, Any], now: Mapping[str, Any], section: str = "") -> list[str]:
    """Fields of both that differ, a section that only one of them fills in among them."""
    found = []
    for name in then:
        if name not in now or then[name] == now[name]:
            continue
        if isinstance(then[name], dict) and isinstance(now[name], dict):
            found += _changes(then[name], now[name], f"{section}{name}.")
        else:
            found.append(f"{section}{name} {then[name]}, now {now[name]}")
    return found


def read(path: Path) -> Experiment:
    """Read an experiment file.

    Raises:
        DQOError: If it cannot be read or is not valid: file, field, value and what was expected.
    """
    try:
        return Experiment.model_validate(document(path))
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
        for name in ("base", "sft"):
            if name in part.runs:
                raise DQOError(
                    f"{path}: parts.{part.name}.runs: got {name!r}, which the page shows beside every run anyway; "
                    "expected another name"
                )
        if part.against is not None and part.against not in part.runs:
            raise DQOError(
                f"{path}: parts.{part.name}.against: got {part.against!r}; expected one of: {', '.join(part.runs)}"
            )
        if part.claim is not None:
            _check_claim(part, part.claim, f"{path}: parts.{part.name}.claim")
        for seed, label, (run, settings), *values in itertools.product(
            part.seeds, part.recipes or bases, part.runs.items(), *part.grid.values()
        ):
            grid = dict(zip(part.grid, values, strict=True))
            where = f"{path}: part {part.name!r}, run {run!r}"
            recipe = _with(bases[label], experiment.set | part.set | settings | grid | {"seed": seed}, where)
            cells.append(Cell(part.name, label, run, grid, seed, recipe))
    return cells


def _check_claim(part: Part, claim: Claim, where: str) -> None:
    if part.against is None or part.grid:
        raise DQOError(
            f"{where}: got a part {'with a grid' if part.grid else 'without `against`'}; expected runs that are "
            "compared with another, without a grid"
        )
    others = [run for run in part.runs if run != part.against]
    if claim.run not in others:
        raise DQOError(f"{where}.run: got {claim.run!r}; expected one of: {', '.join(others)}")
    if not (claim.higher or claim.not_lower):
        raise DQOError(f"{where}: claims nothing; expected `higher` or `not_lower`")
    if both := [metric for metric in claim.higher if metric in claim.not_lower]:
        raise DQOError(f"{where}: got {both[0]!r} in `higher` and in `not_lower`; expected it in one of them")


def _with(recipe: Recipe, settings: dict[str, Any], where: str) -> Recipe:
    """A recipe with fields set by their dotted names, for one model beside the base and SFT models, not registered."""
    document = recipe.model_dump(mode="json")
    alone = {"method.baselines": [], "gate.against": "sft", "registry.baselines": False}
    for name, value in (settings | alone).items():
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

    def current(self, cells: Iterable[Cell]) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
        """Finished jobs by their key, without those that were made with another recipe than their cell has today.

        Returns:
            The rows, and by key what is different in those that are left out; see `Cell.outdated`.

        Raises:
            DQOError: If the file is damaged.
        """
        rows, outdated = self.rows(), {}
        for cell in cells:
            if cell.key in rows and (differences := cell.outdated(rows[cell.key])):
                outdated[cell.key] = differences
        return {key: row for key, row in rows.items() if key not in outdated}, outdated

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
        # Not splitlines, for which U+2028 and the like, which a policy may sample, end a line too.
        return [json.loads(line) for line in text.split("\n") if line]
