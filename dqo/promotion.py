"""Which version of a registered model is champion: promotion by a gate, by force, and back."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqo import alias_trail
from dqo.alias_trail import CHAMPION, Event, Moved
from dqo.errors import DQOError
from dqo.evaluation import runs
from dqo.gate import AskedJudge, GateResult, decide
from dqo.mlflow_errors import in_words
from dqo.recipe import Gate, Recipe, parse

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

Waiting = Callable[[Event], None]


@dataclass(frozen=True)
class Promotion:
    """What came of asking for a promotion.

    Attributes:
        name: Registered model.
        version: The version that was to be champion.
        gate: What the gate says; `None` where a forced promotion has no evaluation to ask it about.
        gate_missing: Why there is none.
        moved: The move; `None` where the gate did not pass and nothing was forced.
    """

    name: str
    version: str
    gate: GateResult | None
    gate_missing: str
    moved: Moved | None


def promote(
    client: "MlflowClient",
    name: str,
    version: str,
    gate: Gate | None = None,
    force: str | None = None,
    patience: float = alias_trail.PATIENCE,
    waiting: Waiting | None = None,
    asked: AskedJudge | None = None,
) -> Promotion:
    """Make a version champion if its gate passes.

    The gate is applied to the evaluation of the pipeline that made the version. Its whole report becomes an artifact
    `promotion/<event>.json` of that evaluation's run before anything is moved.

    Args:
        client: MLflow.
        name: Registered model.
        version: Its version, a number.
        gate: Rules to apply; `None` takes those of the recipe that the version was made with, its demands on the
            judge's audit among them.
        force: Why it is to be champion although the gate does not pass or there is no evaluation.
        patience: See `alias_trail.move`.
        waiting: See `alias_trail.move`.
        asked: The judge that a given gate's recipe asks for; see `dqo.gate.decide`.

    Raises:
        DQOError: If there is no such version; if it has no evaluation, or none that the gate can be applied to, and
            nothing is forced; if the reason is empty; if MLflow or its artifact store refuses.
    """
    if force is not None and not force.strip():
        raise DQOError("--force: the reason is empty; expected why this version is to be champion, for the audit trail")
    given = f"{name}/{version}"
    with in_words(f"read {given!r}"):
        found = runs.version_of(client, given, given)
        if found.status != "READY":
            raise DQOError(f"{given}: the version is {found.status} in MLflow; expected one that is READY")
        try:
            located, report, result, missing = *_apply(client, given, found, gate, asked), ""
        except DQOError as error:
            if force is None:
                raise
            located, report, result, missing = None, {}, None, str(error)
    if result is not None and not result.passed and force is None:
        return Promotion(name, version, result, "", None)
    forced = force is not None and (result is None or not result.passed)
    about = {"passed": None, "reasons": [f"no gate: {missing}"]} if result is None else asdict(result)
    event = alias_trail.new(CHAMPION, "promote", (force or "").strip(), forced, about)
    if located is not None:
        event.gate["report"] = _keep(client, located.evaluation.info.run_id, event, report)
    moved = alias_trail.move(client, name, event, lambda *_: version, patience, waiting)
    return Promotion(name, version, result, missing, moved)


def _apply(
    client: "MlflowClient",
    given: str,
    version: "ModelVersion",
    gate: Gate | None,
    asked: AskedJudge | None,
) -> tuple[runs.Located, dict[str, Any], GateResult]:
    """Apply a gate to a version's evaluation: where that is, what the report says beside the result, the result."""
    located = runs.locate(client, given, runs.run_of_version(client, given, version))
    evaluation = located.evaluation.info.run_id
    with tempfile.TemporaryDirectory() as folder:
        path = runs.download(located.evaluation, "evaluation/evaluation.json", Path(folder))
        if path is None:
            raise DQOError(f"{given}: the run {evaluation} holds no artifact `evaluation/evaluation.json`")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            evaluated = document["recipe_digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise DQOError(f"{given}: evaluation.json of MLflow run {evaluation} cannot be read ({error})") from None
        trained = version.tags.get("dqo.recipe_digest", evaluated)
        if evaluated != trained:
            raise DQOError(
                f"{given}: the evaluation of MLflow run {evaluation} is of the recipe {evaluated}, the version of "
                f"{trained}; expected an evaluation of this version"
            )
        rules = gate
        if rules is None:
            recipe = _recipe_of(located, given, Path(folder))
            rules, asked = recipe.gate, AskedJudge.of_the_evaluation(recipe.judge)
    try:
        result = decide(rules, document, located.model, asked)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DQOError(
            f"{given}: evaluation.json of MLflow run {evaluation} has no form that the gate can read ({error!r})"
        ) from None
    source = "given with the promotion" if gate is not None else "the recipe of the version"
    report = {
        "model": located.model,
        "rules": rules.model_dump(mode="json"),
        "rules_from": source,
        "judge_audit": None if asked is None or asked.demands is None else asked.demands.model_dump(mode="json"),
    }
    return located, report, result


def _recipe_of(located: runs.Located, given: str, folder: Path) -> Recipe:
    path = runs.download(located.pipeline, "recipe.yaml", folder)
    run_id = located.pipeline.info.run_id
    if path is None:
        raise DQOError(f"{given}: the run {run_id} holds no artifact `recipe.yaml`; give the gate with --recipe FILE")
    try:
        return parse(path.read_text(encoding="utf-8"), f"recipe.yaml of MLflow run {run_id}")
    except DQOError as error:
        raise DQOError(
            f"{given}: its recipe is not one of this version of dqo; give the gate with --recipe FILE\n{error}"
        ) from None


def _keep(client: "MlflowClient", run_id: str, event: Event, report: dict[str, Any]) -> str:
    """Keep the gate's whole report, of which the trail may hold a part; returns where it is."""
    place = f"promotion/{event.id}.json"
    document = {"event": event.id, "by": event.by, "at": event.at, "why": event.why, "gate": event.gate, **report}
    with in_words(f"write {place!r}", run_id):
        client.log_text(run_id, json.dumps(document, indent=1, ensure_ascii=False) + "\n", place)
    return f"runs:/{run_id}/{place}"


def crown(client: "MlflowClient", name: str, version: str, gate: GateResult, report: str = "") -> Moved | None:
    """Make a version that has just been registered champion if its gate has passed, the way `promote` does.

    A version that has been champion before is left alone: a stage that is repeated must not undo a rollback.

    Args:
        client: MLflow.
        name: Registered model.
        version: Its version.
        gate: What the gate said when it was evaluated.
        report: Artifact that holds the gate's report.
    """
    if not gate.passed:
        return None
    event = alias_trail.new(CHAMPION, "register", gate={**asdict(gate), **({"report": report} if report else {})})

    def unless_it_was(model: "RegisteredModel", trail: list[Event]) -> str | None:
        known = any(
            one.alias == CHAMPION and one.state == "done" and version in (one.version, one.origin) for one in trail
        )
        return None if known else version

    return alias_trail.move(client, name, event, unless_it_was)


def rollback(
    client: "MlflowClient",
    name: str,
    why: str = "",
    patience: float = alias_trail.PATIENCE,
    waiting: Waiting | None = None,
) -> Moved:
    """Give `champion` back to the version that had it before; a second rollback goes one further back.

    Args:
        client: MLflow.
        name: Registered model.
        why: Reason, for the trail.
        patience: See `alias_trail.move`.
        waiting: See `alias_trail.move`.

    Raises:
        DQOError: If there is no such model, or no champion before this one that still exists; if MLflow refuses.
    """
    with in_words(f"read {name!r}"):
        runs.registered_model(client, name, name)

    def previous(model: "RegisteredModel", trail: list[Event]) -> str:
        current = alias_trail.holder(model, CHAMPION)
        before = alias_trail.held_before(trail, CHAMPION, current)
        there = runs.versions_of(client, name)
        found = next((version for version in before if version in there), None)
        if found is None:
            is_now = f"champion is version {current}" if current else "no version is champion"
            gone = f"; version {', '.join(before)} had it before and is deleted" if before else ""
            raise DQOError(
                f"{name}: {is_now}, and the trail names no champion before it{gone}; "
                "promote a version by its number instead"
            )
        return found

    return alias_trail.move(client, name, alias_trail.new(CHAMPION, "rollback", why), previous, patience, waiting)
