import math

import numpy as np
import pytest
import torch
from scripted import ScriptedTrainer, build, reward, weights

from dqo.data import encode_demonstration
from dqo.errors import DQOError
from dqo.policy import load_tokenizer
from dqo.recipe import Policy
from dqo.trainer import DQOConfig, DQOTrainer


def expected_advantages(trainer, alpha, form, k=4):
    """Advantages of the last step by brute force: numpy determinants of sub-matrices, member by member."""
    texts = [completion[-1]["content"] for completion in trainer._logs["completion"]]
    rewards = [math.nan if value is None else value for value in reward(trainer._logs["completion"])]
    vectors = trainer.encoder(texts).vectors.double().numpy()
    groups, bonuses = [], []
    for start in range(0, len(texts), k):
        scored = [i for i in range(start, start + k) if not math.isnan(rewards[i])]
        bonus = {}
        for i in scored:
            others = [j for j in scored if j != i]
            volume = [np.linalg.det(vectors[s] @ vectors[s].T + np.eye(len(s))) for s in (scored, others)]
            bonus[i] = math.log(volume[0] / volume[1])
        groups.append((start, scored))
        bonuses.append(bonus)
    result = [0.0] * len(texts)
    for number, (_, scored) in enumerate(groups):
        mean = np.mean([rewards[i] for i in scored])
        elsewhere = [value for other, b in enumerate(bonuses) if other != number for value in b.values()]
        for i in scored:
            b = bonuses[number][i]
            result[i] = {
                "paper": rewards[i] + alpha * b,
                "centred": rewards[i] - mean + alpha * (b - np.mean(list(bonuses[number].values()))),
                "decoupled": rewards[i] - mean + alpha * (b - np.mean(elsewhere)),
            }[form]
    assert any(math.isnan(value) for value in rewards), "the table must hold a response without a reward"
    return result


@pytest.mark.parametrize("form", ["paper", "centred", "decoupled"])
def test_advantages_equal_brute_force(tiny_policy, tiny_encoder, tmp_path, form):
    trainer = build(tiny_policy, tiny_encoder, tmp_path, steps=1, alpha=0.7, advantage=form)
    trainer.train()
    expected = expected_advantages(trainer, 0.7, form)
    np.testing.assert_allclose(trainer.used[-1], expected, atol=2e-5)
    np.testing.assert_allclose(list(trainer._logs["advantages"]), expected, atol=2e-5)


def test_another_score_takes_the_place_of_the_volume(tiny_policy, tiny_encoder, tmp_path):
    """`cosine_distance` under `centred`: the distances to the group's other scored members over k - 1, pair by pair."""
    trainer = build(
        tiny_policy, tiny_encoder, tmp_path, steps=1, alpha=0.7, advantage="centred", score="cosine_distance"
    )
    trainer.train()
    texts = [completion[-1]["content"] for completion in trainer._logs["completion"]]
    rewards, vectors = reward(trainer._logs["completion"]), trainer.encoder(texts).vectors.double().numpy()
    for start in range(0, 12, 4):
        members = [i for i in range(start, start + 4) if rewards[i] is not None]
        bonus = {i: sum(1 - vectors[i] @ vectors[j] for j in members if j != i) / (4 - 1) for i in members}
        for i in range(start, start + 4):
            expected = 0.0
            if i in members:
                expected = rewards[i] - np.mean([rewards[j] for j in members])
                expected += 0.7 * (bonus[i] - np.mean(list(bonus.values())))
            assert trainer.used[-1][i] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_likelihood_scores_see_the_policys_own_likelihoods(
    tiny_policy, tiny_encoder, tmp_path, accumulation: int, temperature: float
):
    """Against one plain forward pass a response, without padding."""
    trainer = build(
        tiny_policy, tiny_encoder, tmp_path, steps=1, alpha=0.01, advantage="paper", score="entropy", learning_rate=0.0,
        accumulation=accumulation, temperature=temperature,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )  # fmt: skip
    trainer.train()
    model, encode = trainer.model.eval(), trainer._tokenizer
    for i, (prompt, completion) in enumerate(zip(trainer._logs["prompt"], trainer._logs["completion"], strict=True)):
        asked = encode.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        said = encode(completion[-1]["content"], add_special_tokens=False)["input_ids"] + [encode.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1] / temperature
        expected = -logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None]).sum().item()
        assert list(trainer._logs["advantages"])[i] == pytest.approx(0.01 * expected, rel=1e-3)


