"""The audit of judges: its measures against closed forms, a second library and enumeration, its verdict end to end."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judge_server import JudgeServer, Reply, completion, fenced, serving, verdict
from sklearn.metrics import cohen_kappa_score
from tiny import write_reward_model

from dqo.errors import DQOError
from dqo.judges import ByScore, Comparison, RewardJudge, build
from dqo.judges.agreement import kappa
from dqo.judges.audit import Audit, Measures, audit, decide, measure, require
from dqo.judges.labelled import LabelledPair, LabelledSet, read_labelled
from dqo.judges.prompt import load_prompt
from dqo.recipe import JudgeAudit, load_judge
from pipelines.cli import _parser

ROOT = Path(__file__).parents[2]
SHIPPED = read_labelled()
DEMANDS = JudgeAudit()


def plain(text: str) -> str:
    return text.replace("&lt;", "<").replace("&#91;", "[")


# What the labels say of every question in both orders, by the fenced texts.
ORACLE = {
    (plain(one.prompt), plain(x), plain(y)): label
    for one in SHIPPED.pairs
    for x, y, label in (
        (one.a, one.b, one.label),
        (one.b, one.a, {"A": "B", "B": "A", "tie": "tie"}[one.label]),
    )
}


def honest(_: int, body: dict[str, Any]) -> Reply:
    """Looks at nothing but what stands between the fences, and knows the labels."""
    blocks = {tag: plain(text) for tag, text in fenced(body).items()}
    return verdict(ORACLE[blocks["question"], blocks["response-a"], blocks["response-b"]])


def audited(server: JudgeServer, folder: Path, labelled: LabelledSet = SHIPPED, **fields: Any) -> Audit:
    return audit(build(server.settings(folder, **fields)), labelled, DEMANDS)


# --- kappa ---


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_sklearns(seed: int):
    draw = random.Random(seed)
    labels = draw.choices(["A", "B", "tie"], k=40)
    verdicts = [one if draw.random() < 0.6 else draw.choice(["A", "B", "tie"]) for one in labels]
    found = kappa(labels, verdicts, range(40), 500, 0.95, 0)
    assert found.mean == pytest.approx(cohen_kappa_score(labels, verdicts), abs=1e-12)
    assert found.low < found.mean < found.high


def test_kappa_where_it_is_known():
    assert kappa(["A", "B"], ["A", "B"], range(2), 100, 0.95, 0).mean == 1.0
    assert kappa(["A", "B"], ["B", "A"], range(2), 100, 0.95, 0).mean == -1.0
    # p_o = 0.7; margins 0.5/0.5 and 0.6/0.4 give p_e = 0.5.
    labels, verdicts = ["A"] * 25 + ["B"] * 25, ["A"] * 20 + ["B"] * 5 + ["A"] * 10 + ["B"] * 15
    assert kappa(labels, verdicts, range(50), 100, 0.95, 0).mean == pytest.approx((0.7 - 0.5) / 0.5)
    # All verdicts of one class: as good as chance. Both of one class: not defined.
    assert kappa(["A", "B", "A"], ["tie"] * 3, range(3), 100, 0.95, 0).mean == pytest.approx(0.0)
    assert math.isnan(kappa(["A"] * 3, ["A"] * 3, range(3), 100, 0.95, 0).mean)
    assert math.isnan(kappa([], [], [], 100, 0.95, 0).mean)
    with pytest.raises(ValueError):
        kappa(["A"], ["A", "B"], range(2), 100, 0.95, 0)


def asymptotic_deviation(labels: list[str], verdicts: list[str]) -> float:
    """Standard error of kappa for independent cases (Fleiss, Cohen and Everitt, 1969, eq. 13)."""
    classes = sorted({*labels, *verdicts})
    p = np.zeros((len(classes), len(classes)))
    for label, found in zip(labels, verdicts, strict=True):
        p[classes.index(label), classes.index(found)] += 1 / len(labels)
    rows, columns = p.sum(1), p.sum(0)
    observed, expected = np.trace(p), float(rows @ columns)
    value = (observed - expected) / (1 - expected)
    total = sum(p[i, i] * (1 - (rows[i] + columns[i]) * (1 - value)) ** 2 for i in range(len(classes)))
    total += (1 - value) ** 2 * sum(
        p[i, j] * (columns[i] + rows[j]) ** 2 for i in range(len(classes)) for j in range(len(classes)) if i != j
    )
    total -= (value - expected * (1 - value)) ** 2
    return float(np.sqrt(total / len(labels)) / (1 - expected))


def test_the_interval_of_kappa_is_the_asymptotic_one_where_cases_are_independent():
    draw = random.Random(3)
    labels = draw.choices(["A", "B", "tie"], weights=[4, 4, 2], k=1500)
    verdicts = [one if draw.random() < 0.5 else draw.choice(["A", "B", "tie"]) for one in labels]
    found = kappa(labels, verdicts, range(1500), 4000, 0.95, 0)
    expected = 2 * 1.959964 * asymptotic_deviation(labels, verdicts)
    assert found.high - found.low == pytest.approx(expected, rel=0.06)


def test_twins_add_nothing_to_what_is_known():
    """The interval of a set in which every pair stands twice is that of the set, not a narrower one."""
    draw = random.Random(4)
    labels = draw.choices(["A", "B", "tie"], k=200)
    verdicts = [one if draw.random() < 0.5 else draw.choice(["A", "B", "tie"]) for one in labels]
    once = kappa(labels, verdicts, range(200), 2000, 0.95, 0)
    twice = kappa(labels * 2, verdicts * 2, [*range(200)] * 2, 2000, 0.95, 0)
    assert asdict(twice) == pytest.approx(asdict(once))


# --- measures, by hand ---


def labelled(label: str, a: str = "x", b: str = "x", kind: str = "plain", name: str = "") -> LabelledPair:
    return LabelledPair(name or f"{label}{a}{b}{kind}", "q", a, b, label, kind)


def rounds(*orders: tuple[Any, Any], again: list[tuple[Any, Any]] | None = None) -> list[list[Comparison]]:
    return [[Comparison(one) for one in orders], [Comparison(one) for one in again or orders]]


def test_the_share_of_the_first_place_counts_winners_only():
    given = [labelled("A"), labelled("B"), labelled("A"), labelled("A")]
    # Shown first and winning: A in the first order, B in the second. 1 of 2, 1 of 2, 2 of 2, 0 of 0.
    found = measure(given, rounds(("A", "A"), ("B", "B"), ("A", "B"), ("tie", "invalid")))
    assert found.first_position_rate == pytest.approx(4 / 6)
    assert found.flip_rate == pytest.approx(1 / 3)  # the pair with an unreadable answer tells nothing
    assert measure(given[:1], rounds(("tie", "tie"))).first_position_rate is None


def test_verbosity_counts_the_pairs_where_the_longer_response_is_not_the_better():
    short, long = "x" * 10, "x" * 12
    given = [
        labelled("A", short, long),  # the longer one is B, which is worse
        labelled("B", long, short),  # A
        labelled("tie", short, long),
        labelled("B", short, long),  # the longer one is better: not counted
        labelled("A", short, short + "x"),  # of about one length: not counted
        labelled("A", short, long, kind="injection"),  # longer by what it says to the judge: not counted
        labelled("A", short, long, name="u"),
    ]
    found = measure(given, rounds(*[("B", "B")] * 6, ("invalid", "invalid")))
    assert found.verbosity_bias == pytest.approx(4 / 6)
    found = measure(given, rounds(("B", "A"), *[("tie", "tie")] * 5, ("B", "invalid")))
    assert found.verbosity_bias == pytest.approx(2 / 7)  # in one order each
    assert found.judged == 6
    assert measure(given[3:5], rounds(("B", "B"), ("B", "B"))).verbosity_bias is None


def test_injection_counts_the_answers_for_the_worse_response_in_either_order():
    given = [labelled("A", kind="injection", name=str(i)) for i in range(4)] + [labelled("A")]
    found = measure(given, rounds(("B", "B"), ("A", "B"), ("A", "A"), ("invalid", "B"), ("B", "B")))
    # B of B B, A B, A A and the one that can be read of the last; the plain pair is another fault.
    assert found.injection_rate == pytest.approx(4 / 7)


def test_consistency_invalid_and_missing_answers_are_counted_one_by_one():
    given = [labelled("A", name=str(i)) for i in range(3)]
    found = measure(
        given,
        rounds(("A", "A"), ("A", "invalid"), ("missing", "B"), again=[("A", "B"), ("A", "invalid"), ("B", "tie")]),
    )
    assert found.repeat_consistency == pytest.approx(3 / 5)  # one of the six was not answered
    assert found.invalid_rate == pytest.approx(2 / 11)
    assert (found.missing, found.judged) == (1, 1)


GOOD = Measures(0.8, 0.7, 0.9, 0.55, 0.1, 0.1, 0.0, 0.95, 0.01, 0, 60)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kappa": 0.59}, "agreement with the labels"),
        ({"kappa": None}, "agreement with the labels"),
        ({"first_position_rate": 0.66}, "the response shown first"),
        ({"first_position_rate": 0.34}, "the response shown first"),
        ({"first_position_rate": None}, "the response shown first"),
        ({"verbosity_bias": 0.26}, "the longer response"),
        ({"verbosity_bias": None}, "the longer response"),
        ({"injection_rate": 0.11}, "tell the judge what to say"),
        ({"injection_rate": None}, "tell the judge what to say"),
        ({"repeat_consistency": 0.89}, "stay the same"),
        ({"invalid_rate": 0.06}, "cannot be read"),
        ({"missing": 1}, "incomplete: 1 answers are missing"),
    ],
)
def test_every_demand_can_fail_and_says_so(change: dict[str, Any], word: str):
    passed, reasons = decide(GOOD, DEMANDS, 60)
    assert passed and len(reasons) == 6 and not any("not" in reason.split(":")[1] for reason in reasons)
    passed, reasons = decide(replace(GOOD, **change), DEMANDS, 60)
    assert not passed
    failed = [
        one for one in reasons if ", not as demanded" in one or "not shown" in one or one.startswith("incomplete")
    ]
    assert len(failed) == 1 and word in failed[0]


def test_limits_themselves_are_met_and_null_demands_nothing():
    at_limits = replace(
        GOOD,
        kappa=0.6,
        first_position_rate=0.65,
        verbosity_bias=0.25,
        injection_rate=0.1,
        repeat_consistency=0.9,
        invalid_rate=0.05,
    )
    assert decide(at_limits, DEMANDS, 60)[0]
    without = JudgeAudit(max_injection_rate=None, max_verbosity_bias=None)
    passed, reasons = decide(replace(GOOD, injection_rate=None, verbosity_bias=0.9), without, 60)
    assert passed and len(reasons) == 4


# --- the shipped pairs ---


def test_the_shipped_pairs_are_what_the_documentation_says():
    found = SHIPPED.pairs
    assert len(found) == 62
    assert all(one.longer not in (None, one.label) for one in found if one.kind == "longer")
    assert {one.kind for one in found} == {"plain", "longer", "tie", "injection"}
    assert min(sum(one.kind == kind for one in found) for kind in ("plain", "longer", "tie", "injection")) >= 10
    assert sum(one.twin_of is not None for one in found) == 12
    assert abs(sum(one.label == "A" for one in found) - sum(one.label == "B" for one in found)) <= 3
    assert len({(one.prompt, one.a, one.b) for one in found}) == 62


ROW = {"id": "1", "prompt": "q", "a": "x", "b": "y", "label": "A"}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "holds no pair"),
        (["{"], "line 1: not JSON"),
        ([[1]], "line 1: expected an object, got list"),
        ([ROW, {**ROW, "id": "2", "label": "C"}], "line 2: label: got 'C'; expected A, B or tie"),
        ([{**ROW, "a": None}], "line 1: a: got None"),
        ([{**ROW, "prompt": " "}], "line 1: prompt: got ' '"),
        ([{**ROW, "winner": "A"}], "line 1: unknown field 'winner'"),
        ([{**ROW, "kind": "odd"}], "line 1: kind: got 'odd'"),
        ([{**ROW, "kind": "injection", "label": "tie"}], "line 1: label: got 'tie'; expected A or B"),
        ([ROW, ROW], "line 2: id: '1' stands twice"),
        ([{**ROW, "twin_of": "7"}], "line 1: twin_of: got '7'"),
        ([ROW, {**ROW, "id": "2", "twin_of": "1"}], "line 2: twin_of: '1' has other texts"),
        ([ROW, {**ROW, "id": "2", "a": "y", "b": "x", "twin_of": "1"}], "line 2: label: got 'A'; expected 'B'"),
    ],
)
def test_labelled_pairs_are_checked_line_by_line(rows: list[Any], problem: str, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    with pytest.raises(DQOError) as caught:
        read_labelled(path)
    assert f"{path}: 1 error" in str(caught.value) and problem in str(caught.value)


def test_a_set_of_ones_own_is_read(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    twin = {"id": "2", "prompt": "q", "a": "y", "b": "x", "label": "B", "twin_of": "1"}
    path.write_text(json.dumps(ROW) + "\n\n" + json.dumps(twin) + "\n")
    found = read_labelled(path)
    assert [one.label for one in found.pairs] == ["A", "B"] and found.name == "pairs.jsonl"
    assert found.digest != SHIPPED.digest


# --- judges of known character ---


def test_an_honest_judge_passes(tmp_path: Path):
    with serving(honest) as server:
        found = audited(server, tmp_path)
        # 50 different pairs in two orders, twice; the 12 twins ask what their pairs have asked.
        assert (server.count, found.requests) == (50 * 2 * 2, 50 * 2 * 2)
        again = audited(server, tmp_path)
        assert (server.count, again.requests) == (50 * 2 * 2, 0)
    assert found.passed, found.reasons
    assert asdict(found.measures) == asdict(Measures(1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0, 1.0, 0.0, missing=0, judged=62))
    assert found.agreement == {"plain": (18, 18), "longer": (14, 14), "tie": (13, 13), "injection": (17, 17)}
    assert again.measures == found.measures


def longest(_: int, body: dict[str, Any]) -> Reply:
    a, b = (len(fenced(body)[tag]) for tag in ("response-a", "response-b"))
    return verdict("A" if a > b else "B" if b > a else "tie")


def gullible_in_one_order(number: int, body: dict[str, Any]) -> Reply:
    """Honest, but does as it is told in one of the two orders, now the first and now the second."""
    return gullible(number, body, "AB"[len(fenced(body)["question"]) % 2])


def gullible(number: int, body: dict[str, Any], places: str = "AB") -> Reply:
    """Honest, but does as it is told wherever a response is of the kind that tells."""
    blocks = {tag: plain(text) for tag, text in fenced(body).items()}
    told = {
        plain(x) for one in SHIPPED.pairs if one.kind == "injection" for x in (one.b if one.label == "A" else one.a,)
    }
    for letter in places:
        if blocks[f"response-{letter.lower()}"] in told:
            return verdict(letter)
    return honest(number, body)


def moody(number: int, body: dict[str, Any]) -> Reply:
    """Honest in the first round, and in the second round in three of four."""
    return verdict("tie") if number >= 100 and number % 4 == 0 else honest(number, body)


def mumbling(number: int, body: dict[str, Any]) -> Reply:
    return completion("Both have merits.") if "capital" in fenced(body)["question"] else honest(number, body)


CHARACTERS = {
    "first": (lambda *_: verdict("A"), ["agreement with", "response shown first"]),
    "second": (lambda *_: verdict("B"), ["agreement with", "response shown first"]),
    "undecided": (lambda *_: verdict("tie"), ["agreement with", "response shown first"]),
    "long": (longest, ["agreement with", "longer response"]),
    "gullible": (gullible, ["tell the judge what to say"]),
    "gullible in one order": (gullible_in_one_order, ["tell the judge what to say"]),
    "moody": (moody, ["stay the same"]),
    "mumbling": (mumbling, ["cannot be read"]),
    "mute": (lambda *_: completion("?"), ["agreement with", "first", "longer", "tell the judge", "cannot be read"]),
}


@pytest.mark.parametrize("name", CHARACTERS)
def test_a_judge_of_bad_character_fails_for_its_fault(name: str, tmp_path: Path):
    script, faults = CHARACTERS[name]
    with serving(script) as server:
        found = audited(server, tmp_path)
    assert not found.passed
    failed = [one for one in found.reasons if ", not as demanded" in one or "not shown" in one]
    for fault in faults:
        assert any(fault in one for one in failed), (fault, found.reasons)
    if name in ("first", "second"):
        assert {pair["verdict"] for pair in found.pairs} == {"tie"}
        assert found.measures.first_position_rate == (1.0 if name == "first" else 0.0)
        assert (found.measures.kappa, found.measures.flip_rate) == (0.0, 1.0)
    if name == "gullible in one order":  # no pair is won by being told so
        assert not any(pair["verdict"] not in ("tie", pair["label"]) for pair in found.pairs)
        assert found.measures.injection_rate == pytest.approx(0.5)
    if name in ("gullible", "gullible in one order", "moody"):
        assert len([one for one in failed if "agreement" not in one]) == 1


def test_a_judge_that_goes_away_gives_an_incomplete_audit_that_is_continued(tmp_path: Path):
    with serving(honest) as server:
        part = audited(server, tmp_path, max_requests=50)
        assert not part.passed and server.count == 50
        assert part.measures.missing > 0 and part.reasons[0].startswith("incomplete: ")
        assert "the budget of 50 requests" in part.problems[0]
        whole = audited(server, tmp_path)
        assert whole.passed and server.count == 50 * 2 * 2


def test_a_reward_can_be_audited(tmp_path: Path):
    class Length:
        name = "length"

        def __call__(self, responses: Any, rows: Any) -> list[float | None]:
            return [float(len(text)) for text in responses]

    found = audit(ByScore(RewardJudge(Length())), SHIPPED, DEMANDS)
    assert not found.passed and found.requests is None
    # Of the pairs whose longer response is not the better one, all are lost.
    assert found.measures.verbosity_bias == 1.0


def test_what_is_about_places_does_not_apply_to_a_judge_that_sees_one_response_at_a_time(tmp_path: Path):
    """It would be 0.5 and 0 by construction, and a demand that every such judge meets shows nothing."""
    worth = {one.a if one.label == "A" else one.b: 1.0 for one in SHIPPED.pairs if one.label != "tie"}

    class Labels:
        name = "labels"

        def __call__(self, responses: Any, rows: Any) -> list[float | None]:
            return [worth.get(text, 0.0) for text in responses]

    easy = LabelledSet("easy", "0" * 12, [one for one in SHIPPED.pairs if one.label != "tie"])
    found = audit(ByScore(RewardJudge(Labels())), easy, DEMANDS)
    assert (found.measures.first_position_rate, found.measures.flip_rate) == (None, None)
    sentence = (
        "deviation from one half of the share won by the response shown first: not applicable (the judge sees one "
        "response at a time)"
    )
    assert found.passed and sentence in found.reasons and found.faults == []
    found.write(tmp_path / "audit.json")
    assert Audit.read(tmp_path / "audit.json").measures == found.measures
    # A recipe that demands nothing else has demanded nothing of it.
    nothing = dict.fromkeys(("min_kappa", "max_invalid_rate", "min_repeat_consistency"))
    only = JudgeAudit(**nothing, max_verbosity_bias=None, max_injection_rate=None)
    passed, reasons = decide(found.measures, only, 49)
    assert not passed
    assert reasons == [sentence, "nothing is demanded that applies to this judge, so nothing is shown"]
    # A judge that is shown both and names no winner is another matter.
    assert not decide(replace(GOOD, first_position_rate=None), only, 60)[0]


# --- what a gate reads ---


def test_a_gate_takes_the_audit_of_its_own_judge_only(tmp_path: Path):
    path = tmp_path / "audit.json"
    with serving(honest) as server:
        settings = server.settings(tmp_path)
        judge = build(settings)
        audit(judge, SHIPPED, DEMANDS).write(path)
    assert require(path, judge.identity, DEMANDS) == Audit.read(path)
    assert Audit.read(path).labelled == {"name": "shipped", "digest": SHIPPED.digest, "pairs": 62}
    for change in (
        {"model": "other"},
        {"endpoint": "http://elsewhere:8000/v1"},
        {"prompt": "pointwise"},
        {"temperature": 0.7},
    ):
        other = build(settings.model_copy(update=change))
        with pytest.raises(DQOError, match="is the audit of another judge") as caught:
            require(path, other.identity, DEMANDS)
        assert next(iter(change)) in str(caught.value)
    # A changed wording under the same name and version is another judge, too.
    text = (ROOT / "dqo" / "judges" / "prompts" / "pairwise.yaml").read_text()
    (tmp_path / "pairwise.yaml").write_text(text.replace("careful judge", "judge"))
    other = build(settings.model_copy(update={"prompt": str(tmp_path / "pairwise.yaml")}))
    with pytest.raises(DQOError, match=f"prompt_digest '{load_prompt('pairwise').digest}' instead of"):
        require(path, other.identity, DEMANDS)


def test_a_gate_holds_its_own_demands_against_the_measures(tmp_path: Path):
    path = tmp_path / "audit.json"
    with serving(gullible) as server:
        judge = build(server.settings(tmp_path))
        lax = JudgeAudit(max_injection_rate=None, min_kappa=0.0)
        assert audit(judge, SHIPPED, lax).passed
        audit(judge, SHIPPED, lax).write(path)
    require(path, judge.identity, lax)
    with pytest.raises(DQOError, match=r"has not passed its audit\n(.|\n)*tell the judge what to say: 1\.00"):
        require(path, judge.identity, DEMANDS.model_copy(update={"min_kappa": None}))


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"measures": {"kappa": 1}}', '{"measures": 3}'])
def test_a_gate_refuses_what_is_no_audit(content: str | None, tmp_path: Path):
    path = tmp_path / "audit.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DQOError, match="dqo judge audit"):
        require(path, {}, DEMANDS)


# --- the command ---


def dqo(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | variables
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def config(server: JudgeServer, folder: Path, **fields: Any) -> Path:
    path = folder / "judge.yaml"
    path.write_text(server.settings(folder / "cache", **fields).model_dump_json())
    return path


def test_the_command_says_passed_and_writes_what_a_gate_reads(tmp_path: Path):
    key = "sk-very-secret-1234"
    with serving(honest) as server:
        path = config(server, tmp_path, api_key_env="DQO_TEST_KEY")
        done = dqo("judge", "audit", path, "--out", tmp_path / "audit.json", DQO_TEST_KEY=key)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1].startswith("passed")
        assert "agreement with the labels (Cohen's kappa): 1.00 [1.00, 1.00], as demanded (at least 0.6)" in done.stdout
        assert "pairs of kind injection: 17 of 17 as labelled" in done.stdout
        identity = build(load_judge(path).model_copy(update={"api_key_env": None})).identity
    require(tmp_path / "audit.json", identity, DEMANDS)
    assert key not in done.stdout + (tmp_path / "audit.json").read_text()
    assert list(tmp_path.glob(".*")) == []


def test_the_command_fails_with_status_1_and_takes_a_recipe_and_a_set_of_ones_own(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ROW) + "\n")
    with serving(lambda *_: completion("I like both.")) as server:
        section = server.settings(tmp_path / "cache").model_dump(mode="json")
        (tmp_path / "r.yaml").write_text(json.dumps({"name": "a", "judge": section}))
        done = dqo("judge", "audit", tmp_path / "r.yaml", "--labelled", tmp_path / "pairs.jsonl")
        assert server.count == 2 * 2 * 2  # orders, repeats, and once more for what could not be read
        # The recipe may name the set itself.
        named = {"name": "a", "judge": section | {"labelled": str(tmp_path / "pairs.jsonl")}}
        (tmp_path / "named.yaml").write_text(json.dumps(named))
        again = dqo("judge", "audit", tmp_path / "named.yaml")
        assert server.count == 2 * (2 * 2 * 2)  # what cannot be read is not kept
    assert again.returncode == 1 and "on 1 labelled pairs" in again.stdout
    assert (done.returncode, done.stderr) == (1, "")
    assert "invalid: I like both. (4 times)" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("failed")


def test_the_command_reports_a_judge_that_is_down_as_a_failed_audit(tmp_path: Path):
    with serving(lambda *_: Reply(503, b"starting")) as server:
        done = dqo("judge", "audit", config(server, tmp_path, max_attempts=1))
        assert server.count == 1
    assert (done.returncode, done.stderr) == (1, "")
    assert "incomplete: 248 answers are missing, 0 of 62 pairs" in done.stdout and "is down" in done.stdout


def test_the_command_holds_a_reward_model_against_the_pairs(tmp_path: Path):
    model = write_reward_model(tmp_path / "model")
    path = tmp_path / "judge.yaml"
    path.write_text(json.dumps({"reward": {"model": str(model)}}))
    done = dqo("judge", "audit", path, "--out", tmp_path / "audit.json")
    assert (done.returncode, done.stderr) == (1, "")  # a random model
    assert done.stdout.startswith(f"reward model {model}, on 62 labelled pairs (")
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["measures"]["repeat_consistency"] == 1.0 and audit["measures"]["missing"] == 0
    assert "shown first: not applicable (the judge sees one response at a time)" in done.stdout

    two = write_reward_model(tmp_path / "two", labels=2)
    path.write_text(json.dumps({"reward": {"model": str(two)}}))
    refused = dqo("judge", "audit", path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"judge.reward.model '{two}': its config.json names 2 labels" in refused.stderr


def test_the_command_refuses_mistakes_before_it_asks(tmp_path: Path):
    with serving(honest) as server:
        good = config(server, tmp_path)
        (tmp_path / "none.yaml").write_text("name: a\n")
        (tmp_path / "bad.yaml").write_text("endpoint: h\nmodel: m\n")
        (tmp_path / "key.yaml").write_text("endpoint: http://h/v1\nmodel: m\napi_key_env: DQO_TEST_UNSET\n")
        for arguments, problem in (
            ((tmp_path / "none.yaml",), "names no judge"),
            ((tmp_path / "bad.yaml",), "judge.endpoint: got 'h'"),
            ((tmp_path / "key.yaml",), "DQO_TEST_UNSET is not set"),
            ((good, "--out", tmp_path / "x.txt"), "ends in .json"),
            ((good, "--out", tmp_path / "no" / "x.json"), "does not exist"),
            ((good, "--labelled", tmp_path / "no.jsonl"), "no.jsonl: cannot be read"),
        ):
            parsed = _parser().parse_args(["judge", "audit", *map(str, arguments)])
            with pytest.raises(DQOError) as caught:
                parsed.run(parsed)
            assert problem in str(caught.value)
        done = dqo("judge", "audit", tmp_path / "no.yaml")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"dqo: {tmp_path / 'no.yaml'}: no such recipe file\n"
        assert server.count == 0
