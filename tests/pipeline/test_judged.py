"""The evaluation with a judge, from the responses to the gate: real stages on tiny models, a server on loopback."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml
from judge_server import JudgeServer, Reply, completion, fenced, serving, verdict
from pipeline.tiny_runs import write_recipe
from safetensors.torch import load_file, save_file
from tiny import write_reward_model
from transformers import AutoTokenizer, LlamaForSequenceClassification

from dqo import tracking
from dqo.checkpoint import CheckpointCard
from dqo.errors import DQOError
from dqo.files import read_jsonl
from dqo.gate import decide
from dqo.judges.labelled import read_labelled
from dqo.recipe import load
from dqo.stages import evaluate, prepare, register, rl, sft
from dqo.stages.context import Context
from pipelines.local import RunFolder, start

LABELS = {
    (pair.prompt.strip(), a.strip(), b.strip()): label
    for pair in read_labelled().pairs
    for a, b, label in (
        (pair.a, pair.b, pair.label),
        (pair.b, pair.a, {"A": "B", "B": "A", "tie": "tie"}[pair.label]),
    )
}
AUDIT_PAIRS = len(read_labelled().pairs)


@dataclass
class Reader:
    """Answers the audit's pairs as labelled, and prefers the responses of one model of the evaluation.

    It knows the model by the response's text, which is all a judge sees; equal texts are a tie.
    """

    favourite: set[str] = field(default_factory=set)

    def __call__(self, number: int, body: dict[str, Any]) -> Reply:
        found = fenced(body)
        question, a, b = (plain(found[tag]).strip() for tag in ("question", "response-a", "response-b"))
        if (label := LABELS.get((question, a, b))) is not None:
            return verdict(label, "as labelled")
        mine, other = a in self.favourite, b in self.favourite
        return verdict("tie" if mine == other else "A" if mine else "B", "read \ud800 <b>both</b>")


def plain(text: str) -> str:
    """What was escaped for the judge, as it was."""
    return text.replace("&lt;", "<").replace("&#91;", "[")


@pytest.fixture(scope="module")
def trained(tiny_policy, tiny_encoder, tmp_path_factory) -> Iterator[tuple[Path, Path, list[Path]]]:
    """Data and checkpoints of a tiny run, whose workspace the tests copy nothing from but the responses."""
    folder = tmp_path_factory.mktemp("judged")
    # Steps so large that the models, which sample with the same random numbers, say different things.
    sections = {"sft": {"steps": 1, "learning_rate": 0.05}, "rl": {"steps": 2, "learning_rate": 0.05}}
    recipe = load(write_recipe(folder / "r.yaml", tiny_policy, tiny_encoder, **sections))
    context = Context(recipe, folder / "workspace", tracking.default_uri(folder))
    prepare.run(context, folder / "data")
    context = Context.after_prepare(recipe, context.workspace, context.mlflow_uri, folder / "data")
    sft.run(context, folder / "data", folder / "sft")
    for variant in ("reward_only", "dqo"):
        rl.run(context, variant, folder / "data", folder / "sft", folder / variant)
    yield folder, folder / "r.yaml", [folder / name for name in ("sft", "reward_only", "dqo")]


@dataclass
class Run:
    """Evaluations of the trained models with the judge of one server."""

    folder: Path
    recipe: Path
    checkpoints: list[Path]
    out: Path
    sections: dict[str, Any]

    @property
    def context(self) -> Context:
        content = yaml.safe_load(self.recipe.read_text()) | self.sections
        (self.out / "recipe.yaml").write_text(yaml.safe_dump(content))
        recipe = load(self.out / "recipe.yaml")
        context = Context(recipe, self.folder / "workspace", tracking.default_uri(self.folder))
        return Context.after_prepare(recipe, context.workspace, context.mlflow_uri, self.folder / "data")

    def evaluate(self) -> dict[str, Any]:
        evaluate.run(self.context, self.folder / "data", self.checkpoints, self.out / "evaluation")
        return json.loads((self.out / "evaluation" / "evaluation.json").read_text())


@pytest.fixture
def judged(trained, tmp_path) -> Callable[..., Run]:
    """Makes a run whose judge answers from a cache of its own, so that tests do not answer for one another."""

    def make(server: JudgeServer, gate: dict[str, Any] | None = None, **fields: Any) -> Run:
        settings = server.settings(tmp_path / "cache", max_attempts=1, **fields)
        judge = settings.model_dump(mode="json")
        # The quickstart's rules are not what these tests are about: random models differ by chance.
        rules = {"max_quality_loss": 10.0, "judge": gate if gate is not None else {"min_win_rate": 0.5}}
        folder, recipe, checkpoints = trained
        return Run(folder, recipe, checkpoints, tmp_path, {"judge": judge, "gate": rules})

    return make


def responses(run: Run, model: str, count: int = 2) -> dict[str, list[str]]:
    """Model's responses that are judged, by prompt id, from the file of an evaluation."""
    rows = read_jsonl(run.out / "evaluation" / "responses.jsonl")
    return {row["id"]: row["responses"][:count] for row in rows if row["model"] == model}


