"""Who earns a bonus, and that each way of gaming the diversity fails where its defence stands."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripted import ScriptedTrainer, build, reward
from torch import Tensor

from dqo.advantage import group_advantages
from dqo.defences import Defences, embedded_text, without_reasoning
from dqo.determinant import leave_one_out_bonus
from dqo.embedding import ResponseEncoder
from dqo.errors import DQOError
from dqo.recipe import Encoder
from dqo.stages.training import _METRICS
from dqo.tasks.reasoning import REASONING
from dqo.tasks.story import STORY

NAN = math.nan
REWARDS = torch.tensor([[1.0, 0.2, NAN, 0.5], [0.1, 0.2, 0.3, 0.4]])
CUT = torch.tensor([[False, True, False, False], [False, False, True, False]])
TOKENS = torch.tensor([[5, 9, 7, 3], [12, 2, 8, 4]])
SIMILARITY = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.3, 0.2, 0.9, 0.6]])


def counted(trainer: ScriptedTrainer, name: str) -> float:
    """A counter of the first step, under its name in history.jsonl and in MLflow."""
    return float(trainer.state.log_history[0][_METRICS[name]])


def earns(defences: Defences, rewards: Tensor, cut: Tensor, tokens: Tensor, similarity: Tensor | None) -> Tensor:
    return ~torch.stack(list(defences.failed(rewards, cut, tokens, similarity).values())).any(0)


@pytest.mark.parametrize(
    ("defences", "expected"),
    [
        (Defences(), [[1, 1, 0, 1], [1, 1, 1, 1]]),
        (Defences(min_quality=0.5), [[1, 0, 0, 1], [0, 0, 0, 0]]),
        (Defences(min_quality=0.5, quality_gate="group"), [[1, 1, 0, 1], [0, 0, 0, 0]]),
        (Defences(drop_truncated=True), [[1, 0, 0, 1], [1, 1, 0, 1]]),
        (Defences(max_tokens=7), [[1, 0, 0, 1], [0, 1, 0, 1]]),
        (Defences(min_prompt_similarity=0.3), [[1, 1, 0, 0], [1, 0, 1, 1]]),
        (Defences(min_quality=0.2, drop_truncated=True, min_prompt_similarity=0.5), [[1, 0, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_who_earns_a_bonus(defences: Defences, expected: list[list[int]]):
    assert earns(defences, REWARDS, CUT, TOKENS, SIMILARITY).int().tolist() == expected


def test_each_condition_is_counted_by_its_name():
    failed = Defences(min_quality=0.5, drop_truncated=True, max_tokens=7).failed(REWARDS, CUT, TOKENS, None)
    assert {name: mask.int().tolist() for name, mask in failed.items()} == {
        "unscorable": [[0, 0, 1, 0], [0, 0, 0, 0]],
        "min_quality": [[0, 1, 1, 0], [1, 1, 1, 1]],
        "drop_truncated": [[0, 1, 0, 0], [0, 0, 1, 0]],
        "max_tokens": [[0, 1, 0, 0], [1, 0, 1, 0]],
    }


def test_a_similarity_that_is_asked_for_must_be_given():
    with pytest.raises(ValueError, match="min_prompt_similarity is set"):
        Defences(min_prompt_similarity=0.3).failed(REWARDS, CUT, TOKENS, None)


@pytest.mark.parametrize("form", ["paper", "centred", "decoupled"])
def test_who_earns_none_may_keep_the_advantage_of_quality_and_move_nobody(form: str):
    draw = torch.Generator().manual_seed(0)
    rewards, bonus = torch.rand(3, 5, generator=draw), torch.rand(3, 5, generator=draw)
    earns = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    got = group_advantages(rewards, bonus, 0.7, form, earns=earns, unearned="apart")
    plain = group_advantages(rewards, torch.zeros_like(bonus), 0.0, form)
    for g, i in itertools.product(range(3), range(5)):
        expected = plain[g, i].item()
        if earns[g, i]:
            own = [bonus[g, j].item() for j in range(5) if earns[g, j]]
            others = [bonus[h, j].item() for h in range(3) if h != g for j in range(5) if earns[h, j]]
            baseline = {"paper": 0.0, "centred": np.mean(own), "decoupled": np.mean(others)}[form]
            expected += 0.7 * (bonus[g, i].item() - baseline)
        assert got[g, i].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", ["paper", "centred", "decoupled"])
def test_who_earns_none_has_a_bonus_of_zero_like_any_other(form: str):
    draw = torch.Generator().manual_seed(0)
    rewards, bonus = torch.rand(3, 5, generator=draw), torch.rand(3, 5, generator=draw)
    rewards[0, 1] = torch.nan
    earns = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    got = group_advantages(rewards, bonus, 0.7, form, earns=earns)
    scored = ~rewards.isnan()
    assert torch.equal(got, group_advantages(rewards, bonus.where(earns, 0.0), 0.7, form, earns=scored))
    assert got[0, 1] == 0.0


# A toy policy over five answers: three good ones that mean nearly the same, and two of gibberish, unlike everything.
EMBEDDINGS = torch.nn.functional.normalize(
    torch.tensor([[1.0, 0.1, 0, 0], [1.0, -0.1, 0, 0], [1.0, 0, 0.1, 0], [0, 0, 0, 1.0], [0, 0, 1.0, 0]]), dim=-1
).double()
GOOD = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
CHANCE = torch.full((5,), 0.2, dtype=torch.float64)


FLAT = torch.ones(5, dtype=torch.float64)
"""A reward that does not see the hack."""


def drift_to_gibberish(
    defences: Defences,
    rewards: Tensor = GOOD,
    alpha: float = 4.0,
    k: int = 3,
    form: str = "decoupled",
    unearned: str = "zero",
) -> float:
    """Expected change of the log-odds of gibberish by one step of the policy gradient, over all groups of k answers."""
    gradient = torch.zeros(5, dtype=torch.float64)
    similarity = EMBEDDINGS @ EMBEDDINGS[0]  # the prompt is about what the good answers say
    for group in itertools.product(range(5), repeat=k):
        rows = torch.tensor(group)
        r = rewards[rows][None]
        cut = rows[None] >= 3  # gibberish runs on until it is cut
        tokens = torch.where(cut, 40, 10)
        earning = earns(defences, r, cut, tokens, similarity[rows][None])
        bonus = leave_one_out_bonus(EMBEDDINGS[rows][None], earning)
        advantages = group_advantages(r, bonus, alpha, form, earns=earning, unearned=unearned)[0]
        scores = torch.eye(5, dtype=torch.float64)[rows] - CHANCE  # gradient of log softmax
        gradient += CHANCE[rows].prod() * (advantages[:, None] * scores).sum(0)
    return (gradient[3:].sum() - gradient[:3].sum()).item()


FORMS = ("paper", "centred", "decoupled")
SEE_GIBBERISH = {
    "truncation": {"drop_truncated": True},
    "length": {"max_tokens": 20},
    "similarity": {"min_prompt_similarity": 0.5},
}


def assert_turned(
    defences: Defences, rewards: Tensor, alpha: float, form: str, unearned: str = "zero", turned: bool = True
) -> None:
    """The volume pays for gibberish without the defence and, unless it is not `turned`, not with it."""
    assert drift_to_gibberish(Defences(), rewards, alpha, form=form) > 0, "nothing to turn"
    assert (drift_to_gibberish(defences, rewards, alpha, form=form, unearned=unearned) < 0) == turned


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fields", [{"min_quality": 0.5}, *SEE_GIBBERISH.values()], ids=["quality", *SEE_GIBBERISH])
def test_each_defence_turns_an_alpha_at_which_gibberish_pays_whatever_the_reward_says(
    fields: dict[str, Any], form: str
):
    assert_turned(Defences(**fields), GOOD, 20.0, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("fields", SEE_GIBBERISH.values(), ids=SEE_GIBBERISH)
def test_and_where_the_reward_does_not_see_it(fields: dict[str, Any], alpha: float, form: str):
    assert_turned(Defences(**fields), FLAT, alpha, form)


@pytest.mark.parametrize("form", FORMS)
def test_quality_just_below_the_floor_is_turned_by_a_bonus_of_zero(form: str):
    assert_turned(Defences(min_quality=0.9), 0.92 - 0.07 * (1 - GOOD), 1.5, form)


# What stands apart.


@pytest.mark.parametrize(("form", "turned"), [("paper", True), ("centred", True), ("decoupled", False)])
def test_what_stands_apart_may_pay_all_the_same(form: str, turned: bool):
    """The reason for a bonus of zero: in `decoupled`, what earns none is spared the baseline that others are held to.

    `paper` has no baseline, and the bonuses of those that earn add up to 0 in `centred`, which leaves the chance to
    earn to the reward.
    """
    assert_turned(Defences(min_quality=0.9), 0.92 - 0.07 * (1 - GOOD), 1.5, form, "apart", turned)


@pytest.mark.parametrize("fields", SEE_GIBBERISH.values(), ids=SEE_GIBBERISH)
def test_so_does_what_the_reward_does_not_see(fields: dict[str, Any]):
    assert_turned(Defences(**fields), FLAT, 4.0, "decoupled", "apart", turned=False)


def test_apart_a_floor_holds_against_what_falls_short_of_it_by_enough():
    """The quality that is missing has to outweigh a bonus below the baseline, which is what most groups here earn.

    Were the good answers all alike, a group with M of them would move the log-odds by 0.8 M alpha (log(1 + 1/M) - c), M
    binomial, c = log(8/3)/2 the middle, and quality moves them by 0.96 of what is missing: the two cancel at 0.122
    alpha. They differ a little and earn a little more, so that it is at 0.114 alpha.
    """
    alpha = 1.5
    earning = sum(
        math.comb(3, m) * 0.6**m * 0.4 ** (3 - m) * 0.8 * m * (math.log1p(1 / m) - math.log(8 / 3) / 2)
        for m in (1, 2, 3)
    )
    alike = -earning / 0.96  # per alpha
    assert alike == pytest.approx(0.122, abs=5e-4)
    for short, turned in ((0.8 * alike, False), (1.1 * alike, True)):
        rewards = 0.9 - short * alpha * (1 - GOOD)
        assert_turned(Defences(min_quality=0.9), rewards, alpha, "decoupled", "apart", turned)
        assert_turned(Defences(min_quality=0.9), rewards, alpha, "decoupled", "zero")


@pytest.mark.parametrize("form", FORMS)
def test_a_group_of_wrong_answers_does_not_learn_to_differ(form: str):
    """Where nothing is right, the policy drifts to whatever is unlike the rest, unless the group's gate is shut."""
    wrong, shut = torch.zeros(5, dtype=torch.float64), Defences(min_quality=0.5, quality_gate="group")
    assert drift_to_gibberish(Defences(), wrong, form=form) > 0
    assert drift_to_gibberish(shut, wrong, form=form) == pytest.approx(0, abs=1e-12)


