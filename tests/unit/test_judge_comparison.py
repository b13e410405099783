"""One model against another, with a judge that is a rule or a server."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from judge_server import Reply, fenced, serving, verdict

from dqo.errors import DQOError
from dqo.judges import Comparison, Pair, build
from dqo.judges.comparison import ModelComparison, compare_models

ROWS = [{"id": f"{i:016x}", "prompt": [{"role": "user", "content": f"Question {i}?"}]} for i in range(4)]


def results(model: str, groups: list[list[str]]) -> list[dict[str, Any]]:
    return [{"id": row["id"], "model": model, "responses": group} for row, group in zip(ROWS, groups, strict=True)]


class Table:
    """Says what the responses' names ask for: `win-...` beats everything, and so on."""

    requests = None

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
