import base64
import hashlib
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from html_page import HOSTILE, Page

from dqo.evaluation import figures, report
from dqo.evaluation import page as page_parts
from dqo.evaluation.catalogue import METRICS
from dqo.evaluation.figures import Box, ModelResult
from dqo.evaluation.metrics import duplicate_rate
from dqo.evaluation.report import Example, Gate, Links, ReportData, Response, Said
from dqo.evaluation.statistics import Interval
from dqo.health import Finding as HealthFinding
from dqo.recipe import Recipe

NAN = math.nan


def interval(mean, half=0.05):
    return Interval(mean, mean - half, mean + half)


def result(name, label, volume, quality, **further):
    metrics = {metric: interval(0.5) for metric in METRICS}
    return ModelResult(name, label, {**metrics, "log_volume": volume, "quality": quality, **further})


def history(start, end):
    return [{"step": step, "quality": 0.5, "log_volume": start + (end - start) * step / 20} for step in range(1, 21)]


@pytest.fixture(scope="module")
def data() -> ReportData:
    responses = {
        name: [Response("A dog ran.", 0.9), Response("a  DOG ran.", 0.9), Response("Two cats slept.", None, True)]
        for name in ("base", "sft", "reward_only", "dqo")
    }
    return ReportData(
        recipe=Recipe(name="a-run"),
        models=[
            result("base", "Base", interval(4.3), interval(0.4)),
            result("sft", "SFT", interval(4.2), interval(0.5)),
            result("reward_only", "Reward-only RL", interval(2.8), interval(0.91)),
            result("dqo", "DQO-RL", interval(4.22), interval(0.9)),
        ],
        prompts=48,
        histories={
            "sft": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}],
            "reward_only": history(4.2, 2.5),
            "dqo": history(4.2, 4.1),
        },
        examples=[Example("Write about a dog.", responses, ("dog",))],
        data_card={"licence": "CC0-1.0", "rows": {"train": 302, "eval": 58}, "quarantined": {}},
        links=Links("dqo ui", "http://127.0.0.1:5000/#/experiments/1", "http://127.0.0.1:5000/#/experiments/1/runs/a"),
        environment={"torch": "2.13.0"},
        differences={metric: interval(0.1) for metric in METRICS},
    )


def with_pair(data, ours, theirs):
    """The same run with other (volume, quality) intervals of DQO and of reward-only RL."""
    models = [m for m in data.models if m.name not in ("dqo", "reward_only")]
    return replace(data, models=[*models, result("reward_only", "Rival", *theirs), result("dqo", "DQO", *ours)])


@pytest.fixture(scope="module")
def page(data):
    return Page(report.render(data))


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict", "sentence"),
    [
        (
            (4.22, 0.90), (2.80, 0.91), "holds",
            "DQO spans 1.42 nats more volume than Rival (intervals do not overlap) at a quality difference of "
            "\u22120.01.",
        ),
        (
            (4.22, 0.95), (2.80, 0.91), "holds",
            "DQO spans 1.42 nats more volume than Rival (intervals do not overlap) at a quality difference of +0.04.",
        ),
        (
            (4.22, 0.908), (2.80, 0.91), "holds",
            "DQO spans 1.42 nats more volume than Rival (intervals do not overlap) at a quality difference of 0.00.",
        ),
        (
            (4.22, 0.79), (2.80, 0.91), "quality loss",
            "DQO spans 1.42 nats more volume than Rival (intervals do not overlap), but loses 0.12 in quality, more "
            "than the 0.05 that the recipe allows.",
        ),
        (  # 0.05 would read as if it were allowed
            (4.22, 0.8590), (2.80, 0.9105), "quality loss",
            "DQO spans 1.42 nats more volume than Rival (intervals do not overlap), but loses 0.051 in quality, more "
            "than the 0.050 that the recipe allows.",
        ),
        (
            (2.87, 0.90), (2.80, 0.91), "not shown",
            "No difference in diversity is shown: DQO spans 0.07 nats more volume than Rival, but the intervals "
            "overlap; the quality difference is \u22120.01.",
        ),
        (
            (2.87, 0.80), (2.80, 0.91), "not shown",
            "No difference in diversity is shown: DQO spans 0.07 nats more volume than Rival, but the intervals "
            "overlap; the quality difference is \u22120.11, a loss of more than the 0.05 that the recipe allows.",
        ),
        (
            (2.80, 0.93), (3.10, 0.91), "opposite",
            "DQO spans 0.30 nats less volume than Rival (intervals do not overlap), at a quality difference of +0.02.",
        ),
    ],
)  # fmt: skip
def test_finding(data, ours, theirs, verdict, sentence):
    changed = with_pair(data, [interval(v) for v in ours], [interval(v) for v in theirs])
    assert report.find(changed) == report.Finding(verdict, sentence)
    assert sentence in Page(report.render(changed)).words