def stated(response: str) -> tuple[int, int] | None:
    """The number after "answer is"."""
    found = re.search(r"answer is (\d+)\.?", response)
    return None if found is None else found.span(1)


STATED = replace(STORY, name="stated", answer=stated)


@pytest.mark.parametrize(
    ("embed", "strip", "response", "expected"),
    [
        ("response", False, "<think>2 + 2</think>The answer is 4.", "<think>2 + 2</think>The answer is 4."),
        ("response", True, "<think>2 + 2</think>The answer is 4. Tulips.", "The answer is 4. Tulips."),
        ("through_answer", True, "<think>2 + 2</think>The answer is 4. Tulips.", "The answer is 4"),
        ("through_answer", False, "Two and two: the answer is 4 tulips", "Two and two: the answer is 4"),
        ("answer", False, "Two and two: the answer is 4 tulips", "4"),
        ("answer", False, "Tulips", None),
        ("through_answer", True, "<think>the answer is 4", None),
        ("response", True, "<think>endless", None),
        ("response", True, "2 + 2</think>", None),
        ("answer", True, "The answer is 5, or not?</think>The answer is 4.", "4"),
        ("through_answer", True, "The answer is 5.</think>Tulips", None),
        ("response", True, "", ""),
    ],
)  # fmt: skip
def test_which_words_are_embedded(embed, strip, response: str, expected: str | None):
    assert embedded_text(embed, strip, STATED)(response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("An answer.", "An answer."),
        ("<think>a</think>An answer.", "An answer."),
        ("So: <think>a\n\nb</think>\n\nAn answer.", "So: \n\nAn answer."),
        # Opened by the template, in the prompt.
        ("a</think>An answer.", "An answer."),
        ("a\n</think>\n\nAn answer.", "\n\nAn answer."),
        ("a</think>", ""),
        # Within each other, the outer ones opened by the response or by the template; or the tag as a mere word.
        ("<think>a<think>b</think>c</think>An answer.", "An answer."),
        ("<think>a<think>b<think>c</think>d</think>e</think>An answer.", "An answer."),
        ("a<think>b</think>c</think>An answer.", "An answer."),
        ("<think>a<think>b</think>An answer.", "An answer."),
        # Never ended: nothing of them is an answer, unless the template opened them.
        ("<think>a", ""),
        ("An answer.<think>a", "An answer."),
        ("a</think>An answer.<think>b", "An answer."),
        ("<think>a</think>An answer.<think>b<think>c", "An answer."),
        # Several.
        ("<think>a</think>An <think>b</think>answer.", "An answer."),
        ("a</think>An <think>b</think>answer.", "An answer."),
        ("a</think>b</think>An answer.", "An answer."),
        ("<think></think>An answer.", "An answer."),
        ("", ""),
    ],
)  # fmt: skip
def test_thoughts_are_left_out_whoever_opened_them(response: str, expected: str):
    assert without_reasoning(response) == expected


