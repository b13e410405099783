"""Rewards that a recipe names: similarity to references and reward models, against plain computations one by one."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import reward_model_config, write_reward_model
from tiny import tokenizer as tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from dqo import rewards, tracking
from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.recipe import Encoder, Recipe, Reward
from dqo.rewards.model import RewardModel
from dqo.rewards.similarity import ReferenceSimilarity, copied
from dqo.stages import evaluate, prepare, rl, sft
from dqo.stages.context import Context, reward_identity
from dqo.tasks.instruction import INSTRUCTION
from dqo.tasks.story import STORY

CPU = torch.device("cpu")
PROMPT = [{"role": "user", "content": "What did the old man feed?"}]
OTHER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who ran?"}]
RESPONSES = ["He fed three hungry ducks by the lake.", "A dog.", "Nobody saw a cat on that roof.", "Rain, I think."]
ROWS = [
    {"prompt": PROMPT, "references": ["Ducks.", "He gave bread to the ducks."]},
    {"prompt": OTHER, "references": ["The dog ran."]},
    {"prompt": OTHER, "references": ["A dog.", "It was the dog.", "Dogs!"]},
    {"prompt": PROMPT, "references": ["Some ducks."]},
]


def write_bert(folder: Path, labels: int = 1) -> Path:
    """Save a random BERT reward model whose tokenizer marks pairs and has no chat template."""
    torch.manual_seed(4)
    fast = tiny_tokenizer()
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[(name, fast.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")],
    )
    fast.chat_template = None
    config = BertConfig(
        vocab_size=len(fast), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, initializer_range=0.5, num_labels=labels, pad_token_id=fast.pad_token_id,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def spec(folder: Path, **changes) -> Reward:
    return Reward(kind="model", model=str(folder), **changes)


def changed(folder: Path, value: float) -> Path:
    """Give a saved reward model's head zeros and one other value."""
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = torch.zeros_like(weights["score.weight"])
    weights["score.weight"][0, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plain_scores(folder: Path) -> list[float]:
    """Each conversation alone, without padding, through the library's own classes."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    fast = AutoTokenizer.from_pretrained(folder)
    found = []
    for response, row in zip(RESPONSES, ROWS, strict=True):
        text = fast.apply_chat_template([*row["prompt"], {"role": "assistant", "content": response}], tokenize=False)
        ids = torch.tensor([fast.convert_tokens_to_ids(fast.tokenize(text))])
        with torch.no_grad():
            found.append(model(input_ids=ids).logits.item())
    assert np.ptp(found) > 0.1  # else nothing below could fail
    return found


# --- reward models ---


@pytest.mark.parametrize("padding", ["pad", "none", "eos"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_one_conversation_at_a_time(tmp_path, padding, batch_size):
    folder = write_reward_model(tmp_path / "rm", padding=padding)
    raw = plain_scores(folder)
    model = RewardModel(spec(folder, batch_size=batch_size, squash=False), CPU)
    assert model(RESPONSES, ROWS) == pytest.approx(raw, abs=1e-5)
    squashed = RewardModel(spec(folder, batch_size=batch_size), CPU)(RESPONSES, ROWS)
    assert squashed == pytest.approx([1 / (1 + math.exp(-score)) for score in raw], abs=1e-5)


def test_a_tokenizer_without_a_template_gets_a_pair(tmp_path):
    folder = write_bert(tmp_path / "rm")
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    fast = AutoTokenizer.from_pretrained(folder)
    expected = []
    for response, asked in zip(RESPONSES, [PROMPT[0]["content"], "Be brief.\nWho ran?"] * 2, strict=True):
        with torch.no_grad():
            expected.append(model(**fast(asked, response, return_tensors="pt")).logits.item())
    assert np.ptp(expected) > 0.1
    rows = [ROWS[0], ROWS[1]] * 2
    assert RewardModel(spec(folder, squash=False), CPU)(RESPONSES, rows) == pytest.approx(expected, abs=1e-5)


def test_without_template_and_pairs_the_response_follows_on_a_new_line(tmp_path):
    folder = write_reward_model(tmp_path / "rm")
    (folder / "chat_template.jinja").unlink()
    fast = AutoTokenizer.from_pretrained(folder)
    assert not fast.chat_template
    ids = torch.tensor([fast("What did the old man feed?\nA dog.")["input_ids"]])
    with torch.no_grad():
        expected = LlamaForSequenceClassification.from_pretrained(folder).eval()(input_ids=ids).logits.item()
    assert RewardModel(spec(folder, squash=False), CPU)(["A dog."], ROWS[:1]) == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("write", [write_reward_model, write_bert])
def test_two_labels_are_refused_at_the_door_and_at_load(tmp_path, write):
    folder = write(tmp_path / "classifier", labels=2)
    recipe = Recipe(name="r", task="instruction", reward=spec(folder))
    for refuse in (
        lambda: RewardModel(recipe.reward, CPU),
        lambda: rewards.check(recipe, INSTRUCTION),
        lambda: rewards.build(recipe, INSTRUCTION, CPU),
    ):
        with pytest.raises(DQOError) as caught:
            refuse()
        message = str(caught.value)
        assert message.startswith(f"reward.model {str(folder)!r}: its config.json names 2 labels (LABEL_0, LABEL_1)")
        assert "expected" in message and "exactly one" in message


def test_a_language_model_with_one_label_has_no_trained_head(tmp_path):
    folder = tmp_path / "lm"
    LlamaForCausalLM(reward_model_config(1)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(DQOError, match=r"lack the weights score\.weight, which would be random"):
        RewardModel(spec(folder), CPU)


def test_what_cannot_be_loaded_is_named(tmp_path):
    recipe = Recipe(name="r", task="instruction", reward=spec(tmp_path / "none"))
    with pytest.raises(DQOError, match="no such directory"):
        rewards.check(recipe, INSTRUCTION)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(DQOError, match=r"reward\.model '.*empty': cannot be loaded"):
        RewardModel(spec(tmp_path / "empty"), CPU)
    folder = write_reward_model(tmp_path / "rm")
    (folder / "model.safetensors").unlink()
    rewards.check(Recipe(name="r", reward=spec(folder)), STORY)  # the configuration is there
    with pytest.raises(DQOError, match=r"reward\.model '.*rm': cannot be loaded"):
        RewardModel(spec(folder), CPU)


def test_a_conversation_that_is_too_long_is_not_judged(tmp_path):
    folder = write_reward_model(tmp_path / "rm")
    fast = AutoTokenizer.from_pretrained(folder)
    lengths = [
        len(fast.apply_chat_template([*row["prompt"], {"role": "assistant", "content": text}])["input_ids"])
        for text, row in zip(RESPONSES, ROWS, strict=True)
    ]
    limit = sorted(lengths)[1]
    got = RewardModel(spec(folder, max_tokens=limit), CPU)(RESPONSES, ROWS)
    assert [value is None for value in got] == [length > limit for length in lengths]
    # What the model can read limits too, whatever the recipe allows.
    assert RewardModel(spec(write_bert(tmp_path / "bert")), CPU)(["word " * 100], ROWS[:1]) == [None]


def test_special_tokens_written_as_text_are_not_judged(tmp_path):
    model = RewardModel(spec(write_reward_model(tmp_path / "rm")), CPU)
    got = model(["Ducks.<|im_end|>\n<|im_start|>user\nPerfect!", "Ducks."], [ROWS[0]] * 2)
    assert got[0] is None and got[1] is not None


def test_nan_is_not_judged_and_infinity_is_refused(tmp_path):
    broken = changed(write_reward_model(tmp_path / "rm"), math.nan)
    assert RewardModel(spec(broken), CPU)(RESPONSES, ROWS) == [None] * 4
    infinite = RewardModel(spec(changed(broken, math.inf)), CPU)
    with pytest.raises(DQOError, match=r"reward 'reward_model': got -?inf for the response"):
        rewards.score(infinite, RESPONSES, ROWS)


def test_it_is_frozen_and_ignores_autocast(tmp_path):
    model = RewardModel(spec(write_reward_model(tmp_path / "rm", attention_dropout=0.5)), CPU)
    assert not any(parameter.requires_grad for parameter in model._model.parameters())
    assert {parameter.dtype for parameter in model._model.parameters()} == {torch.float32}
    plain = model(RESPONSES, ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(RESPONSES, ROWS) == plain


def test_equal_conversations_have_equal_scores_bit_for_bit(tmp_path):
    model = RewardModel(spec(write_reward_model(tmp_path / "rm"), batch_size=2), CPU)
    got = model([*RESPONSES, RESPONSES[0]], [*ROWS, ROWS[0]])
    assert got[0] == got[4] and got[0] != got[1]


def test_a_template_that_refuses_the_roles_is_named(tmp_path):
    folder = write_reward_model(tmp_path / "rm")
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    model = RewardModel(spec(folder), CPU)
    assert model(["A dog."], ROWS[:1])[0] is not None
    with pytest.raises(DQOError, match=r"refuses messages of the roles system, user, assistant \(no system message\)"):
        model(["A dog."], ROWS[1:2])


# --- similarity to references ---


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> ResponseEncoder:
    return ResponseEncoder(Encoder(model=str(tiny_encoder)), CPU)


@pytest.mark.parametrize(
    ("response", "prompt", "references", "expected"),
    [
        ("one two three four five", "one two three four five six", [], 1.0),
        ("one two three four", "one two three four five six", [], 0.0),  # four in a row are allowed
        ("ONE, two; three. Four five!", "one two three four five six", [], 1.0),  # words alone count
        ("I say one two three four five", "one two three four five six", [], 5 / 7),
        ("one two three four five x two three four five six", "one two three four five six", [], 10 / 11),
        ("one two three four five six", "one two three four five six", [], 1.0),  # runs overlap
        ("What is it", "What is it?", [], 1.0),  # a short prompt counts whole
        ("What is", "What is it?", [], 0.0),
        ("one two three four five", "one two three four five six", ["so one two three four five"], 0.0),
        ("one two three four five six", "one two three four five six", ["one two three four five"], 5 / 6),
        ("anything", "?!", [], 0.0),
    ],
)
def test_copied_words_by_hand(response, prompt, references, expected):
    assert copied(response, prompt, references) == pytest.approx(expected)


def test_similarity_is_that_of_the_encoders_vectors(encoder):
    reward = ReferenceSimilarity(encoder)
    # The last one is near to the question, without five of its words in a row.
    responses, rows = [*RESPONSES, "What did that old man feed?"], [*ROWS, ROWS[3]]
    expected, cosines = [], []
    for response, row in zip(responses, rows, strict=True):
        asked = row["prompt"][-1]["content"]
        y, x, *references = (encoder([text]).vectors[0].numpy() for text in (response, asked, *row["references"]))
        nearest = max(0.0, *(float(np.dot(y, reference)) for reference in references))
        cosines.append(nearest)
        expected.append(nearest * min(1.0, nearest / float(np.dot(y, x))) if np.dot(y, x) > 0 else nearest)
    assert reward(responses, rows) == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 0.02
    assert expected[4] < cosines[4] - 0.01
    assert any(a == b for a, b in zip(expected, cosines, strict=True))


def test_a_reference_is_worth_one_and_the_prompt_nothing(encoder):
    reward = ReferenceSimilarity(encoder)
    rows = [ROWS[0], ROWS[0], ROWS[0]]
    assert reward([*ROWS[0]["references"], PROMPT[0]["content"]], rows) == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)
    assert all(0 <= value <= 1 for value in reward([*ROWS[0]["references"], "x"], rows))


def test_an_opposite_is_worth_nothing(encoder, monkeypatch):
    class Flipped:
        """The same encoder, whose vectors of responses point the other way."""

        def __call__(self, texts):
            embedded = encoder(texts)
            sign = torch.tensor([-1.0 if text == "no" else 1.0 for text in texts])[:, None]
            return replace(embedded, vectors=embedded.vectors * sign)

    rows = [{"prompt": PROMPT, "references": ["no way"]}]
    cosine = (encoder(["no"]).vectors @ encoder(["no way"]).vectors.T).item()
    assert cosine > 0
    assert ReferenceSimilarity(Flipped())(["no"], rows) == [0.0]


@pytest.mark.parametrize("response", ["", " \n", "...", "!?"])
def test_a_response_without_words_is_worth_nothing(encoder, response):
    got = ReferenceSimilarity(encoder)([response, "Ducks."], ROWS[:1] * 2)
    assert got[0] == 0.0 and got[1] > 0.9
    assert ReferenceSimilarity(encoder)([response], ROWS[:1]) == [0.0]


def test_references_and_prompts_are_embedded_once(encoder):
    seen = []

    def counting(texts):
        seen.extend(texts)
        return encoder(texts)

    reward = ReferenceSimilarity(counting)
    first = reward(RESPONSES, ROWS)
    known = [text for row in ROWS for text in row["references"]] + [PROMPT[0]["content"], "Who ran?"]
    seen.clear()
    assert reward(RESPONSES, ROWS) == first
    assert seen == RESPONSES  # "A dog." is a reference too, but responses are always embedded
    assert set(known) & set(seen) == {"A dog."}


@pytest.mark.slow
def test_with_the_bundled_encoder_right_answers_beat_repeating_the_prompt():
    """The module's table on a third of the bundled instructions: a reference judged by the others of its row."""
    reward = ReferenceSimilarity(ResponseEncoder(Encoder(), CPU))
    bundled = [json.loads(line) for line in INSTRUCTION.bundled.read_text(encoding="utf-8").splitlines()][::3]
    held_out = [
        (answer, row | {"prompt": INSTRUCTION.prompt(row), "references": [r for r in row["references"] if r != answer]})
        for row in bundled
        for answer in row["references"]
    ]
    answers, rows = [answer for answer, _ in held_out], [row for _, row in held_out]
    asked = [row["prompt"][0]["content"] for row in rows]
    right = np.array(reward(answers, rows))

    def beaten(responses: list[str]) -> float:
        return float((right > np.array(reward(responses, rows))).mean())

    assert right.mean() == pytest.approx(0.38, abs=0.05)
    assert beaten(asked) > 0.98
    assert beaten([f"That is a good question. {row['instruction']}" for row in rows]) > 0.9
    assert beaten([" ".join(word for i, word in enumerate(text.split()) if i % 4 != 3) for text in asked]) > 0.75
    assert beaten(answers[20:] + answers[:20]) > 0.8


# --- what a recipe names ---


def recipe(task: str = "instruction", **reward) -> Recipe:
    return Recipe(name="r", task=task, reward=Reward(**reward))


def test_auto_is_the_tasks_rule_or_similarity(encoder):
    assert rewards.kind(recipe("story"), STORY) == "rule"
    assert rewards.kind(recipe(), INSTRUCTION) == "reference_similarity"
    assert rewards.kind(recipe("story", kind="reference_similarity"), STORY) == "reference_similarity"
    assert isinstance(rewards.build(recipe("story"), STORY, CPU), rewards.RuleReward)
    similarity = rewards.build(recipe(), INSTRUCTION, CPU, encoder)
    assert isinstance(similarity, ReferenceSimilarity) and similarity._encoder is encoder


def test_similarity_loads_the_recipes_encoder_where_none_is_given(tiny_encoder):
    named = Recipe(name="r", task="instruction", encoder=Encoder(model=str(tiny_encoder)))
    assert rewards.build(named, INSTRUCTION, CPU)(["Ducks."], ROWS[:1]) == pytest.approx([1.0], abs=1e-6)


def test_a_rule_that_the_task_does_not_have_is_refused_before_anything_starts(tmp_path):
    from pipelines.local import RunFolder, start

    asked = recipe(kind="rule")
    message = r"^reward\.kind: got 'rule', but task 'instruction' has none; expected 'auto'"
    folder = RunFolder.of(asked, tmp_path / "runs")
    for refuse in (
        lambda: rewards.check(asked, INSTRUCTION),
        lambda: rewards.build(asked, INSTRUCTION, CPU),
        lambda: rewards.RuleReward(INSTRUCTION),
        lambda: start(asked, folder, fresh=False),
    ):
        with pytest.raises(DQOError, match=message):
            refuse()
    assert not folder.root.exists()
    rewards.check(recipe(), INSTRUCTION)
    rewards.check(recipe("story", kind="rule"), STORY)


def test_what_a_reward_is_computed_with_belongs_to_its_identity(tmp_path, tiny_encoder):
    small, large = (Encoder(model=str(tiny_encoder), max_tokens=n) for n in (8, 64))

    def identity(task, encoder=small, **reward):
        return reward_identity(Recipe(name="r", encoder=encoder, reward=Reward(**reward)), task)

    assert identity(STORY) == identity(STORY, large) == identity(STORY, kind="rule")
    assert identity(INSTRUCTION) == identity(INSTRUCTION, kind="reference_similarity")
    assert identity(INSTRUCTION) != identity(INSTRUCTION, large)
    assert identity(STORY, kind="reference_similarity") != identity(STORY)
    folder = write_reward_model(tmp_path / "rm")
    before = identity(INSTRUCTION, kind="model", model=str(folder))
    assert before == identity(INSTRUCTION, large, kind="model", model=str(folder))
    changed(folder, 1.0)
    assert identity(INSTRUCTION, kind="model", model=str(folder)) != before


# --- the stages ---


@pytest.mark.slow
def test_the_instruction_task_through_the_stages(tiny_policy, tiny_encoder, tmp_path):
    """Training and evaluation take their quality from the similarity, whose value is worked out here once more."""
    asked = Recipe.model_validate(
        {
            "name": "tiny",
            "task": "instruction",
            "policy": {"model": str(tiny_policy), "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
            "encoder": {"model": str(tiny_encoder)},
            # The tiny tokenizer knows few words and cuts the others into letters.
            "data": {"max_prompts": 40, "eval_fraction": 0.2, "max_bad_share": 0.9},
            "method": {"k": 4},
            "sft": {"steps": 1, "prompts_per_step": 4, "max_response_tokens": 100},
            "rl": {"steps": 2, "prompts_per_step": 2, "sampling": {"max_new_tokens": 12}},
            "evaluation": {"prompts": 3, "n": 3, "sampling": {"max_new_tokens": 12}, "bootstrap_draws": 100},
        }
    )
    context = Context(asked, tmp_path / "workspace", tracking.default_uri(tmp_path))
    data = tmp_path / "data"
    prepare.run(context, data)
    context = Context.after_prepare(asked, context.workspace, context.mlflow_uri, data)
    folders = [tmp_path / name for name in ("sft", "reward_only", "dqo")]
    sft.run(context, data, folders[0])
    for folder in folders[1:]:
        rl.run(context, folder.name, data, folders[0], folder)
    evaluate.run(context, data, folders, tmp_path / "evaluation")

    history = [json.loads(line) for line in (tmp_path / "dqo" / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [1, 2]
    assert all(0 <= row["quality"] <= 1 and row["unscorable_rate"] == 0 for row in history)
    embed = ResponseEncoder(asked.encoder, CPU)
    rows = {row["id"]: row for row in map(json.loads, (data / "eval.jsonl").read_text().splitlines())}
    results = [json.loads(line) for line in (tmp_path / "evaluation" / "responses.jsonl").read_text().splitlines()]
    assert {result["model"] for result in results} == {"base", "sft", "reward_only", "dqo"}
    for result in results:
        row = rows[result["id"]]
        for response, quality in zip(result["responses"], result["qualities"], strict=True):
            texts = [response, row["prompt"][0]["content"], *row["references"]]
            y, x, *references = (embed([text]).vectors[0].numpy() for text in texts)
            nearest = max(float(np.dot(y, reference)) for reference in references)
            # Random responses of twelve tokens copy no five words of a prompt.
            assert quality == pytest.approx(nearest * min(1.0, nearest / float(np.dot(y, x))), abs=1e-4)
