"""One model against another, with a judge that is a rule or a server."""

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
from judge_server import Reply, fenced, serving, verdict

from dqo.errors import DQOError
from dqo.judges import Comparison, Pair, Score, build
from dqo.judges.comparison import ModelComparison, compare_models, score_model

ROWS = [{"id": f"{i:016x}", "prompt": [{"role": "user", "content": f"Question {i}?"}]} for i in range(4)]


def results(model: str, groups: list[list[str]]) -> list[dict[str, Any]]:
    return [{"id": row["id"], "model": model, "responses": group} for row, group in zip(ROWS, groups, strict=True)]


class Table:
    """Says what the responses' names ask for: `win-...` beats everything, and so on."""

    requests = None
    stopped = None
    shows_both = True

    def __init__(self) -> None:
        self.identity = {"kind": "table"}

    def compare(self, pairs: list[Pair], repeat: int = 0) -> list[Comparison]:
        orders = {"win": ("A", "A"), "lose": ("B", "B"), "tie": ("tie", "tie"), "flip": ("A", "B")}
        orders |= {"odd": ("A", "invalid"), "gone": ("missing", "A")}
        return [Comparison(orders[pair.a.split("-")[0]]) for pair in pairs]


def compared(groups: list[list[str]], other: list[list[str]] | None = None, count: int = 2) -> ModelComparison:
    other = other or [["xxxx"] * len(group) for group in groups]
    return compare_models(Table(), ROWS, results("dqo", groups), results("sft", other), count, 500, 0.95, 0)


def test_the_win_rate_is_the_mean_over_prompts_with_ties_as_halves():
    found = compared([["win", "win"], ["win", "lose"], ["tie", "flip"], ["lose", "odd"]])
    assert [one.score for one in found.prompts] == [1.0, 0.5, 0.5, 0.0]
    assert found.win_rate.mean == pytest.approx(0.5)
    assert found.win_rate.low < 0.5 < found.win_rate.high
    # Seven pairs have a verdict, two of them are ties, one of them because the orders disagree.
    assert (found.tie_rate, found.flip_rate) == (pytest.approx(2 / 7), pytest.approx(1 / 7))
    assert (found.invalid, found.missing, found.complete) == (1, 0, True)
    assert (found.candidate, found.against, found.judge) == ("dqo", "sft", {"kind": "table"})


def test_what_was_not_judged_is_left_out_and_marked():
    found = compared([["win", "gone"], ["gone", "gone"], ["odd", "odd"], ["lose", "lose"]])
    assert [one.score for one in found.prompts] == [1.0, None, None, 0.0]
    assert found.win_rate.mean == pytest.approx(0.5)
    assert (found.invalid, found.missing, found.complete) == (2, 3, False)
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert document["complete"] is False and document["prompts"][1]["score"] is None
    nothing = compared([["gone"]] * 4, count=1)
    assert math.isnan(nothing.win_rate.mean) and nothing.document()["win_rate"]["mean"] is None
    assert (nothing.tie_rate, nothing.longer_win_rate) == (None, None)


def test_the_share_that_the_longer_response_wins():
    found = compared([["win-long"], ["win"], ["lose-long"], ["tie-long"]], [["x" * 5]] * 4, 1)
    # Won by the longer one: the first. `win` (3 characters) beats 5, and `lose-long` (9) loses to 5.
    assert found.longer_win_rate == pytest.approx(1 / 3)


def test_a_win_everywhere_is_not_taken_for_certain():
    """Four wins of four: Clopper and Pearson's lower bound at 95 % is 0.025^(1/4)."""
    found = compared([["win"]] * 4, count=1)
    assert found.win_rate.mean == 1.0 and found.win_rate.low == pytest.approx(0.025**0.25)


def test_the_win_rate_at_equal_lengths_takes_out_what_length_explains():
    """The longer side wins always, and each side is the longer one as often: at equal lengths there is nothing left."""
    groups = [["win-" + "x" * 30], ["lose"], ["win-" + "x" * 30], ["lose"]]
    found = compared(groups, [["y" * 10], ["y" * 28], ["y" * 10], ["y" * 28]], 1)
    assert found.win_rate.mean == 0.5 and found.longer_win_rate == 1.0
    assert found.length_controlled is not None and found.length_controlled.mean == pytest.approx(0.5, abs=1e-6)
    assert found.length_effect is not None and found.length_effect > 1.0
    assert [one.lengths for one in found.prompts] == [(34.0, 10.0), (4.0, 28.0)] * 2
    # Nearly always won, and only ever by the longer side: less is left than the raw rate says.
    longer = compared([["win-" + "x" * 30]] * 3 + [["lose"]], [["y" * 10]] * 3 + [["y" * 40]], 1)
    assert longer.length_controlled is not None and longer.length_controlled.mean < longer.win_rate.mean == 0.75