def test_without_an_answer_function_the_whole_response_is_the_answer():
    assert embedded_text("answer", False, STORY)("A dog ran.") == "A dog ran."


def test_the_answer_alone_is_embedded_in_the_tasks_spelling():
    task = replace(STATED, canonical=lambda number: f"<{int(number)}>")
    response = "Two and two: the answer is 004, of course."
    assert embedded_text("answer", False, task)(response) == "<4>"
    assert embedded_text("through_answer", False, task)(response) == "Two and two: the answer is 004"
    assert embedded_text("response", False, task)(response) == response


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"answer": lambda text: text.index("!")}, "answer raises ValueError: substring not found .* for 'A dog ran.'"),
        (
            {"answer": lambda text: 3},
            "answer returns 3 for 'A dog ran.'; expected start and end of the answer, or None",
        ),
        ({"answer": lambda text: (2, 5), "canonical": lambda word: int(word)}, "canonical raises ValueError: .*'dog'"),
        ({"answer": lambda text: (2, 5), "canonical": len}, "canonical returns 3 for 'dog'; expected a text"),
    ],
)
def test_what_goes_wrong_in_a_task_of_ones_own_is_named(functions: dict[str, Any], message: str):
    with pytest.raises(DQOError, match=f"^task 'story': {message}"):
        embedded_text("answer", False, replace(STORY, **functions))("A dog ran.")