def test_a_real_but_allowed_loss_of_quality_is_said(data):
    pair = (interval(4.22), interval(0.865)), (interval(2.8), interval(0.913))
    for quality, verdict in ((Interval(-0.048, -0.08, -0.02), "holds at a price"), (interval(-0.048), "holds")):
        changed = replace(with_pair(data, *pair), differences={"quality": quality})
        assert report.find(changed).verdict == verdict
    changed = replace(changed, differences={"quality": Interval(-0.048, -0.08, -0.02)})
    assert (
        "DQO spans 1.42 nats more volume than Rival (intervals do not overlap) at the price of 0.048 in quality, "
        "within the 0.050 that the recipe allows."
    ) in Page(report.render(changed)).words


def test_a_paired_difference_does_not_overrule_overlapping_intervals(data):
    pair = (interval(2.87), interval(0.9)), (interval(2.8), interval(0.9))
    changed = replace(with_pair(data, *pair), differences={"log_volume": Interval(0.07, 0.02, 0.12)})
    page = Page(report.render(changed))
    assert report.find(changed).verdict == "not shown"
    assert "the difference is +0.07 [0.02, 0.12], which excludes zero: weaker evidence" in page.words


def test_measures_of_words_confirm_or_not(data):
    better, worse, same = interval(0.8), interval(0.2), interval(0.5)
    ours = {"distinct_1": better, "distinct_2": same, "distinct_4": worse, "self_bleu_diversity": better}
    models = [*data.models[:3], replace(data.model, metrics={**data.model.metrics, **ours})]
    changed = replace(data, models=models)
    assert report.agreement(changed) == (2, 5)
    assert (
        "Of 5 measures that look at words alone, and were not trained on, 2 also find"
        in Page(report.render(changed)).words
    )
    assert report.agreement(data) == (0, 5)
    absent = replace(models[3], metrics={**models[3].metrics, "distinct_1": Interval(NAN, NAN, NAN)})
    assert report.agreement(replace(data, models=[*data.models[:3], absent])) == (1, 4)


def test_finding_without_bounds_claims_no_difference(data):
    lone = Interval(4.2, NAN, NAN)
    found = report.find(with_pair(data, (lone, interval(0.9)), (interval(2.8), interval(0.9))))
    assert found.verdict == "not shown"
    assert "but an interval is missing" in found.sentence


def test_finding_without_measurement(data):
    absent = Interval(NAN, NAN, NAN)
    changed = with_pair(data, (interval(4.0), absent), (absent, interval(0.9)))
    assert report.find(changed) == report.Finding(
        "not measured",
        "This run allows no finding: the quality of DQO and the log-volume of Rival could not be measured.",
    )
    Page(report.render(changed))


def test_loss_of_exactly_what_is_allowed_holds(data):
    # In binary, 0.75 - 0.5 is exact.
    recipe = data.recipe.model_copy(update={"gate": data.recipe.gate.model_copy(update={"max_quality_loss": 0.25})})
    pair = (interval(4.2), interval(0.5)), (interval(2.8), interval(0.75))
    assert report.find(replace(with_pair(data, *pair), recipe=recipe)).verdict == "holds"


def test_the_finding_comes_first_and_the_sections_in_order(page):
    headings = [tag for tag, _ in page.elements if tag in ("h1", "section")]
    assert headings[0] == "h1"
    sections = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert sections == ["plane", "training", "metrics", "examples", "provenance", "mlflow", "reading"]


