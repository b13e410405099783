"""Models side by side: pairing by prompt, what is refused, verdicts, win rates, and what is said in words."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluations import evaluation
from html_page import HOSTILE, Page

from dqo.errors import DQOError
from dqo.evaluation import comparison, comparison_report
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.comparison import Conditions, Difference, compare, evaluated, outcome
from dqo.evaluation.figures import ModelResult, differences_figure, measured, win_rates_figure
from dqo.evaluation.statistics import Interval, paired_p_value
from dqo.evaluation.win_rate import length_controlled_win_rate

PROMPTS = [f"p{i:02d}" for i in range(20)]
NAN = math.nan
SAME = Conditions(reward="r", encoder="e", sampling="s")


def models(shifts, prompts=PROMPTS, n=4, **further):
    document, rows = evaluation(shifts, prompts, n)
    found = [evaluated(document, rows, name, name, "here") for name in shifts]
    return [replace(one, conditions=SAME, **further) for one in found]


@pytest.fixture(scope="module")
def result():
    return compare(models({"reward_only": 0.0, "dqo": 0.3, "base": -0.3}))


# --- pairing ---


def test_means_and_differences_are_those_of_the_common_prompts_whatever_their_order():
    first, second = models({"reward_only": 0.0, "dqo": 0.3})
    order = np.random.default_rng(1).permutation(20)[:15]
    shuffled = replace(
        second,
        rows=[second.rows[i] for i in order],
        per_prompt={name: [values[i] for i in order] for name, values in second.per_prompt.items()},
    )
    result = compare([first, shuffled])
    assert result.prompts == 15
    assert result.warnings == [
        "compared on the 15 prompts that all answered (prompts: reward_only 20, dqo 15)",
    ]
    assert [row["id"] for row in result.models[0].rows] == [row["id"] for row in result.models[1].rows]
    kept = sorted(order)
    for metric in METRICS:
        a, b = (np.array(one.per_prompt[metric])[kept] for one in (first, second))
        assert result.means[metric][1].mean == pytest.approx(b.mean())
        assert result.differences[metric][1].interval.mean == pytest.approx((b - a).mean())


def test_evaluations_without_a_common_prompt_are_refused():
    (first,) = models({"dqo": 0.0})
    (second,) = models({"sft": 0.0}, [f"q{i}" for i in range(7)])
    with pytest.raises(DQOError, match=r"no prompt is common to all models \(prompts: dqo 20, sft 7\)"):
        compare([first, second])


def test_one_model_twice_or_too_few_or_too_many_are_refused():
    one, two = models({"dqo": 0.0, "sft": 0.1})
    with pytest.raises(DQOError, match="given twice; got dqo, dqo"):
        compare([one, one])
    same = [replace(one, run_id="a", label=label) for label in ("x/1", "x@champion")]
    with pytest.raises(DQOError, match="given twice"):
        compare(same)
    with pytest.raises(DQOError, match=r"got 1 model\(s\); expected 2 to 8"):
        compare([one])
    with pytest.raises(DQOError, match=r"got 9 model\(s\)"):
        compare([one, two] * 4 + [one])


# --- what does not compare ---


def test_another_number_of_responses_leaves_out_what_depends_on_it():
    (first,), (second,) = models({"sft": 0.0}, n=4), models({"dqo": 0.3}, n=6)
    result = compare([first, second])
    assert set(result.means) == {
        "quality", "self_rouge_diversity", "cosine_distance", "truncation_rate", "mean_tokens"
    }  # fmt: skip
    assert set(result.left_out) == set(METRICS) - set(result.means)
    assert result.left_out["log_volume"] == "responses a prompt differ (sft 4, dqo 6)"
    assert result.win_rates[1][0] is not None
    page = Page(comparison_report.render(result))
    assert "Not drawn: the models were asked for different numbers of responses." in page.words
    assert page.words.count("not compared: responses a prompt differ") == len(result.left_out)


@pytest.mark.parametrize(
    ("changed", "gone", "said"),
    [
        ({"encoder": "x"}, {"cosine_distance", "log_volume", "vendi_score", "semantic_clusters"}, "encoders differ"),
        ({"reward": "x"}, {"quality", "best_of_n"}, "rewards differ"),
        ({"sampling": "x"}, set(), "sampled with different settings"),
    ],
)
def test_other_conditions_are_left_out_or_said(changed, gone, said):
    first, second = models({"sft": 0.0, "dqo": 0.3})
    result = compare([first, replace(second, conditions=replace(SAME, **changed))])
    assert set(result.left_out) == gone
    assert set(result.means) == set(METRICS) - gone
    assert len(result.warnings) == 1 and said in result.warnings[0]
    assert (result.win_rates[1][0] is None) is ("quality" in gone)
    Page(comparison_report.render(result))


def test_other_data_with_the_same_prompts_are_said():
    first, second = (replace(one, data_digest="a" * 64) for one in models({"sft": 0.0, "dqo": 0.3}))
    assert compare([first, second]).warnings == []
    (said,) = compare([first, replace(second, data_digest="b" * 64)]).warnings
    assert said.startswith("the data sets differ (aaaaaaaa, bbbbbbbb)")


def test_conditions_that_are_not_known_are_said():
    first, second = models({"sft": 0.0, "dqo": 0.3})
    result = compare([first, replace(second, conditions=None)])
    assert result.warnings[0].startswith("the recipe of dqo is not there")


@pytest.mark.parametrize(("prompts", "too_few"), [(8, True), (10, False)])
def test_too_few_prompts_for_so_many_metrics_are_said(prompts: int, too_few: bool):
    """All differences on one side have p = 2 / 2^prompts, which Holm multiplies by the number of metrics at most."""
    result = compare(models({"reward_only": 0.0, "dqo": 5.0}, PROMPTS[:prompts]))
    assert too_few == (len(METRICS) * 2 / 2**prompts > 0.05)
    assert [f"{prompts} prompts are too few" in warning for warning in result.warnings] == [True] * too_few
    assert (result.differences["log_volume"][1].verdict == "better") is not too_few


# --- differences ---


def test_p_values_are_adjusted_over_all_metrics_and_models(result):
    raw = {}
    for position in (1, 2):
        for metric in METRICS:
            a, b = (result.models[i].per_prompt[metric] for i in (0, position))
            raw[metric, position] = paired_p_value(b, a)
    largest = 0.0
    for rank, key in enumerate(sorted(raw, key=lambda key: raw[key])):  # Holm, by its definition
        largest = max(largest, min(1.0, (len(raw) - rank) * raw[key]))
        assert result.differences[key[0]][key[1]].adjusted == pytest.approx(largest), key


def test_verdicts_follow_the_direction_of_the_metric(result):
    found = {metric: [one and one.verdict for one in row] for metric, row in result.differences.items()}
    assert all(row[0] is None for row in found.values())
    assert found["log_volume"] == [None, "better", "worse"]
    assert found["duplicate_rate"] == [None, "worse", "better"]
    assert found["mean_tokens"] == [None, "differs", "differs"]
    assert found["quality"] == [None, "not told apart", "not told apart"]


def test_a_metric_that_one_model_lacks_is_not_measured():
    first, second = models({"sft": 0.0, "dqo": 0.3})
    lacking = {name: values for name, values in second.per_prompt.items() if name != "vendi_score"}
    result = compare([first, replace(second, per_prompt=lacking)])
    assert result.differences["vendi_score"][1].verdict == "not measured"
    assert math.isnan(result.differences["vendi_score"][1].adjusted)
    json.dumps(comparison.to_document(result), allow_nan=False)
    page = Page(comparison_report.render(result))
    assert page.words.count("not measured") == 3  # difference, mean, and the plane with that axis
    assert "nan" not in page.words.lower()


# --- win rates ---


def test_outcome_counts_pairs_with_ties_as_one_half():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 6).tolist(), rng.integers(0, 4, 5).tolist()
    expected = np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b])
    assert outcome(a, b) == pytest.approx(expected)
    assert outcome([*a, None], [None, *b]) == pytest.approx(expected)
    assert outcome([None], b) is None


def judged(identity="a", against="reward_only", passed=True, **per_prompt):
    return {
        "complete": True, "identity": {"model": identity}, "against": against, "responses": 2,
        "audit": {"passed": passed}, "models": {name: {"per_prompt": scores} for name, scores in per_prompt.items()},
    }  # fmt: skip


def test_the_win_rates_of_one_judge_are_those_of_the_common_prompts():
    names = ["p1", "p2", "p3"]
    models = {"reward_only": 0.0, "dqo": 0.1}
    one = evaluation(models, names, judge=judged(dqo=[1.0, 0.0, 0.5]))
    # The same opponent with the same responses, one prompt fewer and in another order.
    other_document, other_rows = evaluation(models, ["p3", "p2"], judge=judged(dqo=[1.0, None]))
    theirs = {(row["id"], row["model"]): row["responses"] for row in one[1]}
    for row in other_rows:
        if row["model"] == "reward_only":
            row["responses"] = theirs[row["id"], "reward_only"]
    a = evaluated(*one, "dqo", "first", "here")
    b = evaluated(other_document, other_rows, "dqo", "second", "there")
    found = compare([a, b])
    assert [rate.mean for rate in found.judged] == [pytest.approx((0.0 + 0.5) / 2), pytest.approx(1.0)]
    document = comparison.to_document(found)["judge"]
    assert document["identity"] == {"model": "a"} and document["against"] == "reward_only"
    assert document["win_rates"][0]["mean"] == pytest.approx(0.25)
    assert comparison.to_metrics(found)["compare/1/judge_win_rate"] == pytest.approx(0.25)
    # The opponent itself has no rate, and is no reason to leave the others out.
    with_itself = compare([evaluated(*one, "reward_only", "rival", "here"), a])
    assert with_itself.judged[0] is None and with_itself.judged[1].mean == pytest.approx(0.5)
    page = comparison_report.render(with_itself)
    (table,) = re.findall(r"Table of the judge's win rates.*?</table>", page, re.DOTALL)
    cells = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td.*?</td>", table)]
    assert cells == ["the opponent", comparison.rate_text(with_itself.judged[1])] and cells[1].startswith("50% [")
    assert "a compared the first 2 responses of each model to each prompt with those of reward_only" in page
    assert "win rates by a judge" not in comparison_report.render(compare(models_without_judge())).lower()


def models_without_judge():
    document, rows = evaluation({"reward_only": 0.0, "dqo": 0.1}, ["p1", "p2", "p3"])
    return [evaluated(document, rows, name, name, "here") for name in ("reward_only", "dqo")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"identity": "b"}, "judges differ"),
        ({"against": "base"}, "the judge compared them with different models"),
        ({"passed": False}, "the judge has not passed its audit in the evaluation of second"),
    ],
)
def test_verdicts_of_other_judges_and_opponents_are_not_compared(change, said):
    names, shifts = ["p1", "p2", "p3"], {"base": 0.0, "reward_only": 0.0, "dqo": 0.1}
    scores = [1.0, 0.0, 0.5]
    first = evaluated(*evaluation(shifts, names, judge=judged(dqo=scores)), "dqo", "first", "here")
    changed = evaluation(shifts, names, judge=judged(dqo=scores, **change))
    found = compare([first, evaluated(*changed, "dqo", "second", "there")])
    assert (found.judged is None) == ("passed" not in change)
    assert [said in warning for warning in found.warnings if "judge" in warning] == [True]
    # Without verdicts of one of them there is nothing to say.
    none = compare([first, evaluated(*evaluation(shifts, names), "dqo", "second", "there")])
    assert none.judged is None and not any("judge" in warning for warning in none.warnings)


def test_the_matrix_is_the_same_from_both_sides(result):
    for i in range(3):
        assert result.win_rates[i][i] is None
        for j in range(3):
            if i != j:
                one, other = result.win_rates[i][j], result.win_rates[j][i]
                assert one.raw.mean + other.raw.mean == pytest.approx(1)
                assert one.raw.low + other.raw.high == pytest.approx(1)
    # The mirrored one equals what the model computes from the other side.
    a, b = result.models[1], result.models[0]
    outcomes = [outcome(x["qualities"], y["qualities"]) for x, y in zip(a.rows, b.rows, strict=True)]
    lengths = [[np.mean([len(text) for text in row["responses"]]) for row in model.rows] for model in (a, b)]
    direct = length_controlled_win_rate(outcomes, *lengths)
    mirrored = result.win_rates[1][0]
    assert mirrored.controlled.mean == pytest.approx(direct.controlled.mean, abs=1e-6)
    assert mirrored.controlled.low == pytest.approx(direct.controlled.low, abs=0.01)
    assert mirrored.length_effect == pytest.approx(direct.length_effect, abs=1e-6)


def test_a_constant_difference_in_length_cannot_be_controlled():
    first, second = models({"sft": 0.0, "dqo": 0.3})

    def padded(model, size):
        return replace(model, rows=[row | {"responses": ["x" * size] * 4} for row in model.rows])

    rates = compare([padded(first, 10), padded(second, 13)]).win_rates[1][0]
    assert math.isfinite(rates.raw.mean) and math.isnan(rates.controlled.mean)
    equal = compare([padded(first, 10), padded(second, 10)]).win_rates[1][0]
    assert equal.controlled.mean == pytest.approx(equal.raw.mean, abs=0.02)


# --- words ---


def difference(mean, verdict):
    return Difference(Interval(mean, mean - 0.01, mean + 0.01), 0.001, 0.004, verdict)


@pytest.mark.parametrize(
    ("diverse", "quality", "sentence"),
    [
        (["better"] * 9, difference(-0.05, "worse"),
         "dqo is more diverse than sft on all 9 measures; its quality is lower "
         "(\u22120.05 [\u22120.06, \u22120.04], adjusted p 0.004)."),
        (["better"] * 3 + ["not told apart"] * 6, difference(0.02, "not told apart"),
         "dqo is more diverse than sft on 3 of 9 measures; no difference in quality is shown "
         "(+0.02 [0.01, 0.03], adjusted p 0.004)."),
        (["better"] * 2 + ["worse"] * 7, difference(0.05, "better"),
         "dqo is more diverse than sft on 2 of 9 measures and less diverse on 7; its quality is higher "
         "(+0.05 [0.04, 0.06], adjusted p 0.004)."),
        (["worse"] * 9, difference(0.05, "not measured"),
         "dqo is less diverse than sft on all 9 measures; quality cannot be compared."),
        (["not told apart"] * 9, difference(0.05, "not measured"),
         "No difference in diversity between dqo and sft is shown by any of 9 measures; quality cannot be compared."),
        (["not measured"] * 9, difference(0.05, "better"),
         "dqo and sft cannot be compared in diversity; its quality is higher (+0.05 [0.04, 0.06], adjusted p 0.004)."),
    ],
)  # fmt: skip
def test_headline(diverse, quality, sentence):
    base = compare(models({"sft": 0.0, "dqo": 0.3}))
    assert len(comparison.DIVERSITY) == 9
    found = {
        name: [None, difference(0.1, verdict)] for name, verdict in zip(comparison.DIVERSITY, diverse, strict=True)
    }
    assert comparison.headline(replace(base, differences={"quality": [None, quality], **found}), 1) == sentence


def test_details_name_every_metric_once(result):
    text = " ".join(comparison.details(result, 1))
    assert text.startswith("Better on ") and "Worse on " in text and "Different in Tokens +0.3" in text
    for metric in METRICS.values():
        assert f"{metric.label} " in text or f"{metric.label}." in text or f"{metric.label}," in text, metric.label


# --- order of the prompts ---


def test_prompts_are_sorted_by_the_spread_of_quality_then_of_log_volume():
    first, second = models({"sft": 0.0, "dqo": 0.3}, PROMPTS[:4])

    def fixed(model, quality, volume):
        return replace(model, per_prompt={**model.per_prompt, "quality": quality, "log_volume": volume})

    result = compare(
        [fixed(first, [0.5, 0.0, 0.5, None], [1.0, 1, 1, 1]), fixed(second, [0.5, 1.0, 0.5, 1.0], [2.0, 1, 5, 1.5])]
    )
    assert comparison.by_disagreement(result) == [1, 2, 0, 3]
    assert comparison.disagreement(result)[3] == {"quality": 0.0, "log_volume": 0.5}
    page = Page(comparison_report.render(result))
    assert [attrs["data-order"] for _, attrs in page.elements if "data-order" in attrs] == ["1", "2", "0", "3"]


# --- as data ---


def test_document_and_tables_hold_what_was_found(result):
    document = json.loads(json.dumps(comparison.to_document(result), allow_nan=False))
    assert document["differences"]["log_volume"][1]["interval"]["mean"] == pytest.approx(0.3, abs=0.05)
    assert document["differences"]["log_volume"][0] is None
    assert [one["label"] for one in document["models"]] == ["reward_only", "dqo", "base"]
    tables = comparison.to_tables(result)
    assert set(tables) == {"comparison_metrics.json", "win_rates.json", "responses_by_disagreement.json"}
    assert {len(column) for column in tables["comparison_metrics.json"].values()} == {3 * len(METRICS)}
    assert {len(column) for column in tables["win_rates.json"].values()} == {6}
    assert {len(column) for column in tables["responses_by_disagreement.json"].values()} == {20}


def test_metrics_have_the_documented_names(result):
    names = set(comparison.to_metrics(result))
    text = (Path(__file__).parents[2] / "docs" / "comparison.md").read_text(encoding="utf-8")
    patterns = {name.replace("/2/", "/<i>/").replace("quality", "<metric>") for name in names
                if name.startswith("compare/2/") and ("quality" in name or "win_rate" in name)}  # fmt: skip
    assert len(patterns) == 13
    for name in patterns | {"compare/prompts"}:
        assert f"`{name.removesuffix('_low').removesuffix('_high')}`" in text, name
    assert "compare/1/quality" in names and "compare/1/quality_difference" not in names
    assert "compare/3/log_volume_p" in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, r: d.pop("models"), "cannot be read"),
        (lambda d, r: d["models"].pop("dqo"), "holds no model 'dqo'; it holds sft"),
        (lambda d, r: r.pop(), "holds responses of dqo to 19 prompts"),
        (lambda d, r: r.append(r[-1]), "holds responses of dqo to 21 prompts"),
        (lambda d, r: r[-1].update(id=r[-2]["id"]), "holds a prompt of dqo twice"),
        (lambda d, r: r[-1].pop("model"), "cannot be read"),
    ],
)
def test_an_evaluation_that_does_not_fit_is_refused(change, message):
    document, rows = evaluation({"sft": 0.0, "dqo": 0.3}, PROMPTS)
    change(document, rows)
    with pytest.raises(DQOError, match=message) as caught:
        evaluated(document, rows, "dqo", "given", "of the run x")
    assert str(caught.value).startswith("given: the evaluation of the run x")


# --- the page ---


def test_the_page_is_complete_in_itself_and_its_links_lead_somewhere(result):
    page = Page(comparison_report.render(result, [("A run", "http://host/#/x"), ("No", "javascript:alert(1)")]))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    inside = [href for href in page.attributes("href") if href.startswith("#")]
    assert {href[1:] for href in inside} <= set(ids) and len(inside) == 6
    assert [href for href in page.attributes("href") if not href.startswith("#")] == ["http://host/#/x"]
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1 and not {"link", "img", "iframe", "object", "base"} & set(tags)
    assert "url(" not in page.styles[0] and "@import" not in page.styles[0]
    for position in (1, 2):
        assert comparison.headline(result, position) in page.words
    # Without the script the search box, which needs it, stays hidden, and every prompt is there.
    (form,) = [attrs for tag, attrs in page.elements if tag == "form"]
    assert "hidden" in form
    assert tags.count("details") == result.prompts + 1


def test_hostile_text_is_only_ever_text():
    first, second = models({"sft": 0.0, "dqo": 0.3}, PROMPTS[:3])
    hostile = [
        replace(
            model,
            label=f"{model.label} {HOSTILE}",
            source=HOSTILE,
            rows=[row | {"prompt": HOSTILE, "responses": [HOSTILE] * 4} for row in model.rows],
        )
        for model in (first, second)
    ]
    page = Page(comparison_report.render(compare(hostile)))
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("script"), tags.count("img")) == (1, 0)
    assert "alert(" not in page.scripts[0]
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert page.text.count(HOSTILE) > 10


def test_models_with_one_key_get_looks_of_their_own():
    document, rows = evaluation({"dqo": 0.0}, PROMPTS[:5])
    many = [
        replace(evaluated(document, rows, "dqo", f"run {i}", "here"), label=f"run {i}", conditions=SAME)
        for i in range(8)
    ]
    result = compare(many)
    page = Page(comparison_report.render(result))
    assert all(f"--m{slot}:" in page.styles[0] for slot in range(8))
    found = comparison_report.results(result)
    assert len({model.name for model in measured(found, "quality")}) == 8
    alone = comparison_report.results(compare(models({"sft": 0.0, "dqo": 0.1})))
    assert [model.name for model in alone] == ["sft", "dqo"]


# --- figures ---


def test_the_figure_of_differences_draws_each_row_on_its_own_scale():
    named = [ModelResult(name, name.upper(), {}) for name in ("sft", "dqo", "base")]
    found = {"quality": [None, Interval(0.1, 0.05, 0.2), Interval(-0.4, -0.5, -0.3)],
             "vendi_score": [None, Interval(2.0, 1.0, 4.0), Interval(NAN, NAN, NAN)]}  # fmt: skip
    figure = differences_figure(named, found)
    figure.draw_without_rendering()
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["Vendi score", "Quality"]
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["DQO", "BASE"]
    drawn = {container[0].get_ydata()[0]: container[0].get_xdata()[0] for container in first.containers}
    assert drawn == {0: pytest.approx(0.5), 1: pytest.approx(0.2)}
    assert [container[0].get_ydata()[0] for container in second.containers] == [1]


def test_the_figure_of_win_rates_shows_every_pair():
    rate = Interval(0.25, 0.2, 0.3)
    figure = win_rates_figure(["a", "b"], [[None, rate], [Interval(0.75, 0.7, 0.8), None]])
    figure.draw_without_rendering()
    texts = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert texts == {(1, 0): "25%\n[20, 30]", (0, 1): "75%\n[70, 80]"}