def test_a_difference_in_length_that_never_varies_cannot_be_told_from_the_model():
    found = compared([["win-x"], ["lose-"], ["tie-x"], ["win-y"]], [["y" * 3]] * 4, 1)
    assert found.length_controlled is None and found.length_effect is None
    assert "every response is longer by 2" in found.not_length_controlled
    document = found.document()
    assert document["length_controlled"] is None and document["pairs"] == 4
    nothing = compared([["gone"]] * 4, count=1)
    assert nothing.length_controlled is None and nothing.not_length_controlled == "no pair has a verdict"


def test_lengths_are_those_of_the_pairs_with_a_verdict():
    found = compared([["win-xx", "odd-" + "x" * 50]] * 2 + [["lose", "win"]] * 2)
    assert [one.lengths for one in found.prompts] == [(6.0, 4.0)] * 2 + [(3.5, 4.0)] * 2


def test_the_share_won_by_the_response_shown_first():
    """Of the win's two answers one names what was shown first, of the flip's both, and the tie's name no winner."""
    found = compared([["win"], ["flip"], ["tie"], ["odd"]], count=1)
    # `odd` is read in one order, where A was shown first and won.
    assert found.first_position_rate == pytest.approx(4 / 5)


class Words:
    """Scores a response by its words; nothing readable of an empty one, nothing at all of `gone`."""

    identity: ClassVar[dict[str, Any]] = {"kind": "words"}
    requests = stopped = None

    def score(self, responses: list[str], rows: list[Any], repeat: int = 0) -> list[Score]:
        assert len(responses) == len(rows)
        return [
            Score(None, "missing", "away") if text == "gone"
            else Score(float(len(text.split())), "valid") if text else Score(None, "invalid")
            for text in responses
        ]  # fmt: skip


def test_scores_are_means_over_prompts_of_the_valid_ones():
    groups = [["a b", "a b c d", "never scored"], ["a", "", "x"], ["gone", "gone", "x"], ["a b c", "gone", "x"]]
    found = score_model(Words(), ROWS, results("sft", groups), 2, 500, 0.95, 0)
    assert found.per_prompt == [3.0, 1.0, None, 3.0]
    assert found.score.mean == pytest.approx(7 / 3) and (found.invalid, found.missing) == (1, 3)
    assert [key for key, _ in found.prompts] == [row["id"] for row in ROWS]


def test_only_the_first_responses_are_judged_and_a_server_that_goes_away_leaves_the_rest(tmp_path: Path):
    def script(number: int, body: dict[str, Any]) -> Reply:
        if number >= 5:
            return Reply(503)
        return verdict("A" if fenced(body)["response-a"].startswith("good") else "B")

    good = results("dqo", [[f"good {i}", "never shown", "nor this"] for i in range(4)])
    bad = results("sft", [[f"bad {i}", "never shown", "nor this"] for i in range(4)])
    with serving(script) as server:
        judge = build(server.settings(tmp_path, max_concurrency=1, max_attempts=1))
        found = compare_models(judge, ROWS, good, bad, 1, 500, 0.95, 0)
        assert "never shown" not in str(server.bodies)
    assert [one.score for one in found.prompts] == [1.0, 1.0, None, None]
    assert (found.missing, found.complete) == (2, False)
    assert [one.comparisons[0].orders for one in found.prompts[2:]] == [("A", "missing"), ("missing", "missing")]


def test_other_prompts_or_too_few_responses_are_refused():
    with pytest.raises(DQOError, match="of other prompts than the 4 rows"):
        group = results("dqo", [["win"]] * 4)
        compare_models(Table(), ROWS, group, group[::-1], 1, 500, 0.95, 0)
    with pytest.raises(DQOError, match="3 responses a prompt were asked for, and 2 are there"):
        compared([["win", "win"]] * 4, count=3)
    with pytest.raises(DQOError, match="expected 1 or more"):
        compared([["win"]] * 4, count=0)