def test_multiplied_rewards(tiny_policy, tiny_encoder, tmp_path):
    trainer = build(
        tiny_policy,
        tiny_encoder,
        tmp_path,
        steps=1,
        alpha=1.0,
        advantage="paper",
        score="similarity",
        combine="multiply",
    )
    trainer.train()
    texts = [completion[-1]["content"] for completion in trainer._logs["completion"]]
    rewards, vectors = reward(trainer._logs["completion"]), trainer.encoder(texts).vectors.double()
    for i, (value, used) in enumerate(zip(rewards, trainer.used[-1], strict=True)):
        others = [j for j in range(i - i % 4, i - i % 4 + 4) if j != i and rewards[j] is not None]
        similar = sum(max(0.0, (vectors[i] @ vectors[j]).item()) for j in others)
        assert used == pytest.approx(0.0 if value is None else value / (1 + similar), abs=1e-5)


def test_a_negative_reward_is_not_multiplied(tiny_policy, tiny_encoder, tmp_path):
    trainer = build(
        tiny_policy, tiny_encoder, tmp_path, steps=1, score="likelihood", combine="multiply",
        reward_funcs=lambda completions, **_: [-0.25] * len(completions),
    )  # fmt: skip
    with pytest.raises(DQOError, match=r"the reward -0\.25 is negative"):
        trainer.train()


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_alpha_zero_is_the_stock_trainer(tiny_policy, tiny_encoder, tmp_path, scale):
    """With alpha = 0 the advantages are those that TRL's own code has just computed for the same rewards."""
    stock = []

    class Both(ScriptedTrainer):
        def _log_group_metrics(self, *args):
            stock.extend(list(self._logs["advantages"])[-12:])  # TRL's, which ours replace a moment later
            super()._log_group_metrics(*args)

    trainer = build(
        tiny_policy, tiny_encoder, tmp_path, steps=1, alpha=0.0, advantage="centred", scale_rewards=scale, cls=Both
    )
    trainer.train()
    assert len(stock) == 12 and max(stock) > 0.01
    np.testing.assert_allclose(trainer.used[-1], stock, atol=1e-6)


def test_shared_prompts_train_the_same_weights(tiny_policy, tiny_encoder, tmp_path):
    """The update with prompts computed once equals TRL's own with whole sequences."""
    trained = []
    for share in (True, False):
        trainer = build(tiny_policy, tiny_encoder, tmp_path / str(share), steps=2, share_prompts=share)
        assert trainer._scores_shared is share
        trainer.train()
        trained.append(weights(trainer))
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-3, atol=1e-4)


def test_accumulated_micro_batches_equal_one_batch(tiny_policy, tiny_encoder, tmp_path):
    trained = []
    for accumulation in (1, 3):
        trainer = build(tiny_policy, tiny_encoder, tmp_path / str(accumulation), steps=2, accumulation=accumulation)
        trainer.train()
        trained.append(weights(trainer))
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-3, atol=1e-4)