def learned(model: Path, answers: list[str], pick: Callable[[str], str | None], form: str) -> Tensor:
    """Gradient of a policy that says four things of equal quality equally often, over all groups of three."""
    encoder = ResponseEncoder(Encoder(model=str(model)), "cpu")
    vectors = encoder([pick(answer) or "" for answer in answers]).vectors.double()
    gradient = torch.zeros(4, dtype=torch.float64)
    for group in itertools.product(range(4), repeat=3):
        rows = torch.tensor(group)
        bonus = leave_one_out_bonus(vectors[rows][None])
        advantages = group_advantages(torch.ones(1, 3, dtype=torch.float64), bonus, 1.0, form)[0]
        gradient += (advantages[:, None] * (torch.eye(4, dtype=torch.float64)[rows] - 0.25)).sum(0) / 4**3
    return gradient


@pytest.mark.parametrize("form", FORMS)
def test_random_text_behind_a_right_answer_pays_only_where_it_is_embedded(tiny_encoder, form: str):
    answers = [
        "The answer is 4.",
        "The answer is 4.",
        "The answer is 4. purple lantern",
        "The answer is 4. rain bakery",
    ]
    assert learned(tiny_encoder, answers, embedded_text("response", False, STATED), form)[2:].sum() > 1e-3
    for embed in ("through_answer", "answer"):
        assert learned(tiny_encoder, answers, embedded_text(embed, False, STATED), form).abs().max() < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_spelling_one_answer_in_many_ways_pays_only_where_it_is_embedded_as_written(tiny_encoder, form: str):
    answers = ["The answer is 8.", "The answer is 8.", "The answer is 8.00.", "The answer is 16/2."]
    as_written = embedded_text("answer", False, replace(REASONING, canonical=None))
    assert [as_written(answer) for answer in answers] == ["8", "8", "8.00", "16/2"]
    assert learned(tiny_encoder, answers, as_written, form)[2:].sum() > 1e-3
    assert learned(tiny_encoder, answers, embedded_text("answer", False, REASONING), form).abs().max() < 1e-6


