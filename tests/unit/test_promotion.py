"""Promotion by the gate, by force, and back, on a real sqlite MLflow; and the commands that do it."""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from registry_store import BAD, GATED, GOOD, Registry, gated_evaluation, interval

from dqo import alias_trail, promotion, registry, tracking
from dqo.errors import DQOError
from dqo.gate import AskedJudge, GateResult
from dqo.judges import identity_by_recipe
from dqo.judges.prompt import load_prompt
from dqo.recipe import Gate, parse
from pipelines import cli


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Folder, address and experiment."""
    out = tmp_path_factory.mktemp("runs")
    uri = tracking.default_uri(out)
    return out, uri, tracking.connect(parse("name: a\ntracking: {experiment: promotion}"), uri)


@pytest.fixture
def models(store: tuple[Path, str, str], request: pytest.FixtureRequest) -> Registry:
    _, uri, experiment = store
    tracking.client_of(uri, "promoted")
    return Registry(uri, experiment, re.sub(r"\W+", "-", request.node.name)[:200])


def dqo(store: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dqo", *words, "--out", str(store[0])])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


# --- promotion ---


def test_the_gate_of_the_versions_recipe_decides(models: Registry):
    models.version(GOOD)
    models.version(BAD)
    first = promotion.promote(models.client, models.name, "1")
    assert first.gate.passed and first.moved.event.state == "done" and models.aliases == {"champion": "1"}
    second = promotion.promote(models.client, models.name, "2")
    assert not second.gate.passed and second.moved is None
    assert models.aliases == {"champion": "1"} and len(models.trail) == 1  # nothing was changed
    (event,) = models.trail
    assert event["gate"]["passed"] is True and event["forced"] is False and len(event["gate"]["reasons"]) == 2


def test_the_whole_report_is_an_artifact_of_the_evaluation(models: Registry):
    version = models.version(GOOD)
    promotion.promote(models.client, models.name, version)
    (event,) = models.trail
    assert event["gate"]["report"] == f"runs:/{models.evaluation_run}/promotion/{event['id']}.json"
    report = models.report(event)
    assert report["event"] == event["id"] and report["by"] == event["by"] and report["model"] == "dqo"
    assert report["gate"]["reasons"] == event["gate"]["reasons"]
    assert report["rules"]["max_quality_loss"] == 0.05 and report["rules"]["more_diverse_on"] == ["log_volume"]


def test_another_gate_can_be_asked(models: Registry):
    version = models.version(GOOD)
    strict = Gate(max_quality_loss=0.01, more_diverse_on=["log_volume"])
    assert promotion.promote(models.client, models.name, version, strict).moved is None
    loose = Gate(max_quality_loss=0.5, more_diverse_on=["log_volume"])
    assert promotion.promote(models.client, models.name, version, loose).moved is not None
    assert models.report(models.trail[0])["rules"]["max_quality_loss"] == 0.5


# What the audit of GOOD's judge has measured; its recipe asks for a kappa of 0.6, the default.
MEASURES = {
    "kappa": 0.7, "kappa_low": 0.6, "kappa_high": 0.8, "first_position_rate": 0.5, "flip_rate": 0.0,
    "verbosity_bias": 0.0, "injection_rate": 0.05, "repeat_consistency": 1.0, "invalid_rate": 0.0, "missing": 0,
    "judged": 60,
}  # fmt: skip
JUDGED = {
    "complete": True, "reason": None, "against": "reward_only",
    "identity": {
        "kind": "pairwise", "model": "m", "endpoint": "http://moved/v1", "temperature": 0.0,
        "prompt_digest": load_prompt("pairwise").digest, "max_tokens": 512, "structured_output": True,
    },
    "audit": {
        "passed": True, "faults": [], "measures": MEASURES,
        "labelled": {"name": "shipped", "digest": "0" * 12, "pairs": 60},
    },
    "models": {"dqo": {"win_rate": interval(0.7), "length_controlled": interval(0.7), "pairs": 96, "invalid": 0}},
}  # fmt: skip


def judging(**audit: Any) -> str:
    """The recipe GATED with a judge that has a say, and these demands on its audit."""
    section = {"endpoint": "http://h/v1", "model": "m", "audit": audit}
    content = yaml.safe_load(GATED)
    return yaml.safe_dump(content | {"judge": section, "gate": content["gate"] | {"judge": {"min_win_rate": 0.6}}})


@pytest.mark.parametrize(
    ("audit", "fault"),
    [
        ({"min_kappa": 0.75}, "agreement with the labels (Cohen's kappa): 0.70 [0.60, 0.80], not as demanded"),
        ({"max_injection_rate": 0.01}, "tell the judge what to say: 0.05, not as demanded (at most 0.01)"),
    ],
)
def test_a_recipe_asks_more_of_the_judges_audit_than_the_evaluation_did(
    models: Registry, store, tmp_path, monkeypatch, capsys, audit: dict[str, float], fault: str
):
    version = models.version(GOOD | {"judge": JUDGED}, judging())
    (tmp_path / "strict.yaml").write_text(judging(**audit))
    assert dqo(store, monkeypatch, "promote", models.name, version, "--recipe", str(tmp_path / "strict.yaml")) == 1
    said = capsys.readouterr().out
    assert fault in said
    assert "under other demands and does not meet those of the recipe in force, so its verdicts do not count" in said
    assert models.aliases == {} and models.trail == []
    # The same verdicts decide by the recipe that the version was made with, and the report names its demands.
    assert dqo(store, monkeypatch, "promote", models.name, version) == 0
    assert models.aliases == {"champion": version}
    assert models.report(models.trail[0])["judge_audit"]["min_kappa"] == 0.6


def test_a_judge_that_failed_its_audit_may_pass_by_the_recipe_in_force_only(models: Registry):
    """The measures decide, not what was made of them: a stored `passed` counts neither way."""
    audit = JUDGED["audit"] | {"passed": False, "faults": ["agreement ...: 0.70, not as demanded (at least 0.8)"]}
    version = models.version(GOOD | {"judge": JUDGED | {"audit": audit}}, judging(min_kappa=0.8))
    assert not promotion.promote(models.client, models.name, version).gate.passed
    loose = parse(judging(min_kappa=0.5))
    done = promotion.promote(models.client, models.name, version, loose.gate, asked=AskedJudge(loose.judge.audit))
    assert done.gate.passed and models.aliases == {"champion": version}


def test_a_recipe_with_labelled_pairs_of_its_own_asks_for_an_audit_on_them(
    models: Registry, store, tmp_path, monkeypatch, capsys
):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"id": "1", "prompt": "q", "a": "x", "b": "y", "label": "C"}) + "\n")
    recipe = yaml.safe_load(judging())
    recipe["judge"]["labelled"] = str(own)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    version = models.version(GOOD | {"judge": JUDGED}, judging())
    command = ("promote", models.name, version, "--recipe", str(tmp_path / "own.yaml"))
    assert dqo(store, monkeypatch, *command) == 2
    assert "line 1: label: got 'C'; expected A, B or tie" in capsys.readouterr().err
    own.write_text(own.read_text().replace('"C"', '"A"'))
    digest = hashlib.sha256(own.read_bytes()).hexdigest()[:12]
    assert dqo(store, monkeypatch, *command) == 1
    assert (
        f"the judge was audited on other labelled pairs (shipped, 000000000000) than those of the recipe in force "
        f"({digest})"
    ) in capsys.readouterr().out
    # An evaluation whose audit was made on them.
    audit = JUDGED["audit"] | {"labelled": {"name": "own.jsonl", "digest": digest, "pairs": 1}}
    another = models.version(GOOD | {"judge": JUDGED | {"audit": audit}}, judging())
    assert dqo(store, monkeypatch, "promote", models.name, another, "--recipe", str(tmp_path / "own.yaml")) == 0
    assert models.aliases == {"champion": another}


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"model": "other"}, "(model 'm' and not 'other')"),
        ({"prompt": "pointwise", "max_tokens": 64}, "(kind 'pairwise' and not 'pointwise', prompt_digest '"),
        ({"endpoint": None, "model": None, "reward": {"model": "org/r"}}, "kind 'pairwise' and not 'reward'"),
    ],
)
def test_a_recipe_with_another_judge_asks_for_an_evaluation_by_it(
    models: Registry, store, tmp_path, monkeypatch, capsys, changes: dict[str, Any], difference: str
):
    recipe = yaml.safe_load(judging())
    recipe["judge"] |= changes
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(recipe))
    version = models.version(GOOD | {"judge": JUDGED}, judging())
    assert dqo(store, monkeypatch, "promote", models.name, version, "--recipe", str(tmp_path / "other.yaml")) == 1
    said = capsys.readouterr().out
    assert "the judge is another one than that of the recipe in force" in said and difference in said
    assert models.aliases == {}


@pytest.mark.parametrize("revision", ["abc", None])
def test_the_revision_of_a_reward_model_of_the_hub_is_asked_for(models: Registry, revision: str | None):
    section = {"reward": {"model": "org/r", "revision": revision, "margin": 0.5}}
    recipe = parse(json.dumps(yaml.safe_load(judging()) | {"judge": section}))
    identity = {"kind": "reward", "name": "reward_model", "model": "org/r", "revision": "abc", "max_tokens": 1024}
    version = models.version(GOOD | {"judge": JUDGED | {"identity": identity | {"margin": 0.5}}}, judging())
    asked = AskedJudge(identity=identity_by_recipe(recipe.judge))
    done = promotion.promote(models.client, models.name, version, recipe.gate, asked=asked)
    assert done.gate.passed == (revision == "abc")
    assert revision or "(revision 'abc' and not 'main')" in " ".join(done.gate.reasons)


def test_a_gate_that_asks_no_judge_does_not_read_its_files(models: Registry, store, tmp_path, monkeypatch):
    recipe = yaml.safe_load(judging()) | {"gate": yaml.safe_load(GATED)["gate"]}
    recipe["judge"] |= {"prompt": "/nowhere/mine.yaml", "labelled": "/nowhere/pairs.jsonl"}
    (tmp_path / "elsewhere.yaml").write_text(yaml.safe_dump(recipe))
    version = models.version(GOOD | {"judge": JUDGED}, judging())
    assert dqo(store, monkeypatch, "promote", models.name, version, "--recipe", str(tmp_path / "elsewhere.yaml")) == 0
    assert models.aliases == {"champion": version}


def test_a_judge_whose_audit_has_no_measures_that_can_be_read_promotes_nothing(models: Registry):
    audit = JUDGED["audit"] | {"measures": {"kappa": 1.0}}
    version = models.version(GOOD | {"judge": JUDGED | {"audit": audit}}, judging())
    with pytest.raises(DQOError, match="has no form that the gate can read"):
        promotion.promote(models.client, models.name, version)


def test_force_needs_a_reason_and_leaves_it(models: Registry):
    version = models.version(BAD)
    for empty in ("", "  "):
        with pytest.raises(DQOError, match="--force: the reason is empty"):
            promotion.promote(models.client, models.name, version, force=empty)
    assert models.trail == []
    done = promotion.promote(models.client, models.name, version, force=" asked for ")
    assert not done.gate.passed and models.aliases == {"champion": "1"}
    (event,) = models.trail
    assert event["forced"] is True and event["why"] == "asked for" and event["gate"]["passed"] is False
    assert models.client.get_model_version(models.name, "1").tags["promoted_why"] == "asked for"


def test_force_that_is_not_needed_is_not_called_forced(models: Registry):
    version = models.version(GOOD)
    promotion.promote(models.client, models.name, version, force="to be sure")
    assert models.trail[0]["forced"] is False and models.trail[0]["why"] == "to be sure"


def test_a_version_without_an_evaluation_needs_force(models: Registry):
    version = models.version(None)
    with pytest.raises(DQOError, match="it has not been evaluated; stages of the pipeline's run"):
        promotion.promote(models.client, models.name, version)
    foreign = str(models.client.create_model_version(models.name, "file:///elsewhere").version)
    with pytest.raises(DQOError, match=f"version {foreign} of .* names no run of a pipeline"):
        promotion.promote(models.client, models.name, foreign)
    assert models.aliases == {} and models.trail == []
    done = promotion.promote(models.client, models.name, foreign, force="measured by hand")
    assert done.gate is None and "names no run of a pipeline" in done.gate_missing
    (event,) = models.trail
    assert event["forced"] is True and event["gate"]["passed"] is None
    assert event["gate"]["reasons"][0].startswith("no gate: ")


@pytest.mark.parametrize(
    ("evaluation", "recipe", "message"),
    [
        ({"models": {}}, GATED, "cannot be read .*recipe_digest"),
        ({"recipe_digest": "r", "models": []}, GATED, "gate: the evaluation holds no model 'dqo'"),
        ({"recipe_digest": "r", "models": {"dqo": {}}}, GATED, "has no form that the gate can read"),
        (GOOD, "name: a\nno_such: 1", r"its recipe is not one of this version of dqo; give the gate with --recipe"),
        (GOOD, "name: a\ngate: {against: sft}", "gate: the evaluation holds no model 'sft'"),
        (GOOD, "name: a", "holds no metric 'self_bleu_diversity'"),
    ],
)
def test_an_evaluation_that_the_gate_cannot_read_promotes_nothing(models: Registry, evaluation, recipe, message):
    version = models.version(evaluation, recipe)
    with pytest.raises(DQOError, match=message):
        promotion.promote(models.client, models.name, version)
    assert models.aliases == {} and models.trail == []


def test_an_evaluation_of_another_recipe_is_refused(models: Registry):
    version = models.version(gated_evaluation(0.9, 5.0, recipe_digest="other"), **{"dqo.recipe_digest": "mine"})
    with pytest.raises(DQOError, match="is of the recipe other, the version of mine"):
        promotion.promote(models.client, models.name, version)


def test_an_artifact_store_that_takes_no_files_promotes_nothing(models: Registry, monkeypatch: pytest.MonkeyPatch):
    version = models.version(GOOD)
    place = models.client.get_run(models.evaluation_run).info.artifact_uri

    def read_only(*_: object, **__: object) -> None:  # the tests may run as root, whom permissions do not stop
        raise PermissionError(13, "Permission denied", place.removeprefix("file://"))

    monkeypatch.setattr(mlflow.MlflowClient, "log_text", read_only)
    with pytest.raises(DQOError, match=r"could not write 'promotion/.*the artifact store .* does not take the files"):
        promotion.promote(models.client, models.name, version)
    assert models.aliases == {} and models.trail == []


# --- registration goes the same way ---


def registered(models: Registry, key: str, passed: bool) -> tuple[str, list[str]]:
    run = models.run("rl")
    return registry.register(models.name, run, f"runs:/{run}/x", {"dqo.stage_key": key}, {}, GateResult(passed, ["r"]),
                             "runs:/e/evaluation/evaluation.json")  # fmt: skip


def test_a_registration_moves_its_aliases_through_the_trail(models: Registry):
    registered(models, "k1", True)
    registered(models, "k2", False)
    assert [(e["action"], e["alias"], e["origin"], e["version"]) for e in models.trail] == [
        ("register", "challenger", None, "1"),
        ("register", "champion", None, "1"),
        ("register", "challenger", "1", "2"),
    ]
    assert models.trail[1]["gate"] == {
        "passed": True, "reasons": ["r"], "report": "runs:/e/evaluation/evaluation.json",
    }  # fmt: skip


def test_a_repeated_registration_does_not_undo_a_rollback(models: Registry):
    registered(models, "k1", True)
    run = models.run("rl")
    again = (models.name, run, f"runs:/{run}/x", {"dqo.stage_key": "k2"}, {}, GateResult(True, []))
    assert registry.register(*again) == ("2", ["challenger", "champion"])
    promotion.rollback(models.client, models.name)
    assert registry.register(*again) == ("2", ["challenger"])
    assert models.aliases == {"champion": "1", "challenger": "2"}


def test_a_name_that_is_taken_is_refused(models: Registry):
    gate = GateResult(True, [])
    models.client.create_model_version(models.name, "file:///elsewhere")
    with pytest.raises(DQOError, match=rf"registry.name '{models.name}': taken in MLflow by models of another program"):
        registry.register(models.name, models.run("rl"), "runs:/r/x", {"dqo.stage_key": "k"}, {}, gate)
    assert models.aliases == {} and models.trail == []
    mlflow.genai.register_prompt(name="a-prompt", template="Hello {{name}}")
    with pytest.raises(DQOError, match=r"registry.name 'a-prompt': taken in MLflow by a prompt"):
        registry.register("a-prompt", models.run("rl"), "runs:/r/x", {"dqo.stage_key": "k"}, {}, gate)


# --- rollback ---


def test_a_rollback_restores_the_champion_before_and_then_the_one_before_that(models: Registry):
    for _ in range(3):
        promotion.promote(models.client, models.name, models.version(GOOD))
    assert promotion.rollback(models.client, models.name, "longer answers").event.version == "2"
    assert models.aliases == {"champion": "2"}
    assert promotion.rollback(models.client, models.name).event.version == "1"
    with pytest.raises(DQOError, match="champion is version 1, and the trail names no champion before it"):
        promotion.rollback(models.client, models.name)
    assert models.aliases == {"champion": "1"} and len(models.trail) == 5
    assert (models.trail[3]["why"], models.trail[3]["origin"]) == ("longer answers", "3")


def test_a_deleted_version_is_passed_over(models: Registry):
    for _ in range(3):
        promotion.promote(models.client, models.name, models.version(GOOD))
    models.client.delete_model_version(models.name, "2")
    assert promotion.rollback(models.client, models.name).event.version == "1"


# --- the commands ---


def test_the_commands_say_what_they_have_done(
    models: Registry, store: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):  # fmt: skip
    name = models.name
    models.version(GOOD, **{"eval.quality": "0.8800", "dqo.evaluated_on": "story aaaa, 48 prompts x 8"})
    models.version(BAD, **{"eval.quality": "nan", "gate.passed": "false"})
    models.client.set_registered_model_alias(name, "challenger", "2")
    assert dqo(store, monkeypatch, "promote", name, "1") == 0
    assert f"{name} version 1 is champion." in capsys.readouterr().out
    assert dqo(store, monkeypatch, "promote", name, "challenger") == 1
    shown = capsys.readouterr().out
    assert "below the allowed loss" in shown and "Gate not passed: version 1 stays champion." in shown
    assert dqo(store, monkeypatch, "promote", name, "2", "--force", "asked for") == 0
    assert f"{name} version 2 is champion by force, before it version 1." in capsys.readouterr().out
    assert dqo(store, monkeypatch, "promote", name, "2", "--force", "again") == 0
    assert f"{name} version 2 is champion already." in capsys.readouterr().out

    json_ = tmp_path / "models.json"
    assert dqo(store, monkeypatch, "models", name, "--json", str(json_)) == 0
    shown = capsys.readouterr().out
    (second, first) = [line for line in shown.splitlines() if line.startswith(("1 ", "2 "))]
    assert "challenger, champion" in second and "not passed" in second and "not evaluated" in second
    assert "0.88" in first and "story aaaa, 48 prompts x 8" in first
    moves = [line.split() for line in shown.splitlines() if "promote" in line and line.startswith("20")]
    assert [(line[2], line[3], line[4]) for line in moves] == [("-", "1", "promote"), ("1", "2", "promote")]
    assert "asked for" in shown and "by force" in shown
    document = json.loads(json_.read_text())
    assert [row["version"] for row in document["versions"]] == ["2", "1"]
    assert document["versions"][1]["metrics"]["quality"] == {"mean": 0.88}
    assert [event["version"] for event in document["trail"]] == ["1", "2"]

    assert dqo(store, monkeypatch, "rollback", name, "--why", "a mistake") == 0
    assert f"{name} version 1 is champion, before it version 2." in capsys.readouterr().out
    assert dqo(store, monkeypatch, "models") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{name} "))
    assert line.split()[1:4] == ["2", "1", "2"]


def test_an_interrupted_move_is_named_and_repaired(
    models: Registry, store: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    version = models.version(GOOD)
    event = alias_trail.Event("dead", "champion", "promote", "eve", "2026-01-01T00:00:00Z", version, state="moving")
    models.client.set_registered_model_tag(models.name, "dqo.alias.dead", event.to_json())
    models.client.set_registered_model_alias(models.name, "champion", version)
    assert dqo(store, monkeypatch, "models", models.name) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "! the promote by eve of 2026-01-01T00:00:00Z has not ended" in shown and "--repair" in shown
    monkeypatch.setattr(alias_trail.repair, "__defaults__", (0.2,))
    assert dqo(store, monkeypatch, "models", models.name, "--repair") == 0
    assert "had stopped after champion was moved to version 1; it is confirmed" in capsys.readouterr().out
    assert models.trail[0]["state"] == "done" and models.trail[0]["repaired"]
    assert dqo(store, monkeypatch, "models", models.name, "--repair") == 0
    assert "Nothing to repair." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["promote", "no-such", "1"], "no-such/1: MLflow knows no registered model 'no-such'; registered are: "),
        (["promote", "NAME", "9"], "NAME/9: NAME has no version '9'; its versions are: none"),
        (["promote", "NAME", "best"], "NAME@best: NAME has no alias 'best'; its aliases are: none"),
        (["promote", "NAME", "1", "--recipe", "no/such.yaml"], "no/such.yaml: no such recipe file"),
        (["promote", "NAME", "1", "--force", ""], "--force: the reason is empty"),
        (["rollback", "no-such"], "no-such: MLflow knows no registered model 'no-such'"),
        (["rollback", "NAME"], "NAME: no version is champion, and the trail names no champion before it"),
        (["rollback", "NAME", "--why", "w" * 501], "the reason has 501 characters"),
        (["models", "no-such"], "no-such: MLflow knows no registered model 'no-such'"),
        (["models", "--repair"], "--repair: expected the name of a registered model with it"),
        (["models", "--json", "x.txt"], "--json x.txt: expected the name of a file that ends in .json"),
        (["models", "--uri", "sqlite:///no/such.db"], "--uri sqlite:///no/such.db: there is no such file"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    words: list[str], message: str, store: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):  # fmt: skip
    _, uri, _ = store
    client = tracking.client_of(uri, "promoted")
    if not client.search_registered_models("name = 'NAME'"):
        client.create_registered_model("NAME")
    assert dqo(store, monkeypatch, *words) == 2
    assert capsys.readouterr().err.startswith(f"dqo: {message}")


def test_a_folder_without_a_store_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    assert dqo((tmp_path, "", ""), monkeypatch, "models") == 2
    assert f"{tmp_path / 'mlflow.db'}: no MLflow store; run a recipe first" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