def test_ids_are_unique_and_links_inside_the_page_lead_somewhere(page):
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    targets = [h.removeprefix("#") for h in page.attributes("href") if h.startswith("#")] + page.attributes("for")
    assert len(targets) > 10
    assert set(targets) <= set(ids)


def test_hostile_text_is_only_ever_text(data):
    hostile = replace(
        data,
        models=[replace(model, label=f"{model.name} {HOSTILE}") for model in data.models],
        examples=[Example(HOSTILE, {"dqo": [Response(HOSTILE, 0.5)]}, (HOSTILE,)), Example(HOSTILE, {}, ())],
        data_card={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},
        links=Links(HOSTILE, "javascript:alert(4)", f"http://host/{HOSTILE}"),
        environment={HOSTILE: HOSTILE},
        gate=Gate(False, [HOSTILE]),
        judge=judge_part(reason=HOSTILE, complete=False, identity={**judge_part()["identity"], "model": HOSTILE}),
        said=[Said(HOSTILE, "A", (HOSTILE, "invalid"), (HOSTILE, HOSTILE))],
    )
    page = Page(report.render(hostile))
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("script"), tags.count("img"), tags.count("iframe")) == (1, 0, 0)
    assert "alert(" not in page.scripts[0]
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert not [value for value in page.attributes("href") if value.startswith("javascript")]
    # Label, prompt and response: as written, not cut or cleaned.
    assert page.text.count(HOSTILE) > 10


@pytest.mark.parametrize("text", ["\ud800 lone surrogate", "\0 NUL", "\u202e right to left", "&lt;b&gt; &amp;"])
def test_odd_characters_do_not_break_the_file(data, text, tmp_path):
    report.write(replace(data, examples=[Example("p", {"dqo": [Response(text, 0.5)]})]), tmp_path / "report.html")
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\0" not in written
    assert text[1:] in Page(written).text


def test_nothing_is_loaded_from_elsewhere(page):
    loading = {"src", "srcset", "data", "poster", "background", "xlink:href", "action", "formaction", "ping"}
    assert not loading & {name for _, attrs in page.elements for name in attrs}
    for tag, attrs in page.elements:
        assert tag not in ("link", "base", "object", "embed", "iframe", "image", "use")
        if "href" in attrs:
            assert tag == "a"
            assert attrs["href"].startswith(("#", "http://127.0.0.1:5000/"))
    assert "url(" not in page.styles[0]
    assert "@import" not in page.styles[0]
    assert not any("url(" in style for style in page.attributes("style"))


