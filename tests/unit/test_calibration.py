"""Calibration: every figure against brute force on what was sampled, with tiny random models."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

import dqo.calibration as calibration
from dqo.advantage import group_advantages
from dqo.calibration import PAIRS, SHARE, auc, auc_interval, calibrate, check_encoder, spread, ties
from dqo.checkpoint import CheckpointCard
from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.files import read_jsonl
from dqo.generation import Response
from dqo.policy import load_for_inference, load_tokenizer
from dqo.recipe import Encoder, Recipe, Reward, Rollout, parse
from dqo.shared_prompt import add_shared_prompt_forward
from pipelines.calibrate import show

K = 4


def varied(response: str, row: dict) -> float | None:
    """A stand-in for the story rule, under which a random policy earns 0 throughout; some responses have no reward."""
    return None if len(response) % 7 == 0 else (len(response) % 5) / 4


class _Varied:
    name = "varied"

    def __call__(self, responses, rows):
        assert all({"id", "prompt", "references", "concepts"} <= row.keys() for row in rows)
        return [varied(response, row) for response, row in zip(responses, rows, strict=True)]


def tiny(policy: Path, encoder: Path, **method: object) -> Recipe:
    return parse(
        json.dumps(
            {
                "name": "tiny",
                "policy": {"model": str(policy), "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
                "encoder": {"model": str(encoder)},
                "data": {"max_prompts": 60},
                "method": {"k": K, "alpha": 0.8} | method,
                "rl": {"prompts_per_step": 3, "sampling": {"max_new_tokens": 12}},
            }
        )
    )


@pytest.fixture
def reward(monkeypatch) -> None:
    monkeypatch.setattr(calibration, "build", lambda recipe, task, device: _Varied())


def log_volume(vectors: list[np.ndarray]) -> float:
    stacked = np.array(vectors)
    return math.log(np.linalg.det(stacked @ stacked.T + np.eye(len(vectors)))) if len(vectors) else 0.0


def root_mean_variance(groups: list[list[float]]) -> float:
    return math.sqrt(np.mean([np.var(group, ddof=1) for group in groups if len(group) > 1]))


def test_figures_equal_brute_force(tiny_policy, tiny_encoder, reward):
    result = calibrate(tiny(tiny_policy, tiny_encoder), prompts=7)
    assert (result.prompts, result.k, len(result.responses)) == (7, K, 7)
    encoder = ResponseEncoder(Encoder(model=str(tiny_encoder)), "cpu")
    rewards, bonuses, everything = [], [], []
    for row in result.responses:
        assert row["qualities"] == [varied(text, {}) for text in row["responses"]]
        vectors = encoder(row["responses"]).vectors.double().numpy()
        scored = [index for index, quality in enumerate(row["qualities"]) if quality is not None]
        everything += row["qualities"]
        rewards.append([row["qualities"][index] for index in scored])
        bonus = [log_volume([vectors[i] for i in scored]) - log_volume([vectors[i] for i in scored if i != j])
                 for j in scored]  # fmt: skip
        bonuses.append(bonus)
        np.testing.assert_allclose([row["bonuses"][index] for index in scored], bonus, atol=1e-5)
    assert None in everything and len({value for value in everything if value is not None}) > 2
    q, b = root_mean_variance(rewards), root_mean_variance(bonuses)
    assert result.quality.std == result.quality_advantage_std == pytest.approx(q)
    assert result.quality.range == pytest.approx(np.mean([max(r) - min(r) for r in rewards if len(r) > 1]))
    assert result.quality.mean == pytest.approx(np.mean([value for value in everything if value is not None]))
    own = result.scores[0]
    assert own.name == "log_volume" and own.bonus.std == pytest.approx(b, rel=1e-4)
    assert own.bonus.range == pytest.approx(np.mean([max(r) - min(r) for r in bonuses if len(r) > 1]), rel=1e-4)
    assert own.share == pytest.approx(0.8 * b / q, rel=1e-4)
    assert result.balanced_alpha == pytest.approx(SHARE * q / b, rel=1e-4)
    assert result.unscorable == result.no_bonus == pytest.approx(everything.count(None) / len(everything))
    pairs = [x == y for r in rewards for x, y in itertools.combinations(r, 2)]
    assert result.tied_pairs == pytest.approx(np.mean(pairs))
    assert result.tied_groups == pytest.approx(np.mean([len(set(r)) < 2 for r in rewards]))
    # The second order form: exp(b) - 1 of the same bonuses.
    (elliptical,) = [one for one in result.scores if one.name == "elliptical"]
    assert elliptical.bonus.std == pytest.approx(root_mean_variance([np.expm1(r) for r in bonuses]), rel=1e-4)
    assert [one.name for one in result.scores] == [
        "log_volume", "elliptical", "cosine_distance", "vendi", "distinct", "similarity", "likelihood", "entropy"
    ]  # fmt: skip
    tokens = [count for row in result.responses for count in row["tokens"]]
    assert result.lengths.mean == pytest.approx(np.mean(tokens)) and result.lengths.longest == max(tokens)
    assert result.lengths.truncated == pytest.approx(
        np.mean([cut for row in result.responses for cut in row["truncated"]])
    )
    assert result.cost.sampling > 0 and result.cost.step > result.cost.update > 0
    assert result.cost.run == pytest.approx(result.cost.step * 20 * 2)  # the default's steps, dqo and reward_only
    text = " ".join(result.reasoning)
    assert f"alpha = {SHARE * q / b:.2g}" in text and f"{0.8 * b / q:.0%} of what quality weighs" in text
    document = json.loads(result.to_json())
    assert document["scores"][0]["balanced_alpha"] == result.balanced_alpha
    assert "responses" not in document and document["cost"]["step"] == result.cost.step


def test_the_processes_of_a_recipe_share_the_cost(tiny_policy, tiny_encoder, reward, monkeypatch, capsys):
    """Seconds that stand still: a second a lap, so that a response's are one over the batch's."""
    ticks = itertools.count()
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: float(next(ticks)))
    recipe = tiny(tiny_policy, tiny_encoder)
    alone = calibrate(recipe, prompts=3)
    assert (alone.cost.sampling, alone.cost.update) == (pytest.approx(1.0), pytest.approx(2.0))  # adapters: two passes
    six = {"distributed": recipe.distributed.model_copy(update={"processes": 6})}
    rollout = {"rl": recipe.rl.model_copy(update={"rollout": Rollout(engine="vllm")})}
    shared = calibrate(recipe.model_copy(update=six | rollout), prompts=3)
    for name in ("sampling", "reward", "embedding", "update", "step", "run"):
        assert getattr(shared.cost, name) == pytest.approx(getattr(alone.cost, name) / 6)
    show(Console(width=400), shared)
    assert "with 6 processes, each as fast as the one here" in (said := capsys.readouterr().out)
    assert "sampled here by transformers; the recipe's vllm is usually faster" in said
    show(Console(width=400), alone)
    assert "processes" not in (said := capsys.readouterr().out) and "transformers" not in said


def test_the_seed_decides_what_is_sampled(tiny_policy, tiny_encoder, reward):
    recipe = tiny(tiny_policy, tiny_encoder, alpha=0.0)
    first, again = (calibrate(recipe, prompts=3) for _ in range(2))
    assert first.responses == again.responses and first.scores == again.scores and first.encoder == again.encoder
    assert first.scores[0].share == 0.0 and first.balanced_alpha is not None and first.problems == again.problems
    other = calibrate(recipe.model_copy(update={"seed": 1}), prompts=3)
    assert {row["id"] for row in other.responses} != {row["id"] for row in first.responses}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["shared prompts", "whole sequences"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_log_likelihoods_equal_those_of_one_sequence_at_a_time(tiny_policy, tiny_encoder, checkpointing, micro_batch):
    recipe = tiny(tiny_policy, tiny_encoder)
    policy = recipe.policy.model_copy(update={"gradient_checkpointing": checkpointing})
    sampling = recipe.rl.sampling.model_copy(update={"temperature": 0.7})
    rl = recipe.rl.model_copy(update={"sampling": sampling, "micro_batch": micro_batch})
    recipe = recipe.model_copy(update={"policy": policy, "rl": rl})
    tokenizer, model = load_tokenizer(policy), load_for_inference(policy, torch.device("cpu"), None)
    prompts = [[{"role": "user", "content": text}] for text in ("a dog", "one small boat in a storm")]
    drawn = [[(index + 3 * at) % 500 + 5 for at in range(1 + index)] for index in range(2 * K)]
    groups = [[Response("", len(ids), False, tuple(ids)) for ids in drawn[at : at + K]] for at in (0, K)]
    expected = []
    for index, ids in enumerate(drawn):
        asked = tokenizer.apply_chat_template(prompts[index // K], add_generation_prompt=True, return_dict=True)
        start = len(asked["input_ids"])
        logits = model(input_ids=torch.tensor([asked["input_ids"] + ids])).logits[0, start - 1 : -1]
        log_probs = (logits / 0.7).log_softmax(-1)
        expected.append(sum(log_probs[at, token].item() for at, token in enumerate(ids)))
    if not checkpointing:
        add_shared_prompt_forward(model)
    rows, logits = [], []
    model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given.get("completion_ids", given["input_ids"]))), with_kwargs=True
    )
    model.register_forward_hook(lambda _, __, out: logits.append(out.logits.shape) if checkpointing else None)
    found = calibration._log_likelihood(model, tokenizer, prompts, groups, recipe)
    assert rows == ([2 * K] if micro_batch is None else [3, 3, 2])
    # One more than the longest response of the piece has tokens.
    assert [shape[1] for shape in logits] == (
        [] if not checkpointing else [2 * K + 1] if micro_batch is None else [4, 7, 9]
    )
    np.testing.assert_allclose(found.tolist(), expected, rtol=1e-4)


def test_a_multiplied_reward_has_the_share_as_its_bonus(tiny_policy, tiny_encoder, reward):
    """What `similarity` takes from a reward r at alpha: alpha r (1 - s), s = 1 / (1 + sum of similarities)."""
    recipe = tiny(tiny_policy, tiny_encoder, score="similarity", combine="multiply")
    result = calibrate(recipe, prompts=3)
    encoder = ResponseEncoder(Encoder(model=str(tiny_encoder)), "cpu")
    for row in result.responses:
        vectors = encoder(row["responses"]).vectors.double().numpy()
        for i, quality in enumerate(row["qualities"]):
            others = [j for j, q in enumerate(row["qualities"]) if q is not None and j != i]
            share = 1 / (1 + sum(max(0.0, vectors[i] @ vectors[j]) for j in others))
            assert row["bonuses"][i] == pytest.approx(0.0 if quality is None else quality * (share - 1), abs=1e-5)


def test_a_multiplied_share_is_never_told_to_take_more_than_all(tiny_policy, tiny_encoder, reward):
    """A share so large that it would take an alpha above 1, which a recipe with it refuses."""
    recipe = tiny(tiny_policy, tiny_encoder, score="similarity", combine="multiply", alpha=0.5)
    result = calibrate(recipe, prompts=3)
    own = result.scores[0]
    needed = 1.01 * own.bonus.std / result.quality_advantage_std  # the share that alpha = 1.01 gives
    for share, asked in ((0.98 * needed, True), (needed, False)):
        found = calibrate(recipe, prompts=3, share=share)
        balanced = found.scores[0].balanced_alpha
        assert (balanced is not None) == asked
        text = " ".join(found.reasoning)
        assert ("alpha = 1, the most that combine 'multiply' takes" in text) == (not asked)
        if balanced is not None:
            assert balanced == pytest.approx(0.98 * 1.01)
            Recipe.model_validate(recipe.model_dump() | {"method": recipe.method.model_dump() | {"alpha": balanced}})


def test_the_recipes_score_comes_first_and_defences_leave_the_bonus_out(tiny_policy, tiny_encoder, reward):
    recipe = tiny(tiny_policy, tiny_encoder, score="cosine_distance", defences={"min_quality": 0.5})
    result = calibrate(recipe, prompts=5)
    assert result.scores[0].name == "cosine_distance"
    qualities = [value for row in result.responses for value in row["qualities"]]
    assert result.no_bonus == pytest.approx(np.mean([value is None or value < 0.5 for value in qualities]))
    for row in result.responses:
        assert all(
            bonus == 0 for bonus, q in zip(row["bonuses"], row["qualities"], strict=True) if q is None or q < 0.5
        )


def conditional(policy: Path, encoder: Path, unearned: str, floor: float = 0.5, **method: object) -> Recipe:
    return tiny(policy, encoder, defences={"min_quality": floor, "unearned": unearned}, **method)


@pytest.mark.parametrize("unearned", ["apart", "zero"])
@pytest.mark.parametrize("form", ["paper", "centred", "decoupled"])
def test_the_bonus_differs_as_it_does_in_the_advantages(tiny_policy, tiny_encoder, reward, unearned, form):
    """What alpha = 1 adds to the advantages, over those that it is added to: with `zero`, all that have a reward."""
    result = calibrate(conditional(tiny_policy, tiny_encoder, unearned, advantage=form), prompts=6)
    rewards = torch.tensor([[math.nan if q is None else q for q in row["qualities"]] for row in result.responses])
    bonus = torch.tensor([row["bonuses"] for row in result.responses])
    earns = rewards >= 0.5
    added = group_advantages(rewards, bonus, 1.0, form, earns=earns, unearned=unearned) - group_advantages(
        rewards, bonus, 0.0, form
    )
    held = earns if unearned == "apart" else ~rewards.isnan()
    groups = [[x for x, h in zip(*row, strict=True) if h] for row in zip(added.tolist(), held.tolist(), strict=True)]
    assert 0 < earns.sum() < held.numel() and any(0 < row.sum() < len(row) for row in earns)
    assert result.scores[0].bonus.std == pytest.approx(root_mean_variance(groups), rel=1e-4)


def test_zero_differs_from_apart_where_few_earn(tiny_policy, tiny_encoder, reward):
    """By hand: every response with a reward counts, with 0 for those below the floor."""
    apart, zero = (calibrate(conditional(tiny_policy, tiny_encoder, way), prompts=6) for way in ("apart", "zero"))
    assert apart.responses == zero.responses and apart.ungated == zero.ungated
    counted = [
        [bonus for bonus, q in zip(row["bonuses"], row["qualities"], strict=True) if q is not None]
        for row in zero.responses
    ]
    assert zero.scores[0].bonus.std == pytest.approx(root_mean_variance(counted), rel=1e-4)
    assert zero.scores[0].bonus.std > 2 * apart.scores[0].bonus.std
    assert f"{0.8 * math.log(2):.3g} of quality at that alpha" in " ".join(zero.reasoning)
    assert f"{0.8 * (math.log(2) - math.log(1.25)):.3g} of quality at that alpha" in " ".join(apart.reasoning)


@pytest.mark.parametrize("unearned", ["apart", "zero"])
def test_a_floor_that_no_untrained_response_reaches_still_gives_an_alpha(
    tiny_policy, tiny_encoder, monkeypatch, unearned
):
    """As the quickstart does: what would be if every response earned is what the recipe without the floor gives."""

    class Low(_Varied):
        def __call__(self, responses, rows):
            return [None if value is None else 0.9 * value for value in super().__call__(responses, rows)]

    monkeypatch.setattr(calibration, "build", lambda *_: Low())
    free = calibrate(tiny(tiny_policy, tiny_encoder), prompts=4)
    result = calibrate(conditional(tiny_policy, tiny_encoder, unearned, floor=0.95), prompts=4)
    assert free.ungated is None and result.no_bonus == 1 and result.balanced_alpha is None
    assert result.ungated == free.scores[0] and result.ungated.balanced_alpha is not None
    assert not any("alpha has nothing to weigh" in problem for problem in result.problems)
    assert result.problems == free.problems
    assert any("no response of the base model earns a bonus" in remark for remark in result.remarks)
    assert f"alpha = {free.balanced_alpha:.2g} would give it 25%" in " ".join(result.reasoning)
    assert json.loads(result.to_json())["ungated"]["balanced_alpha"] == free.balanced_alpha


def test_a_scaled_quality_is_what_the_bonus_stands_beside(tiny_policy, tiny_encoder, reward):
    """Divided by its group's standard deviation plus 1e-4, a group's quality has spread s / (s + 1e-4), or 0."""
    result = calibrate(tiny(tiny_policy, tiny_encoder, quality_scale="group"), prompts=5)
    rewards = [[q for q in row["qualities"] if q is not None] for row in result.responses]
    stds = [np.std(group, ddof=1) for group in rewards if len(group) > 1]
    assert result.quality_advantage_std == pytest.approx(math.sqrt(np.mean([(s / (s + 1e-4)) ** 2 for s in stds])))
    assert result.quality_advantage_std != pytest.approx(result.quality.std)


def test_a_reward_without_differences_is_a_problem_and_gives_no_alpha(tiny_policy, tiny_encoder):
    """The story rule gives a random policy 0 for everything."""
    result = calibrate(tiny(tiny_policy, tiny_encoder), prompts=3)
    assert result.tied_groups == 1.0 and result.tied_pairs == 1.0
    assert result.balanced_alpha is None and result.scores[0].share is None
    assert "no alpha balances it" in result.problems[0]
    assert any("100% of the groups have equal rewards" in remark for remark in result.remarks)


@pytest.mark.parametrize("squash", [True, False])
def test_scores_that_the_logistic_function_makes_equal_are_remarked_on(tiny_policy, tiny_encoder, monkeypatch, squash):
    """Half of the responses score 17 or 23, as a good one does; the others 0.1 and 2."""
    raw = [17.0, 0.1, 2.0, 23.0]

    class Model:
        name = "reward_model"

        def __call__(self, responses, rows):
            scores = [raw[index % 4] for index in range(len(responses))]
            return [1 / (1 + math.exp(-one)) if squash else one for one in scores]

    monkeypatch.setattr(calibration, "build", lambda *_: Model())
    recipe = tiny(tiny_policy, tiny_encoder)
    spec = Reward(kind="model", model="org/name", squash=squash)
    result = calibrate(recipe.model_copy(update={"reward": spec}), prompts=2)
    assert result.saturated == (0.5 if squash else None)
    assert any("50% of the reward model's scores" in remark for remark in result.remarks) == squash


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda index: None, "none of the 12 responses could be scored"),
        (lambda index: math.nan, "none of the 12 responses could be scored"),
        (lambda index: 1.0 if index % K == 0 else None, "no group of 4 holds two responses with a reward"),
    ],
)
def test_rewards_that_compare_nothing_are_refused(tiny_policy, tiny_encoder, monkeypatch, values, message):
    class Blind:
        name = "blind"

        def __call__(self, responses, rows):
            return [values(index) for index in range(len(responses))]

    monkeypatch.setattr(calibration, "build", lambda *_: Blind())
    with pytest.raises(DQOError, match=f"reward 'blind': {message}"):
        calibrate(tiny(tiny_policy, tiny_encoder), prompts=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"prompts": 0}, "prompts: got 0"), ({"share": 0.0}, "share: got 0.0"), ({"share": math.nan}, "share: got nan")],
)
def test_numbers_out_of_range_are_refused(tiny_policy, tiny_encoder, arguments, message):
    with pytest.raises(DQOError, match=message):
        calibrate(tiny(tiny_policy, tiny_encoder), **arguments)


def test_a_checkpoint_of_another_model_is_refused(tiny_policy, tiny_encoder, tmp_path):
    CheckpointCard("sft", "adapter", "other/model", None, "a", "b", "c", None, 1, "d").write(tmp_path)
    with pytest.raises(DQOError, match=r"trained from 'other/model', but the recipe's policy\.model is"):
        calibrate(tiny(tiny_policy, tiny_encoder), checkpoint=tmp_path)
    with pytest.raises(DQOError, match="missing; expected a checkpoint"):
        calibrate(tiny(tiny_policy, tiny_encoder), checkpoint=tmp_path / "none")


# --- parts ---


def test_spread_leaves_out_what_does_not_count():
    values = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0], [2.0, 2.0, 8.0]])
    counted = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    found = spread(values, counted)
    assert found.std == pytest.approx(math.sqrt((2 + 12) / 2))  # variances 2 and 12; one value alone has none
    assert found.range == pytest.approx((2 + 6) / 2)
    assert (found.mean, found.groups) == (pytest.approx(21 / 6), 2)


def test_ties_of_groups_and_pairs():
    nan = math.nan
    rewards = torch.tensor([[1.0, 1.0, 1.0 + 1e-7], [1.0, 1.0, 2.0], [1.0, nan, 2.0], [3.0, nan, nan]])
    # Pairs: 3 of 3, 1 of 3, 0 of 1, none. Groups: the first, and the last, which compares nothing.
    assert ties(rewards) == (2 / 4, 4 / 7)


def test_auc_is_that_of_mann_and_whitney():
    generator = np.random.default_rng(0)
    above, below = generator.integers(0, 8, 30) / 8, generator.integers(0, 6, 17) / 8  # with many ties
    expected = stats.mannwhitneyu(above, below).statistic / (30 * 17)
    assert auc(above, below) == pytest.approx(expected)
    assert auc(np.array([2.0]), np.array([1.0])) == 1.0 and auc(np.ones(3), np.ones(4)) == 0.5


def test_the_interval_of_an_auc_holds_it_and_narrows():
    generator = np.random.default_rng(1)
    few = auc_interval(generator.normal(1, 1, 20), generator.normal(0, 1, 20), 0.95, 0)
    many = auc_interval(generator.normal(1, 1, 500), generator.normal(0, 1, 500), 0.95, 0)
    truth = stats.norm.cdf(1 / math.sqrt(2))
    assert few.low < few.mean < few.high and many.low < truth < many.high
    assert many.high - many.low < (few.high - few.low) / 2


def test_the_labelled_pairs_are_balanced_and_share_their_first_sentences():
    pairs = read_jsonl(PAIRS)
    kinds = {
        kind: [pair for pair in pairs if pair["kind"] == kind] for kind in ("paraphrase", "same_topic", "unrelated")
    }
    assert len(pairs) == sum(map(len, kinds.values())) == 60
    firsts = [[pair["a"] for pair in found] for found in kinds.values()]
    assert firsts[0] == firsts[1] == firsts[2] and len(set(firsts[0])) == 20
    seconds = [pair["b"] for pair in pairs]
    assert len(set(seconds)) == 60 and not set(seconds) & set(firsts[0])


class _Words:
    """An encoder that counts words: texts as normalised bags of words."""

    def __call__(self, texts):
        vectors = torch.zeros(len(texts), 4096)
        for row, text in enumerate(texts):
            for word in text.lower().strip(".").split():
                vectors[row, sum(ord(c) * 31**i for i, c in enumerate(word)) % 4096] += 1
        return type("Embedded", (), {"vectors": vectors / vectors.norm(dim=-1, keepdim=True)})()


def test_an_encoder_of_words_alone_does_not_pass():
    """It tells paraphrases from unrelated sentences by shared words, but not from other answers with the same words."""
    recipe = parse("name: a\nmethod: {distinct_threshold: 0.3}")
    references = [["a red cat ran", "the red cat ran"], ["two ships sank", "two ships sank slowly"], ["alone"]]
    check = check_encoder(_Words(), recipe, references)
    cosines: dict[str, list[float]] = {}
    for pair in read_jsonl(PAIRS):
        a, b = (Counter(pair[side].lower().strip(".").split()) for side in ("a", "b"))
        norms = math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
        cosines.setdefault(pair["kind"], []).append(sum(a[word] * b[word] for word in a) / norms)
    for kind, area in (("same_topic", check.auc_same_topic), ("unrelated", check.auc_unrelated)):
        expected = stats.mannwhitneyu(np.round(cosines["paraphrase"], 6), np.round(cosines[kind], 6)).statistic / 400
        assert area.mean == pytest.approx(expected, abs=0.02)  # float32 unties some
        assert check.linked[kind] == pytest.approx(np.mean(np.array(cosines[kind]) >= 0.3), abs=0.051)
    assert check.auc_same_topic.low < 0.5 < check.auc_unrelated.low
    assert check.references is not None and check.references.prompts == 2
    # Three of four words, and three of the root of 3 * 4; nothing in common between prompts.
    assert check.references.within == pytest.approx((3 / 4 + 3 / math.sqrt(12)) / 2, abs=1e-6)
    assert (check.references.between, check.references.auc) == (pytest.approx(0), 1.0)
    assert check_encoder(_Words(), recipe, [["a b", "c d"]]).references is None
