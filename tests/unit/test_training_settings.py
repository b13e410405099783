"""What a recipe's method becomes in a training run: what MLflow shows of it, and what its task can refuse."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from dqo import defences
from dqo.errors import DQOError
from dqo.recipe import Defences, parse
from dqo.stages import prepare, rl, sft
from dqo.stages.context import Context
from dqo.stages.training import parameters
from dqo.tasks import get_task


def test_mlflow_shows_each_defence_of_a_training_run(tmp_path: Path):
    asked = {
        "min_quality": 0.5, "quality_gate": "group", "drop_truncated": True, "max_tokens": 20,
        "min_prompt_similarity": 0.1, "unearned": "zero", "embed": "answer", "strip_reasoning": True,
    }  # fmt: skip
    assert asked.keys() == Defences.model_fields.keys()
    recipe = parse(json.dumps({"name": "a", "task": "reasoning", "method": {"defences": asked}}))
    context, folder = SimpleNamespace(recipe=recipe), SimpleNamespace(path=tmp_path)
    shown = parameters(recipe, rl._settings(context, folder, "dqo"))
    assert {name: shown[f"defences.{name}"] for name in asked} == asked
    assert shown["distinct_threshold"] == 0.7
    of_sft = parameters(recipe, sft._settings(context, folder))
    assert {name: value for name, value in of_sft.items() if name.startswith("defences.")} == {
        "defences.embed": "answer", "defences.strip_reasoning": True
    }  # fmt: skip


@pytest.mark.parametrize("embed", ["answer", "through_answer"])
def test_part_of_a_response_is_embedded_only_where_the_task_says_which(embed: str, tmp_path: Path):
    recipe = parse(f"name: a\nmethod: {{defences: {{embed: {embed}}}}}")
    message = rf"^method\.defences\.embed: got '{embed}', but task 'story' does not say where in a response its answer"
    with pytest.raises(DQOError, match=message):
        defences.check(recipe, get_task("story"))
    with pytest.raises(DQOError, match=message):
        prepare.run(Context(recipe, tmp_path / "workspace", f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []  # nothing was begun
    defences.check(recipe, get_task("reasoning"))
    defences.check(parse("name: a"), get_task("story"))


@pytest.mark.parametrize(("bounds", "said"), [("max: 6.5", "max: got 6.5"), ("min: 6.4, max: 9", "min: got 6.4")])
def test_an_entropy_that_no_vocabulary_reaches_is_refused(bounds: str, said: str, tiny_policy, tmp_path: Path):
    text = f"name: a\npolicy: {{model: '{tiny_policy}'}}\nrl: {{health: {{entropy: {{{bounds}}}}}}}"
    size = json.loads((tiny_policy / "config.json").read_text())["vocab_size"]
    assert 6.3 < math.log(size) < 6.4
    context = Context(parse(text), tmp_path / "workspace", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(DQOError, match=rf"rl\.health\.entropy\.{said}; expected less than {math.log(size):.4g} nats"):
        prepare.run(context, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []
    prepare._check_entropy(parse(text.replace(bounds, "max: 6.3")))