def test_policy_allows_only_the_page_s_own_script(page):
    (policy,) = (attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy")
    allowed = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    directives = dict(directive.strip().split(" ", 1) for directive in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == f"'sha256-{allowed}'"


def test_missing_metrics_are_shown_as_missing(data):
    absent = Interval(NAN, NAN, NAN)
    models = [replace(data.models[0], metrics={"quality": absent, "log_volume": interval(4.0)}), *data.models[1:]]
    page = Page(report.render(replace(data, models=models)))
    # Of base, only the log-volume is left in the table, and none of the five planes can place it.
    notes = page.words.count("Not shown, because it was not measured: Base.")
    assert notes == 5
    assert page.words.count("not measured") - notes == len(METRICS) - 1
    assert "nan" not in page.text


def test_repeats_are_marked_as_the_metric_counts_them(data, page):
    texts = [response.text for response in data.examples[0].responses["dqo"]]
    repeats = round(duplicate_rate([texts])[0] * len(texts))
    assert repeats == 1
    # One in each of four models, and one in the legend.
    assert page.words.count("repeats 1") == 4 * repeats + 1
    assert page.words.count(f"{len(texts) - repeats} of {len(texts)}") == 4
    assert page.words.count("cut at the token limit") == 4


def ranks(metric, *intervals):
    models = [ModelResult(str(i), str(i), {metric: value}) for i, value in enumerate(intervals)]
    return [cell.rank for cell in page_parts.cells(models, metric)]


def test_best_value_is_marked():
    values = [interval(0.2), interval(0.5), interval(0.58)]
    assert ranks("quality", *values) == ["", "not told apart", "best"]
    assert ranks("duplicate_rate", *values) == ["best", "", ""]
    assert ranks("mean_tokens", *values) == ["", "", ""]
    assert ranks("quality", values[0], values[2], values[2]) == ["", "best", "best"]
    assert ranks("quality", values[0], values[0]) == ["", ""]
    assert ranks("quality", values[0], Interval(NAN, NAN, NAN)) == ["", ""]


def test_bars_of_a_row_share_its_scale():
    models = [
        ModelResult("a", "a", {"quality": Interval(2.0, 1.0, 4.0)}),
        ModelResult("b", "b", {"quality": Interval(5.0, 4.5, 6.0)}),
    ]
    bars = [(cell.start, cell.width, cell.point) for cell in page_parts.cells(models, "quality")]
    assert bars == [pytest.approx((0, 60, 20)), pytest.approx((70, 30, 80))]


@pytest.mark.parametrize(
    ("value", "plain", "sign"),
    [(1.416, "1.42", "+1.42"), (-0.014, "\u22120.01", "\u22120.01"), (-0.001, "0.00", "0.00"), (NAN, "n/a", "n/a"),
     (256.4, "256", "+256")],
)  # fmt: skip
def test_numbers(value, plain, sign):
    assert (page_parts.number(value), page_parts.signed(value)) == (plain, sign)


def test_data_card_is_readable(page):
    assert "train 302, eval 58" in page.words
    assert "quarantined none" in page.words


def test_gate(data):
    assert "decided after this report" in Page(report.render(data)).words
    page = Page(report.render(replace(data, gate=Gate(False, ["because of this"]))))
    assert "Not passed. because of this" in page.words


def judge_part(**changed):
    """The part of evaluation.json: sft could not be controlled for length, the rival has a score alone."""
    verdicts = {
        "win_rate": {"mean": 0.625, "low": 0.51, "high": 0.74}, "length_effect": 0.3, "not_length_controlled": "",
        "length_controlled": {"mean": 0.575, "low": 0.46, "high": 0.69}, "tie_rate": 0.25, "flip_rate": 0.125,
        "first_position_rate": 0.5, "longer_win_rate": None, "pairs": 96, "invalid": 3, "missing": 2,
    }  # fmt: skip
    longer = {"length_controlled": None, "not_length_controlled": "every response is longer by 7"}
    part = {
        "complete": True, "reason": None, "requests": 432, "against": "reward_only", "responses": 2,
        "identity": {"kind": "pairwise", "model": "a-judge", "prompt": "pairwise", "prompt_version": 1,
                     "prompt_digest": "abc123"},
        "audit": {"passed": True, "reasons": ["kappa: 0.91, as demanded"], "faults": [],
                  "labelled": {"name": "shipped", "digest": "def456", "pairs": 60}},
        "models": {"sft": verdicts | longer, "dqo": verdicts},
        "scores": {},
    }  # fmt: skip
    return part | changed


def test_judge(data):
    """The judge's section: rates with intervals, what could not be told and why, the audit, its words."""
    assert "What the judge says" not in Page(report.render(data)).words
    said = [Said("Write about a dog.", "B", ("B", "tie"), ("the second is shorter", "both are fine"))]
    page = Page(report.render(replace(data, judge=judge_part(), said=said)))
    words = page.words.split("What the judge says", 1)[1].split("Responses side by side")[0]
    assert "a-judge compared the first 2 responses" in words and "in both orders" in words
    assert "It has passed its audit on 60 pairs" in words and "kappa: 0.91, as demanded" in words
    assert "0.62 [0.51, 0.74]" in words and "0.57 [0.46, 0.69]" in words
    assert "cannot be told: every response is longer by 7" in words
    assert "3 of 96" in words and "2 of 96" in words and "0.25" in words
    assert "pairwise, version 1 (abc123)" in words and "432 requests" in words
    assert "Reward-only RL first order (Reward-only RL): the second is shorter" in words
    assert "second order (tie): both are fine" in words
    assert "#judge" in page.attributes("href") and "is not done" not in page.words


def test_a_judge_that_is_not_done_or_has_failed_is_said_in_front(data):
    down = judge_part(complete=False, reason="the judge at h is down")
    assert (
        "The judge is not done, so the gate refuses: the judge at h is down."
        in (Page(report.render(replace(data, judge=down))).words.split("Quality and diversity", 1)[0])
    )
    failed = judge_part(audit=judge_part()["audit"] | {"passed": False})
    page = Page(report.render(replace(data, judge=failed))).words
    assert "It has not passed its audit, so its verdicts must not decide about a model" in page


def test_scores_of_a_judge_are_shown_for_the_rival_too(data):
    scores = {
        name: {"score": {"mean": mean, "low": None, "high": None}}
        for name, mean in (("reward_only", 3.25), ("dqo", 4.5))
    }
    page = Page(report.render(replace(data, judge=judge_part(scores=scores)))).words.split("What the judge says", 1)[1]
    assert "by scores" not in page and "3.25 no interval" in page and "4.50 no interval" in page


def test_the_rules_of_the_gate_are_those_of_the_recipe(data):
    words = Page(report.render(data)).words
    assert (
        "lose at most 0.05 in quality; be more diverse, without overlap of the intervals, on all of: Log-volume"
        in words
    )
    gate = data.recipe.gate.model_copy(update={"quality_test": "non_inferior", "max_length_change": 0.2})
    changed = replace(data, recipe=data.recipe.model_copy(update={"gate": gate}))
    words = Page(report.render(changed)).words
    assert "with the whole interval of the paired difference" in words and "change its length by at most 20%" in words


def test_health(data):
    """What the rules found stands with the training; a stop stands in front, and in the lineage."""
    warned = HealthFinding("truncation", "warn", 9, 5, 0.6, 0.5, "above")
    stopped = HealthFinding("entropy", "stop", 12, 8, 0.01, 0.05, "below")
    later = HealthFinding("kl", "stop", 12, 8, 2.0, 1.0, "above")
    silent = Page(report.render(replace(data, health={"reward_only": [], "dqo": []}))).words
    assert "Health" in silent and "was stopped" not in silent and "20 steps on quality + 1" in silent
    page = Page(report.render(replace(data, health={"reward_only": [warned], "dqo": [stopped, later]}))).words
    before, after = page.split("Quality and diversity", 1)
    assert f"Training of DQO-RL was stopped at step 12 of 20 by a health rule. {stopped.reason}." in before
    assert warned.reason not in before
    assert f"Reward-only RL : warning, {warned.reason}" in after or f"Reward-only RL: warning, {warned.reason}" in after
    assert "12 of 20 steps on quality + 1" in after and " 20 steps on quality alone" in after


def test_report_without_curves_examples_and_differences(data):
    page = Page(report.render(replace(data, histories={}, examples=[], differences={}, links=Links(), data_card={})))
    assert "No learning curves" in page.words
    assert "No responses were kept." in page.words
    assert "Paired difference" not in page.words


def test_curves_tolerate_missing_steps_and_flat_lines(data):
    rows = [{"step": 1, "quality": NAN}, {"step": 2, "quality": 0.5, "learning_rate": 2e-4}, {"step": 3}]
    page = Page(report.render(replace(data, histories={"dqo": rows})))
    assert "nan" not in " ".join(page.attributes("d"))
    assert any(
        label.startswith("Quality (reward) by training step: DQO-RL from 0.5")
        for label in page.attributes("aria-label")
    )


def test_models_must_hold_what_is_compared(data):
    with pytest.raises(ValueError, match=r"models must hold \['reward_only'\].*\['base', 'sft', 'dqo'\]"):
        replace(data, models=[model for model in data.models if model.name != "reward_only"])


def test_examples_are_the_first_by_id():
    rows = [
        {"id": key, "prompt": f"p{key}", "model": model, "responses": [f"{model} {key}"], "qualities": [None],
         "truncated": [True]}
        for model in ("base", "dqo") for key in ("c", "a", "b")
    ]  # fmt: skip
    found = report.first_examples(rows, {"a": ["dog"]}, count=2)
    assert [(one.prompt, one.concepts) for one in found] == [("pa", ["dog"]), ("pb", ())]
    assert found[0].responses == {
        "base": [Response("base a", None, True)], "dqo": [Response("dqo a", None, True)]
    }  # fmt: skip


def test_write_leaves_only_the_report(data, tmp_path):
    report.write(data, tmp_path / "deep" / "report.html")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]
    assert (tmp_path / "deep" / "report.html").read_text(encoding="utf-8") == report.render(data)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("name", ["base", "sft", "reward_only", "dqo", "unknown_1", "unknown_2"])
def test_colours_are_readable_as_text_on_the_page_s_cards(name):
    # WCAG 2.2, 1.4.3: 4.5 to 1.
    style = figures.styles(["unknown_1", "unknown_2", name])[name]
    css = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
    for colour, card in ((style.light, "#ffffff"), (style.dark, "#1a1d23")):
        assert f"--card: {card}" in css
        lighter, darker = sorted((luminance(colour), luminance(card)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_every_model_has_its_own_colour_and_marker():
    found = figures.styles(["base", "sft", "reward_only", "dqo", "x", "y"]).values()
    assert len({style.light for style in found}) == len({style.dark for style in found}) == 6
    assert len({style.marker for style in found}) == 6


@pytest.mark.parametrize(("groups", "n"), [(1, 8), (2, 8), (4, 8), (8, 8), (3, 6)])
def test_volume_of_equal_groups_is_that_of_their_gram_matrix(groups, n):
    vectors = np.eye(groups)[np.arange(n) % groups]
    expected = np.linalg.slogdet(vectors @ vectors.T + np.eye(n)).logabsdet
    assert figures.volume_of(groups, n) == pytest.approx(expected)
    assert figures.unrelated_responses(expected, n) == pytest.approx(groups, abs=1e-6)


def test_unrelated_responses_stay_within_the_group():
    assert figures.unrelated_responses(0.0, 8) == pytest.approx(1)
    assert figures.unrelated_responses(99.0, 8) == pytest.approx(8)


def test_smoothing_averages_an_eighth_of_the_curve():
    values = np.arange(48.0) ** 2
    smoothed = figures.smooth(values)
    assert smoothed[10] == values[7:14].mean()
    assert smoothed[0] == values[:4].mean()
    assert figures.smooth(values[:8]).tolist() == values[:8].tolist()


def overlapping(boxes):
    return [(a, b) for a, b in combinations(boxes, 2) if a.shared_area(b) > 0]


def test_labels_of_crowded_points_do_not_overlap():
    frame = Box(0, 0, 700, 400)
    anchors = [(300.0, 200.0), (304.0, 206.0), (310.0, 198.0), (296.0, 190.0), (690.0, 5.0)]
    marks = [Box(x - 8, y - 8, x + 8, y + 8) for x, y in anchors]
    labels = figures.place_labels(anchors, [(120.0, 16.0)] * 5, marks, frame)
    assert not overlapping(labels)
    assert all(label.shared_area(mark) == 0 for label in labels for mark in marks)
    assert all(label.shared_area(frame) == pytest.approx(120 * 16) for label in labels)


def test_no_label_is_nearer_to_another_point_than_to_its_own():
    """Two points in a row: to the right of the left one, where labels go first, is beside the right one."""
    frame = Box(0, 0, 700, 400)
    anchors = [(300.0, 200.0), (345.0, 200.0)]
    marks = [Box(x - 8, y - 8, x + 8, y + 8) for x, y in anchors]
    labels = figures.place_labels(anchors, [(30.0, 10.0)] * 2, marks, frame)
    for i, label in enumerate(labels):
        sides = [np.linspace(label.x0, label.x1, 121), np.linspace(label.y0, label.y1, 41)]
        points = np.stack(np.meshgrid(*sides), axis=-1)
        own, other = (np.linalg.norm(points - anchor, axis=-1).min() for anchor in (anchors[i], anchors[1 - i]))
        assert own < other


def test_a_label_far_from_its_point_is_joined_with_it():
    crowd = [result(f"m{i}", f"A model with a long name {i}", interval(4 + i / 50), interval(0.5)) for i in range(6)]
    figure = figures.plane_figure(crowd)
    figure.draw_without_rendering()
    axes, inch = figure.axes[0], figure.dpi
    leaders = [np.array(artist.get_xydata()) * inch for artist in figure.artists]
    for model, text in zip(crowd, axes.texts, strict=True):
        mark = axes.transData.transform((model.metrics["log_volume"].mean, model.metrics["quality"].mean))
        gap = Box(*text.get_window_extent().extents).distance(tuple(mark)) / inch * 72
        joined = any(np.allclose(ends[0], mark, atol=1) for ends in leaders)
        assert joined == (gap > 18) or abs(gap - 18) < 2
    assert 0 < len(leaders) < len(crowd)


def test_many_lines_are_named_beside_the_panels_once(data):
    few = figures.learning_curves_figure({name: history(4.2, 4.1) for name in "abc"})
    many = figures.learning_curves_figure({name: history(4.2, 4.1) for name in "abcdefgh"})
    assert [axes.get_legend() is not None for axes in few.axes] == [True, True] and not few.legends
    assert [axes.get_legend() is not None for axes in many.axes] == [False, False]
    (legend,) = many.legends
    assert [text.get_text() for text in legend.get_texts()] == list("abcdefgh")
    many.draw_without_rendering()
    beside = legend.get_window_extent().x0
    assert all(axes.get_window_extent().x1 < beside for axes in many.axes)


@pytest.mark.parametrize("n", [None, 8])
def test_plane_figure_labels_every_measured_model(data, n):
    near = result("near", "A model quite near", interval(4.21), interval(0.89))
    absent = result("absent", "Absent", Interval(NAN, NAN, NAN), interval(0.5))
    figure = figures.plane_figure([*data.models, near, absent], n=n)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    texts = {text.get_text(): text for text in axes.texts}
    assert set(texts) == {"Base", "SFT", "Reward-only RL", "DQO-RL", "A model quite near"}
    assert not overlapping([Box(*text.get_window_extent().extents) for text in texts.values()])
    if n:
        low, high = axes.get_xlim()
        assert low < math.log(9)
        assert high > 8 * math.log(2)


def test_plane_figure_joins_the_models_of_a_series_in_their_order():
    points = {"a": [(3.0, 0.9), (4.0, 0.8), (3.5, 0.5)], "b": [(2.0, 0.4), (2.5, 0.3)]}
    models = [
        ModelResult(
            f"{series} {i}", f"{series} {i}", {"log_volume": interval(x), "quality": interval(y)}, series=series
        )
        for series, path in points.items()
        for i, (x, y) in enumerate(path)
    ]
    alone = result("alone", "Alone", interval(1.0), interval(0.1))
    axes = figures.plane_figure([alone, *models]).axes[0]
    lines = [line for line in axes.lines if len(line.get_xydata()) > 1]
    assert [line.get_xydata().tolist() for line in lines] == [[list(p) for p in path] for path in points.values()]
    # One colour a series, on its line and its labels.
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    for line, series in zip(lines, points, strict=True):
        assert {colours[model.label] for model in models if model.series == series} == {line.get_color()}
    assert len(set(colours.values())) == 3


def test_learning_curves_figure_draws_the_values(data):
    figure = figures.learning_curves_figure({"reward_only": data.histories["reward_only"], "dqo": history(4.2, 4.1)})
    volume = figure.axes[1]
    drawn = volume.lines[0].get_xydata()
    assert drawn[-1].tolist() == pytest.approx([20, 2.5])
    assert [text.get_text() for text in volume.get_legend().get_texts()] == ["Reward-only RL", "DQO-RL"]


def test_the_report_names_the_score_that_was_weighed(data):
    def shown(changes: dict) -> str:
        method = data.recipe.method.model_copy(update=changes)
        return report.render(replace(data, recipe=data.recipe.model_copy(update={"method": method})))

    own = shown({"alpha": 1.5})
    assert " steps on quality + 1.5 \u00d7 log-volume" in own and "is what DQO optimises; Vendi score" in own
    other = shown({"alpha": 0.25, "score": "vendi"})
    assert " steps on quality + 0.25 \u00d7 Vendi score" in other and "is what DQO optimises; Vendi score" not in other