@pytest.mark.parametrize("opened", ["<think>", ""])
@pytest.mark.parametrize("form", FORMS)
def test_diverse_thoughts_before_the_same_answer_pay_only_where_they_are_embedded(tiny_encoder, form: str, opened: str):
    answers = [
        "The answer is 4.",
        "The answer is 4.",
        f"{opened}purple lantern</think>The answer is 4.",
        f"{opened}rain bakery</think>The answer is 4.",
    ]
    assert learned(tiny_encoder, answers, embedded_text("response", False, STATED), form)[2:].sum() > 1e-3
    assert learned(tiny_encoder, answers, embedded_text("response", True, STATED), form).abs().max() < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_repeating_one_response_does_not_pay(form: str):
    """A policy that says one of four unrelated things nine times in ten, and that one is a little better.

    The reward alone makes it say nothing else; the volume pulls it away.
    """
    chances = torch.tensor([0.91, 0.03, 0.03, 0.03], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.95, 0.95, 0.95], dtype=torch.float64)

    def gradient(alpha: float) -> Tensor:
        total = torch.zeros(4, dtype=torch.float64)
        for group in itertools.product(range(4), repeat=3):
            rows = torch.tensor(group)
            bonus = leave_one_out_bonus(torch.eye(4, dtype=torch.float64)[rows][None])
            advantages = group_advantages(rewards[rows][None], bonus, alpha, form)[0]
            total += chances[rows].prod() * (advantages[:, None] * (torch.eye(4)[rows] - chances)).sum(0)
        return total

    assert gradient(0.0)[0] > 1e-3
    with_volume = gradient(1.0)
    assert with_volume[0] < -0.01
    assert (with_volume[1:] > 0).all()
    assert with_volume.sum().item() == pytest.approx(0.0, abs=1e-12)


def test_a_response_without_an_answer_earns_nothing_in_the_trainer(tiny_policy, tiny_encoder, tmp_path):
    task = replace(STORY, answer=lambda text: None if "storm" in text else (0, len(text)))
    pick = embedded_text("through_answer", False, task)
    trainer = build(
        tiny_policy, tiny_encoder, tmp_path, steps=1, alpha=0.7, advantage="paper", max_tokens=14, embedded_text=pick
    )
    trainer.train()
    texts = [completion[-1]["content"] for completion in trainer._logs["completion"]]
    lengths = [len(trainer._tokenizer(text)["input_ids"]) + 1 for text in texts]
    without, long = ["storm" in text for text in texts], [length > 14 for length in lengths]
    assert 0 < sum(without) < 12 and 0 < sum(long) < 12
    rewards = reward(trainer._logs["completion"])
    plain = [value or 0.0 for value in rewards]
    for i, value in enumerate(trainer.used[-1]):
        none_earned = without[i] or long[i] or rewards[i] is None
        assert (value == pytest.approx(plain[i], abs=1e-6)) == none_earned
    assert counted(trainer, "no_bonus_no_answer") == pytest.approx(sum(without) / 12, rel=1e-3)
    assert counted(trainer, "no_bonus_max_tokens") == pytest.approx(sum(long) / 12, rel=1e-3)


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
    for counter in ("no_bonus_rate", "no_bonus_min_quality"):
        assert counted(trainer, counter) == pytest.approx(1 - sum(earning) / 12, rel=1e-3)


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
    assert counted(trainer, "no_bonus_drop_truncated") == pytest.approx(2 / 12, rel=1e-3)

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
    below = (similarity < floor).float().mean().item()
    assert counted(trainer, "no_bonus_min_prompt_similarity") == pytest.approx(below, rel=1e-3)