def prefer(reader: Reader, run: Run, model: str) -> None:
    """Have the reader prefer a model, whose responses an evaluation without a judge has written first."""
    context = run.context
    without = Context(
        context.recipe.model_copy(update={"judge": None, "gate": type(context.recipe.gate)()}),
        context.workspace, context.mlflow_uri, context.parent_run_id,
    )  # fmt: skip
    evaluate.run(without, run.folder / "data", run.checkpoints, run.out / "evaluation")
    texts = {name: responses(run, name) for name in ("base", "sft", "reward_only", "dqo")}
    others = {text.strip() for name, groups in texts.items() if name != model for g in groups.values() for text in g}
    reader.favourite = {text.strip() for group in texts[model].values() for text in group} - others
    assert len(reader.favourite) >= 6  # random responses are hardly ever equal


def judge_reasons(result: dict[str, Any]) -> list[str]:
    return [reason for reason in result["gate"]["reasons"] if "judge" in reason]


def test_a_preferred_model_wins_in_the_evaluation_the_report_and_mlflow(judged):
    reader = Reader()
    with serving(reader) as server:
        run = judged(server)
        prefer(reader, run, "dqo")
        assert server.count == 0
        result = run.evaluate()
        asked = server.count
        assert run.evaluate() == result
        assert server.count == asked  # finished: the second call has asked nothing
    judge = result["judge"]
    assert judge["complete"] and judge["reason"] is None and judge["audit"]["passed"]
    assert judge["audit"]["measures"]["kappa"] == 1.0 and judge["audit"]["faults"] == []
    assert judge["requests"] == asked and judge["against"] == "reward_only"
    assert set(judge["models"]) == {"base", "sft", "dqo"}

    # The same rates from the responses alone: a pair is won where the text is one of the favourites.
    ours, theirs = responses(run, "dqo"), responses(run, "reward_only")
    expected = [
        sum(1.0 if a.strip() in reader.favourite else 0.5 for a, _ in zip(ours[key], theirs[key], strict=True)) / 2
        for key in ours
    ]
    found = judge["models"]["dqo"]
    assert found["per_prompt"] == expected and sum(expected) / len(expected) > 0.9
    assert found["win_rate"]["mean"] == pytest.approx(sum(expected) / len(expected))
    assert found["win_rate"]["low"] > 0.5
    assert judge["models"]["sft"]["win_rate"]["mean"] == 0.5 and judge["models"]["sft"]["tie_rate"] == 1.0
    assert found["pairs"] == 12 and (found["invalid"], found["missing"]) == (0, 0)
    assert found["first_position_rate"] == 0.5 and found["flip_rate"] == 0.0

    verdicts = read_jsonl(run.out / "evaluation" / "judge-verdicts.jsonl")
    assert Counter(row["model"] for row in verdicts) == {"base": 12, "sft": 12, "dqo": 12}
    won = Counter(row["verdict"] for row in verdicts if row["model"] == "dqo")
    assert won["A"] + won["tie"] / 2 == pytest.approx(12 * found["win_rate"]["mean"])
    assert {reason for row in verdicts for reason in row["reasons"]} == {"read ? <b>both</b>"}  # no half surrogate
    assert json.loads((run.out / "evaluation" / "judge-audit.json").read_text())["passed"]

    first, *_ = judge_reasons(result)
    assert re.search(r"the judge's win rate at equal lengths 0\.\d+ \[.*\] against reward_only: its lower bound", first)
    page = (run.out / "evaluation" / "report.html").read_text()
    assert "What the judge says" in page and "It has passed its audit" in page
    assert "read ? &lt;b&gt;both&lt;/b&gt;" in page and first.split(" [")[0].replace("'", "&#39;") in page

    client = mlflow.MlflowClient(run.context.mlflow_uri)
    card = CheckpointCard.read(run.folder / "dqo")
    logged = client.get_run(card.mlflow_run_id).data.metrics
    assert logged["judge/win_rate"] == pytest.approx(found["win_rate"]["mean"])
    assert logged["judge/win_rate_low"] == pytest.approx(found["win_rate"]["low"])
    assert logged["judge/win_rate_length_controlled"] == pytest.approx(found["length_controlled"]["mean"])
    assert (logged["judge/pairs"], logged["judge/invalid"], logged["judge/missing"]) == (12, 0, 0)
    parent = client.get_run(run.context.parent_run_id).data
    assert parent.tags["dqo.judge"] == "complete" and parent.metrics["judge/win_rate"] == logged["judge/win_rate"]


