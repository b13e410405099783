"""The command `generate`: a registered model responds to a prompt, and the group is shown with what it is worth."""

import json
import math
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from dqo import tracking
from dqo.errors import DQOError
from dqo.files import write_text
from dqo.recipe import Recipe, Sampling, load
from dqo.shell import short
from pipelines import stores

_MOST = 1024


@dataclass(frozen=True)
class Asked:
    """What the command line was given, as in its help."""

    model: str
    prompt: str | None
    row: str | None
    n: int
    seed: int
    temperature: float | None
    top_p: float | None
    max_new_tokens: int | None
    recipe: Path | None
    json: Path | None
    out: Path
    uri: str | None


def run(asked: Asked) -> int:
    """Sample a group from a model, measure and show it; returns the exit status.

    Raises:
        DQOError: If something that was given cannot be found or does not fit.
    """
    if (asked.prompt is None) == (asked.row is None):
        raise DQOError("expected a prompt, or a row of the model's task with --row, and not both")
    if not 1 <= asked.n <= _MOST:
        raise DQOError(f"-n {asked.n}: expected a number of responses from 1 to {_MOST}")
    if not 0 <= asked.seed < 2**63:
        raise DQOError(f"--seed {asked.seed}: expected a number from 0 to 2^63 - 1")
    given = {
        field: value
        for field in ("temperature", "top_p", "max_new_tokens")
        if (value := getattr(asked, field)) is not None
    }
    _sampling(Sampling(), given)  # refuses before anything is loaded
    stores.check_file("--json", asked.json, ".json")
    recipe = None if asked.recipe is None else load(asked.recipe)
    with tempfile.TemporaryDirectory() as place:
        document = _respond(asked, recipe, given, Path(place))
    _show(Console(highlight=False), document)
    if asked.json is not None:
        try:
            write_text(asked.json, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise DQOError(f"{asked.json}: cannot be written ({error.strerror})") from None
        Console(highlight=False).print(f"Written: {short(asked.json)}", soft_wrap=True, markup=False)
    return 0


def _sampling(settings: Sampling, given: dict[str, Any]) -> Sampling:
    try:
        return Sampling.model_validate(settings.model_dump() | given)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise DQOError(f"{option} {first['input']}: {first['msg'].lower()}") from None


def _respond(asked: Asked, recipe: Recipe | None, given: dict[str, Any], place: Path) -> dict[str, Any]:
    folder = Path(asked.model)
    client = None if folder.is_dir() else tracking.client_of(stores.require(asked.out, asked.uri), "generated")
    _quiet()
    # MLflow advises on the hints that serving.py leaves out on purpose, past any filter.
    with warnings.catch_warnings(record=True):
        from dqo import inference

    origin = inference.from_folder(folder) if client is None else inference.from_registry(client, asked.model, place)
    model = inference.TrainedModel(origin.checkpoint, recipe or origin.recipe, origin.data)
    question = model.ask(asked.prompt) if asked.prompt is not None else model.ask_row(asked.row or "")
    sampling = _sampling(model.sampling, given)
    group = model.respond(question, asked.n, sampling, asked.seed)
    qualities = group.qualities if group.qualities is not None else [None] * asked.n
    scored = [value for value in qualities if value is not None and math.isfinite(value)]
    return {
        "model": origin.name,
        "prompt": group.prompt,
        "sampling": sampling.model_dump() | {"n": asked.n, "seed": asked.seed},
        "responses": [
            {
                "text": response.text,
                "tokens": response.tokens,
                "truncated": response.truncated,
                "quality": quality if quality is not None and math.isfinite(quality) else None,
                "bonus": bonus,
            }
            for response, quality, bonus in zip(group.responses, qualities, group.bonuses, strict=True)
        ],
        "quality": sum(scored) / len(scored) if scored else None,
        "quality_unmeasured": group.unmeasured or None,
        "log_volume": group.log_volume,
    }


def _quiet() -> None:
    """Keep the libraries' progress bars and advice out of what is to be read."""
    import logging

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("mlflow").setLevel(logging.WARNING)


def _show(console: Console, document: dict[str, Any]) -> None:
    console.print(Text(f"{document['model']}: {document['prompt']}", style="bold"), soft_wrap=True)
    console.print(Text("quality  adds (nats)  response", style="dim"))
    for response in document["responses"]:
        quality = "-" if response["quality"] is None else f"{response['quality']:.2f}"
        first, *further = response["text"].splitlines() or [""]
        cut = " ... (cut)" if response["truncated"] else ""
        lines = [first, *(f"{'':22}{line}" for line in further)]
        console.print(Text(f"{quality:>7}  {response['bonus']:>11.3f}  " + "\n".join(lines) + cut), soft_wrap=True)
    n = document["sampling"]["n"]
    quality = "not measured" if document["quality"] is None else f"{document['quality']:.3f}"
    console.print(Text(
        f"mean quality {quality}, log-volume {document['log_volume']:.3f} nats "
        f"(all the same: {math.log(1 + n):.2f}, nothing in common: {n * math.log(2):.2f})"
    ), soft_wrap=True)  # fmt: skip
    if document["quality_unmeasured"]:
        console.print(Text(f"Quality: {document['quality_unmeasured']}", style="dim"), soft_wrap=True)
