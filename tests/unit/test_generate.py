"""The command `generate` on a real store with a tiny model: what is drawn, how it is measured, what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from registry_store import Registry

from dqo import inference, registry, tracking
from dqo.checkpoint import CheckpointCard
from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.generation import Response
from dqo.policy import trainable
from dqo.recipe import Encoder, Lora, Policy, Sampling, parse
from dqo.tasks import get_task
from pipelines import cli

PROMPT = "Write one short sentence that uses the words dog, ball, park."


class Trained:
    """A tiny registered model with its pipeline's run, recipe and data."""

    def __init__(self, out: Path, policy: Path, encoder: Path) -> None:
        self.out, self.encoder, uri = out, encoder, tracking.default_uri(out)
        experiment = tracking.connect(parse("name: a\ntracking: {experiment: generate}"), uri)
        store = Registry(uri, experiment, "tiny")
        self.recipe = yaml.safe_dump({
            "name": "tiny", "policy": {"model": str(policy)}, "encoder": {"model": str(encoder)},
            "evaluation": {"sampling": {"max_new_tokens": 6}},
        })  # fmt: skip
        parent = store.run("pipeline", name="pipeline")
        store.client.log_text(parent, self.recipe, "recipe.yaml")
        prepared = store.run("prepare", parent, "prepare")
        row = {"id": "1", "prompt": [{"role": "user", "content": PROMPT}], "references": ["A dog."],
               "concepts": ["dog", "ball", "park"]}  # fmt: skip
        store.client.log_text(prepared, json.dumps(row) + "\n", "data/eval.jsonl")
        self.run = store.run("rl", parent, "rl-dqo")
        self.checkpoint = out / "checkpoint"
        torch.manual_seed(0)
        adapted = trainable(Policy(model=str(policy), lora=Lora(r=2, alpha=4)), torch.device("cpu"), None)
        adapted.save_pretrained(self.checkpoint)
        card = CheckpointCard("dqo", "adapter", str(policy), None, "key", "data", "recipe", None, 1, self.run)
        card.write(self.checkpoint)
        uri = registry.log_model(self.run, self.checkpoint, "tiny", "# A card\n")
        model_id = uri.removeprefix("models:/")
        store.client.create_model_version("tiny", uri, self.run, model_id=model_id)
        store.client.set_registered_model_alias("tiny", "champion", "1")
        store.client.create_model_version("tiny", "s3://elsewhere/model")


@pytest.fixture(scope="module")
def trained(tiny_policy: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("runs"), tiny_policy, tiny_encoder)


def dqo(trained: Trained, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dqo", "generate", *words, "--out", str(trained.out)])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_a_group_is_drawn_and_measured(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    first, second, row = tmp_path / "first.json", tmp_path / "second.json", tmp_path / "row.json"
    assert dqo(trained, monkeypatch, "tiny@champion", PROMPT, "-n", "4", "--json", str(first)) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"tiny/1: {PROMPT}\n") and "mean quality" in shown
    assert dqo(trained, monkeypatch, "tiny", PROMPT, "-n", "4", "--json", str(second)) == 0
    document = json.loads(first.read_text())
    assert document == json.loads(second.read_text())  # the same seed, and NAME is its champion
    assert document["sampling"]["max_new_tokens"] == 6 and document["sampling"]["n"] == 4

    responses = document["responses"]
    assert len(responses) == 4 and all(response["tokens"] <= 6 for response in responses)
    # The reward and the volume by their definitions.
    rule = get_task("story").reward
    expected = [rule(response["text"], {"concepts": ["dog", "ball", "park"]}) for response in responses]
    assert [response["quality"] for response in responses] == pytest.approx(expected)
    vectors = ResponseEncoder(Encoder(model=str(trained.encoder)), "cpu")([r["text"] for r in responses]).vectors
    kernel = vectors.double().numpy() @ vectors.double().numpy().T + np.eye(4)
    assert document["log_volume"] == pytest.approx(np.linalg.slogdet(kernel)[1], abs=1e-5)
    for index, response in enumerate(responses):
        rest = np.delete(np.delete(kernel, index, 0), index, 1)
        left_out = np.linalg.slogdet(kernel)[1] - np.linalg.slogdet(rest)[1]
        assert response["bonus"] == pytest.approx(left_out, abs=1e-5)

    # A row of the task's makes the same prompt.
    given = ["--row", '{"concepts": ["dog", "ball", "park"]}', "-n", "4", "--json", str(row)]
    assert dqo(trained, monkeypatch, "tiny/1", *given) == 0
    assert json.loads(row.read_text()) == document