def test_a_reward_model_judges_by_its_scores(trained, tmp_path):
    """Against the library's own classes, one conversation at a time."""
    folder, recipe, checkpoints = trained
    model = write_reward_model(tmp_path / "model")
    judge = {"reward": {"model": str(model), "margin": 0.02}}
    rules = {"max_quality_loss": 10.0, "judge": {"min_win_rate": 0.5}}
    run = Run(folder, recipe, checkpoints, tmp_path, {"judge": judge, "gate": rules})
    result = run.evaluate()
    found = result["judge"]["models"]["dqo"]

    plain_model = LlamaForSequenceClassification.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = {row["id"]: row["prompt"] for row in read_jsonl(folder / "data" / "eval.jsonl")}

    def scored(key: str, text: str) -> float:
        messages = [*prompts[key], {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            return plain_model(input_ids=ids).logits.item()

    expected = {}
    ours, theirs = responses(run, "dqo"), responses(run, "reward_only")
    for key in ours:
        assert not any(special in text for text in ours[key] + theirs[key] for special in tokenizer.all_special_tokens)
        gaps = [scored(key, a) - scored(key, b) for a, b in zip(ours[key], theirs[key], strict=True)]
        expected[key] = sum(0.5 if abs(gap) <= 0.02 else float(gap > 0) for gap in gaps) / len(gaps)
    assert found["per_prompt"] == list(expected.values()) and len(set(found["per_prompt"])) > 1
    scores = read_jsonl(run.out / "evaluation" / "judge-scores.jsonl")
    first = next(row for row in scores if (row["model"], row["response"]) == ("dqo", 0))
    assert first["value"] == pytest.approx(scored(first["id"], ours[first["id"]][0]), abs=1e-5)

    identity = result["judge"]["identity"]
    assert (identity["kind"], identity["model"], identity["margin"]) == ("reward", str(model), 0.02)
    assert found["flip_rate"] is None and found["first_position_rate"] is None
    assert not result["judge"]["audit"]["passed"]
    assert any("audit" in reason for reason in judge_reasons(result)) and not result["gate"]["passed"]
    page = (run.out / "evaluation" / "report.html").read_text()
    assert f"{model} compared the first 2 responses" in page and "by scores" in page and "A reward model, rev" in page
    client = mlflow.MlflowClient(run.context.mlflow_uri)
    logged = client.get_run(CheckpointCard.read(folder / "dqo").mlflow_run_id).data.metrics
    assert logged["judge/win_rate"] == pytest.approx(found["win_rate"]["mean"])

    said = {(row["id"], row["model"]): row["reasons"] for row in scores if row["response"] == 0}
    for key in ours:  # six prompts, which is as many as the page shows
        assert f"DQO-RL (alpha = 1): {said[key, 'dqo']}; Reward-only RL: {said[key, 'reward_only']}" in page

    # Another model under the same name is another judge.
    changed(model)
    again = run.evaluate()["judge"]
    assert again["identity"]["revision"] != identity["revision"]
    assert again["models"]["dqo"]["per_prompt"] != found["per_prompt"]


def changed(model: Path) -> None:
    """Turn a reward model's scores around."""
    weights = load_file(model / "model.safetensors")
    weights["score.weight"] = -weights["score.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_what_the_judge_says_is_attached_to_the_model_version_with_the_data(judged):
    reader = Reader()
    with serving(reader) as server:
        run = judged(server)
        prefer(reader, run, "dqo")
        result = run.evaluate()
    context = run.context
    register.run(context, run.checkpoints, run.out / "evaluation", run.out / "registration.json")
    registered = json.loads((run.out / "registration.json").read_text())
    client = mlflow.MlflowClient(context.mlflow_uri)
    version = client.get_model_version(registered["name"], registered["version"])
    logged = client.get_logged_model(version.source.removeprefix("models:/")).metrics
    # MLflow adds those of the training run by itself, without the data.
    attached = {metric.key: metric for metric in logged if metric.dataset_digest is not None}
    said = result["judge"]["models"]["dqo"]
    for name, key in (("win_rate", "win_rate"), ("win_rate_length_controlled", "length_controlled")):
        for end, bound in (("", "mean"), ("_low", "low"), ("_high", "high")):
            assert attached[f"judge/{name}{end}"].value == pytest.approx(said[key][bound])
    assert attached["judge/audit_passed"].value == 1.0 and attached["judge/audit_kappa"].value == 1.0
    assert attached["judge/complete"].value == 1.0 and attached["judge/pairs"].value == 12
    data = {(one.dataset_name, one.dataset_digest) for key, one in attached.items() if key.startswith("judge/win")}
    assert data == {(context.recipe.task, result["data_digest"][:36])}
    # The audit was measured on other data.
    labelled = attached["judge/audit_kappa"]
    assert (labelled.dataset_name, labelled.dataset_digest) == ("labelled pairs shipped", read_labelled().digest)


def test_labelled_pairs_of_ones_own_decide_the_audit(judged, tmp_path):
    own = tmp_path / "own.jsonl"
    rows = [
        {
            "id": str(i),
            "prompt": f"Which number follows {i}?",
            "a": f"It is {i + 1}.",
            "b": f"It is {i - 1}.",
            "label": "A",
        }
        for i in (10, 20, 30, 40)
    ] + [{"id": "last", "prompt": "Which number follows 3?", "a": "It is 2.", "b": "It is 4.", "label": "B"}]
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = Reader({row["a"] if row["label"] == "A" else row["b"] for row in rows})
    demands = {"max_verbosity_bias": None, "max_injection_rate": None}
    with serving(reader) as server:
        run = judged(server, labelled=str(own), audit=demands)
        good = run.evaluate()["judge"]
        asked = server.count
        # Other labels are another audit; what the judge said of the same pairs is known.
        own.write_text(own.read_text().replace('"label": "A"', '"label": "B"'))
        bad = run.evaluate()
        assert server.count == asked
        # As the first time, wherever the file is.
        own.write_text("".join(json.dumps(row) + "\n" for row in rows))
        moved = own.rename(tmp_path / "moved.jsonl")
        run.sections["judge"]["labelled"] = str(moved)
        assert run.evaluate()["judge"] == good and server.count == asked
        run.sections["judge"]["labelled"] = None
        shipped = run.evaluate()["judge"]["audit"]
    digest = hashlib.sha256(moved.read_bytes()).hexdigest()[:12]
    assert good["audit"]["labelled"] == {"name": "own.jsonl", "digest": digest, "pairs": 5}
    assert good["audit"]["passed"] and good["audit"]["measures"]["kappa"] == 1.0
    assert not bad["judge"]["audit"]["passed"] and bad["judge"]["audit"]["measures"]["kappa"] < 0.6
    assert bad["judge"]["models"] == good["models"]
    assert judge_reasons(bad)[0].startswith("the judge has not passed its audit, so its verdicts do not count")
    assert shipped["labelled"]["name"] == "shipped" and shipped["labelled"]["pairs"] == AUDIT_PAIRS


def test_labelled_pairs_that_are_none_are_refused_line_by_line_before_anything_is_sampled(judged, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text('{"id": "1", "prompt": "q", "a": "x", "b": "y", "label": "A"}\nnonsense\n')
    with serving(Reader()) as server:
        run = judged(server, labelled=str(own))
        with pytest.raises(DQOError, match=r"own\.jsonl: 1 error\n  line 2: not JSON"):
            run.evaluate()
        folder = RunFolder.of(run.context.recipe, tmp_path / "runs")
        with pytest.raises(DQOError, match=r"own\.jsonl: 1 error\n  line 2: not JSON"):
            start(run.context.recipe, folder, fresh=False)
        own.unlink()
        with pytest.raises(DQOError, match=r"own\.jsonl: cannot be read \(No such file"):
            start(run.context.recipe, folder, fresh=False)
        assert server.count == 0 and not folder.root.exists()


def evaluation_run(run: Run) -> Any:
    """MLflow's run of the newest evaluation."""
    client = mlflow.MlflowClient(run.context.mlflow_uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    return client.search_runs(experiments, "tags.`dqo.stage` = 'evaluate'", order_by=["attributes.start_time DESC"])[0]


def registered(run: Run) -> dict[str, Any]:
    """What a registration leaves on the page of its version: figures with their data, tags, card."""
    context = run.context
    register.run(context, run.checkpoints, run.out / "evaluation", run.out / "registration.json")
    document = json.loads((run.out / "registration.json").read_text())
    client = mlflow.MlflowClient(context.mlflow_uri)
    version = client.get_model_version(document["name"], document["version"])
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    newest = sorted((one for one in logged.metrics if one.dataset_digest is not None), key=lambda one: one.timestamp)
    card = mlflow.artifacts.download_artifacts(version.source, dst_path=str(run.out / "model"))
    return {
        "version": document["version"],
        "figures": {one.key: one.value for one in newest},
        "tags": version.tags,
        "card": (Path(card) / "artifacts" / "checkpoint" / "README.md").read_text(),
    }


def test_a_judge_that_is_down_for_the_whole_run_leaves_the_rest_and_the_gate_refuses(judged):
    with serving(lambda *_: Reply(503, b"out for lunch")) as server:
        run = judged(server)
        run.sections["registry"] = {"name": "judged-when-it-was-back"}  # no other test's version
        result = run.evaluate()
        asked = server.count
        assert asked == 1  # once: nothing else is sent to a server that has never answered
        page = (run.out / "evaluation" / "report.html").read_text()
        state = evaluation_run(run).data.tags["dqo.judge"]
        refused = registered(run)
        warnings = [event for event in read_jsonl(run.context.progress_file) if event["event"] == "warning"]
        # It is not frozen: the judge is back, and the same call asks it.
        server.script = Reader()
        again = run.evaluate()
        passed = registered(run)
    assert again["judge"]["complete"] and evaluation_run(run).data.tags["dqo.judge"] == "complete"
    assert refused["figures"]["judge/complete"] == 0.0 and "judge/win_rate" not in refused["figures"]
    assert "the judge is not done" in refused["card"] and "the judge is not done" in refused["tags"]["gate.reasons"]
    # One version, whose own page says what the second evaluation has found.
    assert passed["version"] == refused["version"]
    assert passed["figures"]["judge/complete"] == 1.0 and passed["figures"]["judge/pairs"] == 12
    assert "the judge is not done" not in passed["card"] + passed["tags"]["gate.reasons"]
    assert "the judge's win rate" in passed["card"]
    judge = result["judge"]
    assert not judge["complete"] and "is down: 503: out for lunch" in judge["reason"]
    assert f"{4 * AUDIT_PAIRS} answers of its audit, 36 of 36 pairs" in judge["reason"]
    assert judge["models"]["dqo"]["win_rate"] == {"mean": None, "low": None, "high": None}
    assert set(result["models"]) == {"base", "sft", "reward_only", "dqo"}  # all that needs no judge is there
    assert not result["gate"]["passed"]
    assert judge_reasons(result) == [
        f"the judge is not done: {judge['reason']}; repeat the run, which asks only for what is missing"
    ]
    assert "The judge is not done, so the gate refuses" in page and state == "incomplete"
    assert "out for lunch" in warnings[-1]["message"]


def test_an_incomplete_judge_refuses_even_without_a_rule_for_it(judged):
    with serving(lambda *_: Reply(500)) as server:
        run = judged(server)
        run.sections["gate"]["judge"] = None
        result = run.evaluate()
    assert len(judge_reasons(result)) == 1 and not result["gate"]["passed"]


def test_a_judge_that_is_cut_off_midway_is_asked_only_for_the_rest(judged):
    reader = Reader()
    answered: list[str] = []
    first_part = cut_after = 200

    def script(number: int, body: dict[str, Any]) -> Reply:
        if number >= cut_after:
            return Reply(503, b"gone")
        answered.append(json.dumps(body["messages"], sort_keys=True))
        return reader(number, body)

    with serving(script) as server:
        run = judged(server, max_concurrency=1)
        first = run.evaluate()
        assert len(answered) == first_part and not first["judge"]["complete"]
        assert first["judge"]["audit"]["passed"]  # done before it went away
        assert 0 < first["judge"]["models"]["dqo"]["missing"] <= 12
        cut_after = 10**6
        second = run.evaluate()
    assert second["judge"]["complete"] and second["judge"]["models"]["dqo"]["missing"] == 0
    # The audit asks each of its questions twice on purpose, with the same words; nothing else is asked again.
    ours = [text for text in answered if "as labelled" not in text]
    questions = Counter(answered)
    repeated = [text for text, count in questions.items() if count > 1]
    labelled = {prompt for prompt, _, _ in LABELS}
    assert all(count == 2 for count in questions.values() if count > 1)
    assert all(any(json.dumps(prompt)[1:-1] in text or prompt in text for prompt in labelled) for text in repeated)
    assert len(ours) == len(answered)
    assert second["judge"]["requests"] == len(answered) - first_part


def test_a_spent_budget_is_said_and_the_next_call_goes_on(judged):
    with serving(Reader()) as server:
        run = judged(server, max_requests=230)
        result = run.evaluate()
        assert server.count == 230
        assert "the budget of 230 requests (judge.max_requests) is spent" in result["judge"]["reason"]
        assert not result["judge"]["complete"]
        assert run.evaluate()["judge"]["complete"]


def test_garbage_fails_the_audit_and_decides_nothing(judged):
    with serving(lambda *_: completion("I like both of them.")) as server:
        run = judged(server)
        result = run.evaluate()
        page = (run.out / "evaluation" / "report.html").read_text()
        # It may have been a bad hour: the same call asks again, and is finished then.
        server.script = Reader()
        again, asked = run.evaluate(), server.count
        assert run.evaluate() == again and server.count == asked
    assert again["judge"]["audit"]["passed"] and again["judge"]["models"]["dqo"]["invalid"] == 0
    judge = result["judge"]
    assert judge["complete"] and not judge["audit"]["passed"]
    assert judge["models"]["dqo"]["invalid"] == 12
    assert not result["gate"]["passed"]
    (reason,) = judge_reasons(result)
    assert reason.startswith("the judge has not passed its audit, so its verdicts do not count: ")
    assert "share of answers that cannot be read: 1.00, not as demanded (at most 0.05)" in reason
    assert "It has not passed its audit" in page


@pytest.mark.parametrize(("status", "words"), [(401, "it wants a key"), (404, "knows the model 'judge'")])
def test_a_judge_that_can_never_answer_stops_the_stage(judged, status: int, words: str):
    with serving(lambda *_: Reply(status, b"no")) as server, pytest.raises(DQOError, match=words):
        judged(server).evaluate()
    assert server.count == 1


def test_a_missing_key_stops_before_anything_is_sampled(judged, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with serving(Reader()) as server:
        run = judged(server, api_key_env="NO_SUCH_KEY")
        with pytest.raises(DQOError, match="NO_SUCH_KEY is not set"):
            run.evaluate()
        assert server.count == 0


def test_a_judge_that_scores_gives_scores_and_comparisons_for_the_same_requests(judged):
    def by_length(_: int, body: dict[str, Any]) -> Reply:
        score = 1 + len(fenced(body)["response"].split()) % 5
        return completion(json.dumps({"reasons": "counted", "score": score}))

    with serving(by_length) as server:
        run = judged(server, prompt="pointwise")
        result = run.evaluate()
        bodies = [json.dumps(body["messages"]) for body in server.bodies]
    judge = result["judge"]
    scores = read_jsonl(run.out / "evaluation" / "judge-scores.jsonl")
    assert len(scores) == 4 * 12 and {row["status"] for row in scores} == {"valid"}
    expected = {
        (name, key, index): 1.0 + len(plain_words(text)) % 5
        for name in ("base", "sft", "reward_only", "dqo")
        for key, group in responses(run, name).items()
        for index, text in enumerate(group)
    }
    assert {(row["model"], row["id"], row["response"]): row["value"] for row in scores} == expected
    own = [value for (name, _, _), value in expected.items() if name == "dqo"]
    assert judge["scores"]["dqo"]["score"]["mean"] == pytest.approx(sum(own) / len(own))
    page = (run.out / "evaluation" / "report.html").read_text()
    assert "Score</th>" in page and page.count("not applicable</span>") == 2 * 3
    # Places play no part for it: no share that holds by construction stands for something that was measured.
    for content in (judge["audit"]["measures"], *judge["models"].values()):
        assert (content["first_position_rate"], content["flip_rate"]) == (None, None)
    assert any("shown first: not applicable" in reason for reason in judge["audit"]["reasons"])
    assert not any("not applicable" in fault for fault in judge["audit"]["faults"])
    assert "judge/audit_first_position_rate" not in evaluation_run(run).data.metrics
    # Each response once for the evaluation, whatever is compared with what; the audit's twice on purpose.
    assert max(Counter(bodies).values()) == 2 and not judge["audit"]["passed"]


def plain_words(text: str) -> list[str]:
    return text.encode("utf-8", "replace").decode().split()


def test_the_decision_follows_from_the_file_alone(judged):
    reader = Reader()
    with serving(reader) as server:
        run = judged(server)
        prefer(reader, run, "dqo")
        result = run.evaluate()
    gate = run.context.recipe.gate
    again = decide(gate, json.loads((run.out / "evaluation" / "evaluation.json").read_text()))
    assert (again.passed, again.reasons) == (result["gate"]["passed"], result["gate"]["reasons"])
    assert not decide(gate, result, "sft").passed  # all ties: the lower bound is below one half