# Ten prompts, three a step: an epoch has three steps.
@pytest.mark.parametrize("cut", [1, 5], ids=["first-epoch", "second-epoch"])
def test_resumed_training_equals_uninterrupted(tiny_policy, tiny_encoder, tmp_path, cut):
    """Real sampling: the random state is part of a checkpoint, so the resumed run draws the same rollouts."""
    settings = {"cls": DQOTrainer, "save_strategy": "steps", "save_steps": cut, "optim": "adamw_torch"}
    whole = build(tiny_policy, tiny_encoder, tmp_path / "whole", steps=cut + 2, **settings)
    whole.train()
    # The schedule is constant, so a run cut at some step is the first part of the whole one.
    build(tiny_policy, tiny_encoder, tmp_path / "part", steps=cut, **settings).train()
    resumed = build(tiny_policy, tiny_encoder, tmp_path / "part", steps=cut + 2, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"part/checkpoint-{cut}"))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], value, rtol=0, atol=0)


def demonstration_rows(policy, count=6):
    tokenizer = load_tokenizer(Policy(model=str(policy)))
    rows = []
    for index in range(count):
        prompt = [{"role": "user", "content": f"say {index}"}]
        texts = [f"the boat {'sails ' * (index % 3)}home.", f"a storm {index} comes."]
        encoded = [encode_demonstration(tokenizer, prompt, text) for text in texts]
        rows.append(
            {"prompt": prompt, "demonstrations": [{"input_ids": e.input_ids, "labels": e.labels} for e in encoded]}
        )
    return rows