@pytest.mark.slow
def test_a_prompt_of_its_own_has_no_quality_and_the_reason_is_given(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    assert dqo(trained, monkeypatch, "models:/tiny/1", "Say [something].", "-n", "2", "--max-new-tokens", "3") == 0
    shown = capsys.readouterr().out
    assert "Say [something]." in shown and "mean quality not measured, log-volume" in shown
    assert "Quality: the reward of task 'story' needs concepts, and this prompt is none of its data" in shown


class Drawn:
    """A model that says one thing."""

    def draw(self, prompts: list, n: int, sampling: Sampling, seed: int) -> list[list[Response]]:
        return [[Response("A bakery closed.", 4, False)] * n for _ in prompts]


@pytest.mark.parametrize("reward", ["rule", "reference_similarity"])
def test_a_row_without_the_references_that_the_reward_needs_has_no_quality(tiny_encoder: Path, reward: str):
    model = inference.TrainedModel.__new__(inference.TrainedModel)
    model._model = Drawn()
    model.recipe = parse(
        f"name: a\ntask: summarization\nreward: {{kind: {reward}}}\nencoder: {{model: {tiny_encoder}}}"
    )
    messages = [{"role": "user", "content": "Summarize."}]
    row = {"prompt": messages, "article": "A bakery in the town closed today."}
    group = model.respond(inference.Request(messages, row), 2, model.sampling, 0)
    assert (group.qualities, group.unmeasured) == (None, "the reward needs `references`, and the row holds none")
    del row["article"]
    row["references"] = ["A bakery closed today."]
    if reward == "rule":
        with pytest.raises(DQOError, match=r"^task 'summarization': reward raises KeyError: 'article'"):
            model.respond(inference.Request(messages, row), 2, model.sampling, 0)
    else:
        assert len(model.respond(inference.Request(messages, row), 2, model.sampling, 0).qualities) == 2


@pytest.mark.slow
def test_a_checkpoint_needs_no_store_and_a_recipe_for_its_quality(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    model = inference.TrainedModel(trained.checkpoint, None)
    assert "the model's recipe is not known" in model.ask(PROMPT).unknown
    with pytest.raises(DQOError, match="--row: the model's recipe is not known"):
        model.ask_row("{}")
    with pytest.raises(DQOError, match=r"the prompt has .* tokens, and its response may have 250; the model reads 256"):
        model.respond(model.ask(PROMPT), 2, Sampling(max_new_tokens=250), 0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(trained.recipe)
    monkeypatch.chdir(tmp_path)
    given = ["--recipe", str(recipe), "-n", "2", "--temperature", "0.5"]
    # The task's own data hold this prompt, in their words.
    bundled = json.loads(get_task("story").bundled.read_text(encoding="utf-8").splitlines()[0])
    prompt = get_task("story").prompt(bundled)[-1]["content"]
    assert dqo(trained, monkeypatch, str(trained.checkpoint), prompt, *given) == 0
    assert "mean quality 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny"], "expected a prompt, or a row of the model's task with --row, and not both"),
        (["tiny", "a", "--row", "{}"], "expected a prompt, or a row"),
        (["tiny", "a", "-n", "0"], "-n 0: expected a number of responses from 1 to 1024"),
        (["tiny", "a", "--seed", "-1"], "--seed -1: expected a number from 0 to 2^63 - 1"),
        (["tiny", "a", "--temperature", "0"], "--temperature 0.0: input should be greater than 0"),
        (["tiny", "a", "--top-p", "1.5"], "--top-p 1.5: input should be less than or equal to 1"),
        (["tiny", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: input should be greater than"),
        (["tiny", "a", "--json", "x.txt"], "--json x.txt: expected the name of a file that ends in .json"),
        (["tiny", "a", "--recipe", "no.yaml"], "no.yaml: no such recipe file"),
        (["no-such", "a"], "no-such: MLflow knows no registered model 'no-such'; registered are: tiny"),
        (["tiny/9", "a"], "tiny/9: tiny has no version '9'; its versions are: 1, 2"),
        (["tiny@best", "a"], "tiny@best: tiny has no alias 'best'; its aliases are: champion (version 1)"),
        (["tests", "a"], "tests: the folder holds no checkpoint.json"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    trained: Trained, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert dqo(trained, monkeypatch, *words) == 2
    assert capsys.readouterr().err.startswith(f"dqo: {message}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--row", "{"], "--row: not valid JSON"),
        (["--row", "[]"], "--row: expected a JSON object with `concepts`, `references`, got list"),
        (["--row", '{"concepts": 3}'], "--row: concepts: got 3"),
        ([" "], "the prompt is empty"),
    ],
)
def test_a_row_or_prompt_that_is_none_is_refused(
    trained: Trained, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    assert dqo(trained, monkeypatch, "tiny/1", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_loading_of_the_documents_works_without_us(trained: Trained, tiny_policy: Path, tmp_path: Path):
    """docs/registry.md's code in a process of its own, with the tiny model for the real one."""
    text = (Path(__file__).parents[2] / "docs" / "registry.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "PeftModel" in block]
    for documented, here in {
        "sqlite:///runs/mlflow.db": tracking.default_uri(trained.out),
        "dqo-quickstart@challenger": "tiny@champion",
        "bundled:smollm2-135m-instruct": str(tiny_policy),
    }.items():
        assert code.count(documented) == 1
        code = code.replace(documented, here)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    code += "print(len(drawn), type(model).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("8 PeftModelForCausalLM\n")
