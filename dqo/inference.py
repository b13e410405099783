"""A trained model in use: one prompt, a group of responses, and what the group is worth by the model's recipe."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqo import rewards
from dqo.checkpoint import CHECKPOINT_CARD
from dqo.determinant import leave_one_out_bonus
from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.evaluation import runs
from dqo.evaluation.metrics import log_volume
from dqo.files import read_jsonl
from dqo.generation import Response
from dqo.mlflow_errors import in_words
from dqo.policy import default_device
from dqo.recipe import Encoder, Recipe, Sampling, parse
from dqo.serving import ResponseGroups
from dqo.tasks import calling, get_task
from dqo.tasks.base import Message, Row, Task

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclass(frozen=True)
class Request:
    """What is asked of the model.

    Attributes:
        messages: The chat.
        row: The row of the task that it belongs to, for the reward; `None` where it belongs to none.
        unknown: Why there is no row.
    """

    messages: list[Message]
    row: Row | None
    unknown: str = ""


@dataclass(frozen=True)
class Group:
    """A group of responses to one prompt.

    Attributes:
        prompt: What was asked.
        responses: n of them.
        qualities: Of each response by the recipe's reward, `None` for one that it cannot judge; `None` as a whole where
            nothing could be measured.
        unmeasured: Why.
        log_volume: Of the group's embeddings, in nats, as in the evaluation.
        bonuses: What each response adds to it, in nats (leave-one-out).
    """

    prompt: str
    responses: list[Response]
    qualities: list[float | None] | None
    unmeasured: str
    log_volume: float
    bonuses: list[float]


class TrainedModel:
    """A checkpoint with the recipe it was trained by.

    Args:
        checkpoint: Its folder.
        recipe: The recipe; `None` where it is not known, so that no quality is measured, and the default encoder spans
            the volume.
        data: Rows that the pipeline has prepared, for prompts that are among them.

    Raises:
        DQOError: If the folder is no checkpoint or its base model cannot be loaded.
    """

    def __init__(self, checkpoint: Path, recipe: Recipe | None, data: Iterable[Row] = ()) -> None:
        self.recipe = recipe
        self._data = data
        self._model = ResponseGroups()
        self._model.open(checkpoint)

    @property
    def sampling(self) -> Sampling:
        """How the model was sampled in its evaluation."""
        return self.recipe.evaluation.sampling if self.recipe is not None else Sampling(max_new_tokens=64)

    def ask(self, prompt: str) -> Request:
        """A prompt in words. Its row is looked for among the prepared data and the task's own.

        Raises:
            DQOError: If it is empty.
        """
        if not prompt.strip():
            raise DQOError("the prompt is empty; expected what the model is to respond to")
        messages = [{"role": "user", "content": prompt}]
        if self.recipe is None:
            return Request(messages, None, "the model's recipe is not known; give it with --recipe")
        try:
            task = get_task(self.recipe.task)
            if rewards.kind(self.recipe, task) == "model":
                return Request(messages, {"prompt": messages, "references": []})
            for row in self._data:
                if row["prompt"][-1]["content"] == prompt:
                    return Request(list(row["prompt"]), row)
            for row in read_jsonl(task.bundled):
                asked = calling.prompt(task, row)
                if asked and asked[-1]["content"] == prompt:
                    return Request(asked, {**row, "prompt": asked})
        except DQOError as error:  # the module of a task of one's own may not be here
            return Request(messages, None, str(error))
        fields = ", ".join(task.fields)
        return Request(
            messages, None,
            f"the reward of task {task.name!r} needs {fields or 'references'}, and this prompt is none of its data; "
            "give a row with --row instead of the prompt",
        )  # fmt: skip

    def ask_row(self, text: str) -> Request:
        """A row of the recipe's task, as JSON; the task makes the prompt of it.

        Raises:
            DQOError: If the recipe is not known, the text is no JSON object, or the row is none of the task's.
        """
        if self.recipe is None:
            raise DQOError("--row: the model's recipe is not known, so neither is its task; give it with --recipe")
        try:
            row = json.loads(text)
        except ValueError as error:
            raise DQOError(f"--row: not valid JSON ({error})") from None
        task = get_task(self.recipe.task)
        if not isinstance(row, dict):
            raise DQOError(f"--row: expected a JSON object with {_fields(task)}, got {type(row).__name__}")
        # What references are good for differs: a reward that needs them says so later.
        if problem := calling.check(task, {"references": ["any"], **row}):
            raise DQOError(f"--row: {problem}; expected a row of task {task.name!r} with {_fields(task)}")
        messages = calling.prompt(task, row)
        return Request(messages, {**row, "prompt": messages})

    def respond(self, request: Request, n: int, sampling: Sampling, seed: int) -> Group:
        """Sample a group and measure it.

        Args:
            request: What `ask` or `ask_row` returned.
            n: Responses.
            sampling: How they are drawn.
            seed: Of the draws.

        Raises:
            DQOError: If prompt and response are longer than the model reads, or the encoder cannot be used.
        """
        (responses,) = self._model.draw([request.messages], n, sampling, seed)
        texts = [response.text for response in responses]
        encoder = ResponseEncoder(self.recipe.encoder if self.recipe is not None else Encoder(), default_device())
        vectors = encoder(texts).vectors.cpu().double()
        qualities, unmeasured = None, request.unknown
        if self.recipe is not None and request.row is not None:
            reward = rewards.build(self.recipe, get_task(self.recipe.task), default_device(), encoder)
            try:
                qualities = rewards.score(reward, texts, [request.row] * n)
            except (KeyError, DQOError) as error:  # a rule's own is the cause of the other
                missing = error if isinstance(error, KeyError) else error.__cause__
                if not isinstance(missing, KeyError) or missing.args != ("references",):
                    raise
                unmeasured = "the reward needs `references`, and the row holds none"
        return Group(
            request.messages[-1]["content"], responses, qualities, unmeasured,
            float(log_volume(vectors[None])[0]), leave_one_out_bonus(vectors).tolist(),
        )  # fmt: skip


def _fields(task: Task) -> str:
    return ", ".join(f"`{name}`" for name in (*task.fields, "references"))


# --- where it comes from ---


@dataclass(frozen=True)
class Origin:
    """Where a model was found.

    Attributes:
        name: What to call it: `NAME/3`, or the folder.
        checkpoint: Its folder.
        recipe: The recipe it was trained by; `None` if it is not known.
        data: Rows that its pipeline has prepared.
    """

    name: str
    checkpoint: Path
    recipe: Recipe | None
    data: list[Mapping[str, Any]]


def from_folder(folder: Path) -> Origin:
    """A checkpoint's folder; where it lies in that of a `dqo run`, nothing tells its recipe.

    Raises:
        DQOError: If it is no checkpoint.
    """
    if not (folder / CHECKPOINT_CARD).is_file():
        raise DQOError(f"{folder}: the folder holds no {CHECKPOINT_CARD}; expected a checkpoint of a training stage")
    return Origin(str(folder), folder, None, [])


def from_registry(client: "MlflowClient", given: str, place: Path) -> Origin:
    """A registered model with the recipe and data of its pipeline.

    Args:
        client: MLflow.
        given: `NAME/3`, `NAME@alias`, either after `models:/`, or `NAME` for its champion.
        place: Folder to download to.

    Raises:
        DQOError: If there is no such version, or it was not logged by `dqo`.
    """
    import mlflow

    name = given.removeprefix("models:/")
    version = runs.version_of(client, given, name if "@" in name or "/" in name else f"{name}@champion")
    label = f"{version.name}/{version.version}"
    with in_words(f"download {label!r}"):
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{label}", dst_path=str(place / "model")))
    checkpoint = folder / "artifacts" / "checkpoint"
    if not (checkpoint / CHECKPOINT_CARD).is_file():
        raise DQOError(f"{given}: {label} holds no artifacts/checkpoint/{CHECKPOINT_CARD}; expected a model that the "
                       "stage `register` has logged")  # fmt: skip
    try:
        run = runs.run_of_version(client, given, version)
        located = runs.pipeline_of(client, given, run)
    except DQOError:
        return Origin(label, checkpoint, None, [])
    return Origin(label, checkpoint, _recipe_of(located, place), _data_of(client, located, place))


def _recipe_of(pipeline: "Run", place: Path) -> Recipe | None:
    path = runs.download(pipeline, "recipe.yaml", place)
    try:
        return None if path is None else parse(path.read_text(encoding="utf-8"))
    except DQOError:  # of another version of the library
        return None


def _data_of(client: "MlflowClient", pipeline: "Run", place: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    prepared = [run for run in runs.stages_of(client, pipeline) if run.data.tags.get("dqo.stage") == "prepare"]
    for file in ("eval.jsonl", "train.jsonl"):
        path = runs.download(prepared[0], f"data/{file}", place) if prepared else None
        rows += read_jsonl(path) if path is not None else []
    return rows