def test_sft_without_alpha_is_cross_entropy_and_makes_no_rollouts(tiny_policy, tiny_encoder, tmp_path):
    rows = demonstration_rows(tiny_policy)

    class NoRollouts(DQOTrainer):
        def _generate(self, prompts):
            raise AssertionError("plain SFT must not sample")

    trainer = build(
        tiny_policy, tiny_encoder, tmp_path, steps=1, prompts=6, k=2, cls=NoRollouts, reward_funcs=None, rows=rows,
        alpha=0.0, quality="demonstration", shuffle_dataset=False,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    total, tokens, gradient = 0.0, 0, None
    for row in rows:
        ids, labels = (torch.tensor([row["demonstrations"][0][key]]) for key in ("input_ids", "labels"))
        logits = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        counted = labels[0, 1:] != -100
        picked = logits.gather(-1, ids[0, 1:, None])[counted, 0]
        total, tokens = total - picked.sum(), tokens + int(counted.sum())
    gradient = torch.autograd.grad(total / 6 / 16, [p for p in trainer.model.parameters() if p.requires_grad])
    norm = torch.stack([g.norm() for g in gradient]).norm().item()
    trainer.train()
    log = trainer.state.log_history[0]
    assert float(log["demonstration_nll"]) == pytest.approx(total.item() / tokens, rel=1e-4)
    assert float(log["loss"]) == pytest.approx(total.item() / 6 / 16, rel=1e-3)
    assert float(log["grad_norm"]) == pytest.approx(norm, rel=1e-3)
    assert any((p != before[name]).any() for name, p in trainer.model.named_parameters())


def test_dqo_sft_adds_alpha_times_the_volume_gradient(tiny_policy, tiny_encoder, tmp_path):
    """The gradient equals that of -(1/P) sum_x [log pi(y*|x) + sum_i A_i log pi(y_i|x)] / Lmax."""
    rows = demonstration_rows(tiny_policy, 3)
    captured = {}

    class Capture(ScriptedTrainer):
        def _compute_loss(self, model, inputs):
            captured.update(inputs)
            return super()._compute_loss(model, inputs)

    trainer = build(
        tiny_policy, tiny_encoder, tmp_path, steps=1, cls=Capture, reward_funcs=None, rows=rows, alpha=3.0,
        quality="demonstration", advantage="decoupled", max_grad_norm=1e9,
    )  # fmt: skip
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    objective = 0.0
    for row in rows:
        ids, labels = (torch.tensor([row["demonstrations"][0][key]]) for key in ("input_ids", "labels"))
        steps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        objective = objective + steps.gather(-1, ids[0, 1:, None])[labels[0, 1:] != -100].sum()
    for i, advantage in enumerate(captured["advantages"]):
        prompt = captured["prompt_ids"][i][captured["prompt_mask"][i].bool()]
        response = captured["completion_ids"][i][captured["completion_mask"][i].bool()]
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        objective = objective + advantage * logits.gather(-1, response[:, None]).sum()
    assert captured["advantages"].abs().max() > 0.05
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = torch.stack([g.norm() for g in torch.autograd.grad(-objective / 3 / 16, parameters)]).norm().item()
    assert float(trainer.state.log_history[0]["grad_norm"]) == pytest.approx(norm, rel=1e-3)


def test_metrics_of_a_step(tiny_policy, tiny_encoder, tmp_path):
    trainer = build(tiny_policy, tiny_encoder, tmp_path, steps=1)
    trainer.train()
    log = {name: float(value) for name, value in trainer.state.log_history[0].items()}
    texts = [completion[-1]["content"] for completion in trainer._logs["completion"]]
    scores = [value for value in reward(trainer._logs["completion"]) if value is not None]
    groups = [texts[start : start + 4] for start in range(0, 12, 4)]
    assert log["quality"] == pytest.approx(np.mean(scores), rel=1e-3)
    assert log["unscorable_rate"] == pytest.approx(1 - len(scores) / 12, rel=1e-3)
    assert log["duplicate_rate"] == pytest.approx(np.mean([1 - len(set(g)) / 4 for g in groups]), abs=1e-3)
    assert log["truncation_rate"] == 0
    assert {"entropy", "frac_reward_zero_std", "step_time"} <= log.keys()
    tokens = [len(trainer._tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts]
    assert log["mean_tokens"] == pytest.approx(np.mean(tokens), rel=1e-3)
    scored = [value is not None for value in reward(trainer._logs["completion"])]
    vectors = trainer.encoder(texts).vectors.double().numpy()
    volumes, bonuses = [], []
    for start in range(0, 12, 4):
        members = [i for i in range(start, start + 4) if scored[i]]
        gram = vectors[members] @ vectors[members].T + np.eye(len(members))
        volumes.append(np.linalg.slogdet(gram)[1])
        bonuses += (-np.log(np.diag(np.linalg.inv(gram)))).tolist()
    assert log["log_volume"] == pytest.approx(np.mean(volumes), rel=1e-3)
    assert log["bonus"] == pytest.approx(np.mean(bonuses), rel=1e-3)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize(
    ("groups", "tied"),
    [
        # Eight times 2/3 has a standard deviation of 6e-8 in float32; TRL's share is 0 for it.
        ([[2 / 3] * 8, [2 / 3] * 7 + [1 / 3], [0.1 * 3] * 4 + [0.3] * 4], 2 / 3),
        # One reward, or none, compares nothing; two may.
        ([[None] * 7 + [0.5], [None] * 6 + [0.5, 0.5], [None] * 6 + [0.5, 0.25]], 2 / 3),
        ([[None] * 8, [0.0] * 4 + [1.0] * 4, [0.0] * 7 + [0.01]], 1 / 3),
    ],
)
def test_groups_with_equal_rewards_are_counted(tiny_policy, tiny_encoder, tmp_path, scale, groups, tied):
    trainer = build(
        tiny_policy, tiny_encoder, tmp_path, steps=1, k=8, alpha=0.7, scale_rewards=scale,
        reward_funcs=lambda completions, **_: [value for group in groups for value in group],
    )  # fmt: skip
    trainer.train()
    logged = float(trainer.state.log_history[0]["frac_reward_zero_std"])
    assert logged == pytest.approx(tied, abs=1e-4)  # the log is rounded


def test_truncated_responses_are_counted(tiny_policy, tiny_encoder, tmp_path):
    class Endless(ScriptedTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            responses, extra = super()._generate_single_turn(*args, **kwargs)
            return [row[:-1] if index < 3 else row for index, row in enumerate(responses)], extra

    trainer = build(tiny_policy, tiny_encoder, tmp_path, steps=1, cls=Endless)
    trainer.train()
    assert float(trainer.state.log_history[0]["truncation_rate"]) == pytest.approx(3 / 12, rel=1e-3)


def test_kl_is_zero_at_the_start_and_that_of_the_adapter_later(tiny_policy, tiny_encoder, tmp_path):
    """The reference is the model that training started from."""
    captured = []

    class Capture(ScriptedTrainer):
        def _compute_loss(self, model, inputs):
            captured.append({name: value for name, value in inputs.items() if torch.is_tensor(value)})
            return super()._compute_loss(model, inputs)

    trainer = build(tiny_policy, tiny_encoder, tmp_path, steps=3, beta=0.1, learning_rate=5.0, cls=Capture)
    start = weights(trainer)
    trainer.train()
    logged = [float(row["kl"]) for row in trainer.state.log_history if "kl" in row]
    assert logged[0] == pytest.approx(0.0, abs=1e-6)
    assert logged[2] > 1e-5
    inputs = captured[2]
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        width = inputs["completion_ids"].shape[1]
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -width - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    counted = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["ref_per_token_logps"][counted], expected[counted], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("nothing", [None, math.nan], ids=["none", "nan"])
def test_a_step_that_nothing_scores_stops(tiny_policy, tiny_encoder, tmp_path, nothing):
    def blind(completions, **_):
        return [nothing] * len(completions)

    with pytest.raises(DQOError, match=r"reward blind: no response of the step could be scored \(all 12"):
        build(tiny_policy, tiny_encoder, tmp_path, steps=1, reward_funcs=blind).train()


def test_a_nan_among_rewards_leaves_its_group_and_is_counted(tiny_policy, tiny_encoder, tmp_path):
    def holed(completions, **_):
        return [math.nan if index == 5 else index / 12 for index in range(len(completions))]

    trainer = build(tiny_policy, tiny_encoder, tmp_path, steps=1, alpha=1.0, reward_funcs=holed)
    trainer.train()
    assert trainer.used[-1][5] == 0.0
    assert all(math.isfinite(value) for value in trainer.used[-1])
    assert float(trainer.state.log_history[0]["unscorable_rate"]) == pytest.approx(1 / 12, rel=1e-3)


def test_a_reward_of_the_wrong_count_stops(tiny_policy, tiny_encoder, tmp_path):
    def short(completions, **_):
        return [1.0] * (len(completions) - 1)

    with pytest.raises(ValueError, match="'short' returned 11 rewards, but 12"):
        build(tiny_policy, tiny_encoder, tmp_path, steps=1, reward_funcs=short).train()


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "whole"])
def test_the_likelihood_of_a_demonstration_has_no_temperature(tiny_policy, tiny_encoder, tmp_path, shares):
    """Rollouts at temperature 0.5 leave log pi(y*|x) as it is; TRL's own head would divide by it, so it is refused."""

    def likelihood(temperature):
        trainer = build(
            tiny_policy, tiny_encoder, tmp_path / f"{temperature}", steps=1, reward_funcs=None, alpha=1.0,
            rows=demonstration_rows(tiny_policy, 3), quality="demonstration", temperature=temperature,
            share_prompts=shares, shuffle_dataset=False,
        )  # fmt: skip
        trainer.train()
        return float(trainer.state.log_history[0]["demonstration_nll"])

    if shares:
        assert likelihood(0.5) == pytest.approx(likelihood(1.0), rel=1e-4)
    else:
        with pytest.raises(ValueError, match=r"needs temperature 1.0 for this model, got 0.5"):
            likelihood(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "must be 2 or more to span a volume, got 1"),
        ({"alpha": -1.0}, "alpha must not be negative, got -1"),
        ({"advantage": "paper", "scale_rewards": "group"}, "must be 'none', got 'group'"),
    ],
)
def test_configuration_errors(tmp_path, settings, message):
    base = {
        "output_dir": str(tmp_path),
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "bf16": False,
        "use_cpu": True,
    }
    with pytest.raises(ValueError, match=message):
        DQOConfig(**(base | settings))
