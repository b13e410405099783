"""Who earns a bonus, and that each way of gaming the diversity fails where its defence stands."""

import itertools
import math

import numpy as np
import pytest
import torch
from scripted import ScriptedTrainer, build, reward
from torch import Tensor

from dqo.advantage import group_advantages
from dqo.defences import Defences
from dqo.determinant import leave_one_out_bonus

NAN = math.nan
REWARDS = torch.tensor([[1.0, 0.2, NAN, 0.5], [0.1, 0.2, 0.3, 0.4]])
CUT = torch.tensor([[False, True, False, False], [False, False, True, False]])
SIMILARITY = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.3, 0.2, 0.9, 0.6]])


@pytest.mark.parametrize(
    ("defences", "expected"),
    [
        (Defences(), [[1, 1, 0, 1], [1, 1, 1, 1]]),
        (Defences(min_quality=0.5), [[1, 0, 0, 1], [0, 0, 0, 0]]),
        (Defences(min_quality=0.5, quality_gate="group"), [[1, 1, 0, 1], [0, 0, 0, 0]]),
        (Defences(drop_truncated=True), [[1, 0, 0, 1], [1, 1, 0, 1]]),
        (Defences(min_prompt_similarity=0.3), [[1, 1, 0, 0], [1, 0, 1, 1]]),
        (Defences(min_quality=0.2, drop_truncated=True, min_prompt_similarity=0.5), [[1, 0, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_who_earns_a_bonus(defences: Defences, expected: list[list[int]]):
    assert defences.earns(REWARDS, CUT, SIMILARITY).int().tolist() == expected


def test_a_similarity_that_is_asked_for_must_be_given():
    with pytest.raises(ValueError, match="min_prompt_similarity is set"):
        Defences(min_prompt_similarity=0.3).earns(REWARDS, CUT, None)


@pytest.mark.parametrize("form", ["paper", "centred", "decoupled"])
def test_who_earns_none_keeps_the_advantage_of_quality_and_moves_nobody(form: str):
    draw = torch.Generator().manual_seed(0)
    rewards, bonus = torch.rand(3, 5, generator=draw), torch.rand(3, 5, generator=draw)
    earns = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    got = group_advantages(rewards, bonus, 0.7, form, earns=earns)
    plain = group_advantages(rewards, torch.zeros_like(bonus), 0.0, form)
    for g, i in itertools.product(range(3), range(5)):
        expected = plain[g, i].item()
        if earns[g, i]:
            own = [bonus[g, j].item() for j in range(5) if earns[g, j]]
            others = [bonus[h, j].item() for h in range(3) if h != g for j in range(5) if earns[h, j]]
            baseline = {"paper": 0.0, "centred": np.mean(own), "decoupled": np.mean(others)}[form]
            expected += 0.7 * (bonus[g, i].item() - baseline)
        assert got[g, i].item() == pytest.approx(expected, abs=1e-6)


# A toy policy over five answers: three good ones that mean nearly the same, and two of gibberish, unlike everything.
EMBEDDINGS = torch.nn.functional.normalize(
    torch.tensor([[1.0, 0.1, 0, 0], [1.0, -0.1, 0, 0], [1.0, 0, 0.1, 0], [0, 0, 0, 1.0], [0, 0, 1.0, 0]]), dim=-1
).double()
GOOD = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
CHANCE = torch.full((5,), 0.2, dtype=torch.float64)


def drift_to_gibberish(defences: Defences, rewards: Tensor = GOOD, alpha: float = 4.0, k: int = 3) -> float:
    """Expected change of the log-odds of gibberish by one step of the policy gradient, over all groups of k answers."""
    gradient = torch.zeros(5, dtype=torch.float64)
    similarity = EMBEDDINGS @ EMBEDDINGS[0]  # the prompt is about what the good answers say
    for group in itertools.product(range(5), repeat=k):
        rows = torch.tensor(group)
        r = rewards[rows][None]
        cut = rows[None] >= 3  # gibberish runs on until it is cut
        earns = defences.earns(r, cut, similarity[rows][None])
        bonus = leave_one_out_bonus(EMBEDDINGS[rows][None], earns)
        advantages = group_advantages(r, bonus, alpha, "decoupled", earns=earns)[0]
        scores = torch.eye(5, dtype=torch.float64)[rows] - CHANCE  # gradient of log softmax
        gradient += CHANCE[rows].prod() * (advantages[:, None] * scores).sum(0)
    return (gradient[3:].sum() - gradient[:3].sum()).item()


def test_without_a_defence_gibberish_pays():
    assert drift_to_gibberish(Defences()) > 0


@pytest.mark.parametrize(
    "defences",
    [Defences(min_quality=0.5), Defences(drop_truncated=True), Defences(min_prompt_similarity=0.5)],
    ids=["quality", "truncation", "similarity"],
)
def test_with_a_defence_gibberish_does_not_pay(defences: Defences):
    assert drift_to_gibberish(defences) < 0


def test_a_group_of_wrong_answers_does_not_learn_to_differ():
    """Where nothing is right, the policy drifts to whatever is unlike the rest, unless the group's gate is shut."""
    wrong = torch.zeros(5, dtype=torch.float64)
    assert drift_to_gibberish(Defences(), wrong) > 0
    assert drift_to_gibberish(Defences(min_quality=0.5, quality_gate="group"), wrong) == 0


def test_the_trainer_gates_counts_and_leaves_the_gated_out_of_the_kernel(tiny_policy, tiny_encoder, tmp_path):
    trainer = build(tiny_policy, tiny_encoder, tmp_path, steps=1, alpha=0.7, advantage="paper", min_quality=0.25)
    trainer.train()
    texts = [completion[-1]["content"] for completion in trainer._logs["completion"]]
    rewards, vectors = reward(trainer._logs["completion"]), trainer.encoder(texts).vectors.double().numpy()
    earning = [value is not None and value >= 0.25 for value in rewards]
    assert any(earning) and not all(earning)
    for start in range(0, 12, 4):
        members = [i for i in range(start, start + 4) if earning[i]]
        inverse = np.linalg.inv(vectors[members] @ vectors[members].T + np.eye(len(members)))
        for i in range(start, start + 4):
            expected = rewards[i] or 0.0
            if earning[i]:
                expected += 0.7 * -math.log(inverse[members.index(i), members.index(i)])
            assert trainer.used[-1][i] == pytest.approx(expected, abs=2e-5)
    assert float(trainer.state.log_history[0]["no_bonus_rate"]) == pytest.approx(1 - sum(earning) / 12, rel=1e-3)


def test_truncation_and_similarity_reach_the_trainer(tiny_policy, tiny_encoder, tmp_path):
    class Endless(ScriptedTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            responses, extra = super()._generate_single_turn(*args, **kwargs)
            return [row[:-1] if index in (0, 7) else row for index, row in enumerate(responses)], extra

    def score(completions, **_):
        return [1.0] * len(completions)

    shared = {"steps": 1, "alpha": 1.0, "advantage": "paper", "cls": Endless, "reward_funcs": score}
    trainer = build(tiny_policy, tiny_encoder, tmp_path / "cut", drop_truncated=True, **shared)
    trainer.train()
    assert [index for index, value in enumerate(trainer.used[-1]) if value == 1.0] == [0, 7]  # the reward, no bonus

    trainer = build(tiny_policy, tiny_encoder, tmp_path / "all", min_prompt_similarity=-1.0, **shared)
    trainer.train()
    texts = [completion[-1]["content"] for completion in trainer._logs["completion"]]
    prompts = [prompt[-1]["content"] for prompt in trainer._logs["prompt"]]
    similarity = (trainer.encoder(texts).vectors * trainer.encoder(prompts).vectors).sum(-1)
    torch.testing.assert_close(trainer._gathered_similarity, similarity)
    floor = similarity.median().item()
    trainer = build(tiny_policy, tiny_encoder, tmp_path / "near", min_prompt_similarity=floor, **shared)
    trainer.train()
    assert [value > 1.0 for value in trainer.used[-1]] == (similarity >= floor).tolist()
