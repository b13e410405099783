"""The reasoning task: bundled problems checked by arithmetic of our own, rewards computed by hand, rows of GSM8K."""

import ast
import json
import operator
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqo.data import prepare, read_rows
from dqo.data.sources import RejectedRow, read_source
from dqo.defences import embedded_text
from dqo.errors import DQOError
from dqo.recipe import Data, Recipe
from dqo.rewards import RuleReward, TrlReward
from dqo.tasks import get_task, make_reasoning_problems
from dqo.tasks.reasoning import REASONING, answer, canonical, check, form, reward
from dqo.tasks.story import STORY

ROWS = [json.loads(line) for line in REASONING.bundled.read_text(encoding="utf-8").splitlines()]
REFERENCES = [reference for row in ROWS for reference in row["references"]]
QUESTION = "Tom has 5 apples and gets 3 more. How many apples does Tom have now?"
GOOD = "Tom starts with 5 and gets 3 more: 5 + 3 = 8. The answer is 8."
ROW = {"question": QUESTION, "answer": "8", "references": [GOOD]}


def test_get_task_knows_the_reasoning_task():
    assert get_task("reasoning") is REASONING
    assert REASONING.fields == ("question", "answer")


# --- the bundled problems, checked without the generator ---

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(expression: str) -> Fraction:
    """Compute an expression of numbers, + - x / by Python's own parser."""

    def compute(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](compute(node.left), compute(node.right))
        assert isinstance(node, ast.Constant)
        return Fraction(node.value)

    return compute(ast.parse(expression.replace(" x ", " * "), mode="eval").body)


def equations(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(\d+(?: [-+x/] \d+)+) = (\d+)", text)


def numbers(text: str) -> list[int]:
    spoken = re.sub(r"\b(twice|half|Half)\b", "2", text)
    return [int(number) for number in re.findall(r"\d+", spoken)]


def test_the_committed_file_is_what_the_generator_writes():
    assert REASONING.bundled.read_text(encoding="utf-8") == make_reasoning_problems.text()


def test_bundled_problems_are_many_usable_and_unique():
    assert len(ROWS) >= 320
    assert [check(row) for row in ROWS] == [None] * len(ROWS)
    assert len({row["question"] for row in ROWS}) == len(ROWS)
    assert all(len(set(row["references"])) == 2 for row in ROWS)
    # The same sentence with the same numbers may solve two problems, but seldom does.
    assert len(set(REFERENCES)) > 0.95 * len(REFERENCES)


def test_bundled_problems_come_from_many_templates():
    # What is left of a question when names, things and numbers are blanked differs by template.
    skeletons = Counter(
        tuple(word for word in row["question"].split() if word.islower() and len(word) < 6)[-4:] for row in ROWS
    )
    assert len(make_reasoning_problems.TEMPLATES) >= 15
    assert len(skeletons) >= 15
    assert max(skeletons.values()) < len(ROWS) / 8


def test_every_equation_of_every_solution_is_true():
    assert all(equations(reference) for reference in REFERENCES)
    assert [
        (left, right) for reference in REFERENCES for left, right in equations(reference) if value(left) != int(right)
    ] == []


def test_no_equation_hides_from_the_check_above():
    for reference in REFERENCES:
        assert reference.count("=") == len(equations(reference)), reference


def test_answers_are_small_whole_numbers_and_end_every_solution():
    for row in ROWS:
        assert 0 < int(row["answer"]) <= 50, row
        for reference in row["references"]:
            assert reference.endswith(f" The answer is {row['answer']}."), reference
            assert answer(reference) == (reference.rindex(row["answer"]), len(reference) - 1)


def test_solutions_use_the_numbers_of_the_problem_and_lead_to_the_answer():
    """Each number of the problem is used; each other one is a result, a known number of them, or the answer."""
    for row in ROWS:
        given_numbers, gold = set(numbers(row["question"])), int(row["answer"])
        for reference in row["references"]:
            working = reference.removesuffix(f" The answer is {gold}.")
            used = set(numbers(working))
            # Adding 6 + 6 + 6 says the 3 by the number of its terms; 5 + 5 says twice.
            terms = {left.count("+") + 1 for left, _ in equations(working)}
            assert given_numbers <= used | terms, (row["question"], reference)
            results = {int(right) for _, right in equations(working)} | {2 * number for number in given_numbers}
            assert used <= given_numbers | results | {gold, 2}, (row["question"], reference)
            assert gold in used, reference


@pytest.mark.parametrize(
    ("says", "calculation"),
    [
        (r"has (\d+) [\w ]+\. \w+ (?:gives|sends|hands) \w+ (\d+) more\.", lambda a, b: a + b),
        (r"has (\d+) [\w ]+ and (?:loses|gives away|sells|lends out) (\d+) of them\.", lambda a, b: a - b),
        (r"has (\d+) [\w ]+\. S?[Hh]e eats (\d+) and gives (\d+) to", lambda a, b, c: a - b - c),
        (r"has (\d+) [\w ]+ and \w+ has (\d+)\. How many more", lambda a, b: a - b),
        (r"There are (\d+) \w+ with (\d+) [\w ]+ in each", lambda a, b: a * b),
        (r"(\d+) \w+ are shared equally among (\d+)", lambda a, b: a / b),
        (r"buys a \w+ for (\d+) dollars and a \w+ for (\d+) dollars", lambda a, b: a + b),
        (r"^A \w+ costs (\d+) dollars\. How many dollars do (\d+)", lambda a, b: a * b),
        (r"with a (\d+)-dollar bill\. The \w+ costs (\d+) dollars", lambda a, b: a - b),
        (r"is (\d+) years old\. \w+ \w+ is (\d+) years older", lambda a, b: a + b),
        (r"is (\d+) years old\. \w+ is (\d+) years younger", lambda a, b: a - b),
        (r"is (\d+) years old\. How old will s?he be in (\d+) years", lambda a, b: a + b),
        (r"has (\d+) [\w ]+\. \w+ has twice as many\.", lambda a: 2 * a),
        (r"finds (\d+) [\w ]+ and \w+ finds twice as many\. .* together", lambda a: a + 2 * a),
        (r"has (\d+) [\w ]+ and gives half of them", lambda a: a / 2),
        (r"There are (\d+) \w+ on a \w+\. At the next stop (\d+) get off and (\d+) get on", lambda a, b, c: a - b + c),
        (r"plants (\d+) rows of (\d+) \w+ and then (\d+)", lambda a, b, c: a * b + c),
        (r"gets (\d+) \w+ with (\d+) \w+ in each\. (\d+) of them break", lambda a, b, c: a * b - c),
        (r"needs (\d+) \w+ to [\w ]+ and has (\d+)\.", lambda a, b: a - b),
        (r"^\w+ \w+ (\d+) \w+ a day\. .* in (\d+) days", lambda a, b: a * b),
        (r"has (\d+) pages\. \w+ reads (\d+) pages a day for (\d+) days", lambda a, b, c: a - b * c),
        (r"(\d+) \w+ on Monday, (\d+) on Tuesday and (\d+) on Friday", lambda a, b, c: a + b + c),
        (r"earns (\d+) dollars an hour and works (\d+) hours\. .* for (\d+) dollars", lambda a, b, c: a * b - c),
        (r"(\d+) \w+ and (\d+) \w+ are put into (\d+)", lambda a, b, c: (a + b) / c),
        (r"^Every \w+ has (\d+) \w+\. .* do (\d+)", lambda a, b: a * b),
        (r"^(\d+) \w+ form teams of (\d+)", lambda a, b: a / b),
        (r"^After giving away (\d+) [\w ]+, \w+ has (\d+) left", lambda a, b: a + b),
        (r"it is (\d+) degrees in .* (\d+) degrees warmer, .* cooled by (\d+) degrees", lambda a, b, c: a + b - c),
        (r"makes (\d+) \w+\. (\d+) are sold in the morning and (\d+) in", lambda a, b, c: a - b - c),
        (r"has (\d+) \w+ and (\d+) fewer", lambda a, b: a + (a - b)),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_the_answer_is_what_the_words_ask_for(says, calculation):
    """Read again what each kind of problem says: 30 kinds, each with 15 problems."""
    found = [(match, row) for row in ROWS if (match := re.search(says, row["question"]))]
    assert len(found) == 15
    assert [row for match, row in found if calculation(*map(int, match.groups())) != int(row["answer"])] == []


def test_every_bundled_solution_is_worth_one():
    assert [ref for row in ROWS for ref in row["references"] if reward(ref, row) != 1.0] == []


IRREGULAR = {"children", "women", "men", "geese", "sheep", "loaves"}


def test_plurals_follow_numbers():
    """A word after a number above one that names what is counted has its plural; after 1 there is none."""
    verbs = {"of", "on", "to", "years", "degrees", "times", "more", "fewer", "left", "and", "get", "have", "in", "each"}
    singular = re.compile(r"\b(\d+) ([a-z]+)")
    for text in [row["question"] for row in ROWS] + REFERENCES:
        assert not re.search(r"\b1 [a-z]+s\b", text), text
        assert not re.search(r"\ba [aeiou]", text), text
        assert "  " not in text
    for row in ROWS:
        for number, word in singular.findall(row["question"]):
            plural = word.endswith("s") or word in IRREGULAR or word in verbs | {"people", "toy"}
            assert plural or word in {"are", "break"}, (number, word, row["question"])


@pytest.mark.slow
def test_bundled_lengths_by_the_bundled_models_tokenizer():
    from dqo.policy import load_tokenizer
    from dqo.recipe import Policy

    tokenizer = load_tokenizer(Policy())
    assert max(len(ids) for ids in tokenizer(REFERENCES)["input_ids"]) <= 40
    assert max(len(ids) for ids in tokenizer([row["question"] for row in ROWS])["input_ids"]) <= 60


# --- the reward, by hand: 0.1 for the form, 0.9 for the right answer, halved for each part named ---


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOOD, 1.0),
        ("He had 5 and then 3 more came, which makes 8 apples. The answer is 8.", 1.0),
        ("  Tom adds 3 to his 5 apples.\nThe answer is: 8.\n", 1.0),  # a line of its own, a colon
        ("Tom adds 3 to his 5 apples. So the final answer is 8 red apples!", 1.0),  # a unit of two words
        ("Tom adds 3 to his 5 apples. THE ANSWER IS 8.0.", 1.0),  # an equal number
        ("Tom adds 3 to his 5 apples. The answer is 16/2.", 1.0),
        ("Tom adds 3 to his 5 apples. The answer is $8.", 1.0),
        ("Tom adds 3 to his 5 apples. The answer is 9.", 0.1),
        ("Tom adds 3 to his 5 apples. The answer is -8.", 0.1),
        ("Tom adds 3 to his 5 apples. The answer is 80.", 0.1),
        ("Tom adds 3 to his 5 apples. The answer is 8", 0.5),  # closing: no full stop
        ("Tom adds 3 to his 5 apples. The answer is 8. Apples are red.", 0.5),  # closing: more follows
        ("The answer is 8.", 0.5),  # working: none
        ("5 + 3 = 8. The answer is 8.", 0.5),  # working: no words
        ("So so so 5. The answer is 8.", 0.5),  # working: one word
        ("The moon shines over the lake. The answer is 8.", 0.5),  # working: no number of the problem
        ("He had 53 apples on the tree. The answer is 8.", 0.5),  # working: 53 is neither 5 nor 3
        ("Tom adds them up: 5 + 3 = 9. The answer is 8.", 0.5),  # sound
        ("Tom adds them up: 5 + 3 = 9. The answer is 9.", 0.05),  # sound, and wrong
        ("5 + 3 = 9. The answer is 8. Yes!", 0.125),  # every part but single
    ],
)
def test_reward_by_hand(response, expected):
    assert reward(response, ROW) == pytest.approx(expected)


@pytest.mark.parametrize(
    "response",
    [
        "",
        " \n ",
        "8",
        "8.",
        "Tom has 5 + 3 = 8 apples.",  # right, but no answer is stated
        "Answer: 8.",
        "The answer is eight.",
        "The answer is N.",
        "The answer is 7 or 8.",
        "The answer is 7 and 8.",
        "The answer is 7, 8, 9.",
        "The answer is 7 8.",
        "The answer is 8, 7.",
        "The answer is 6/7/8.",
        "The answer is 8 and a half of that.",
        "The answer is 7. The answer is 8.",
        "The answer is 8. The answer is 7.",
        "The answer is 8. The answer is 8.",
        "The answer is 7. No, the answer is 8.",
        "The answers are 6, 7 and 9. The answer is 8.",
        "If the answer is not 7, the answer is 8.",
        "Answer: 7. The answer is 8.",
        "1 2 3 4 5 6 7 8 9 10",
        "The answer is 12345678.",
        "The answer is 9**9**9.",
        "The answer is 9^9^9.",
        "The answer is 4+4.",
        "The answer is 8e0.",
        "The answer is 1/0.",
        "The answer is " + "8" * 400 + ".",
        "小明有八个苹果。答案是8。",
    ],
)
def test_hacks_and_answers_in_another_form_are_worth_no_more_than_the_form(response):
    worked = f"Tom adds 3 to his 5 apples. {response}"
    assert reward(response, ROW) <= 0.1
    assert reward(worked, ROW) <= 0.1


def test_two_answers_are_worth_nothing():
    assert reward("Tom adds 3 to his 5 apples. The answer is 8. The answer is 8.", ROW) == 0.0


def test_strewn_numbers_do_not_help_a_wrong_answer():
    sprayed = "It may be 5 or 6 or 7 or 8 or 9, who knows. "
    assert reward(f"{sprayed}The answer is 9.", ROW) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("calculation", "sound"),
    [
        ("5 + 3 = 8", 1.0),
        ("5+3=8", 1.0),
        ("2 x 3 + 4 = 10", 1.0),  # products first
        ("4 + 2 x 3 = 10", 1.0),
        ("20 - 2 - 3 = 15", 1.0),  # from the left
        ("24 / 2 / 3 = 4", 1.0),
        ("10 / 3 = 3.33", 1.0),  # rounded as written
        ("10 / 3 = 3.34", 0.5),
        ("10 / 4 = 2", 0.5),
        ("2 - 5 = -3", 1.0),
        ("1,200 + 50 = 1,250", 1.0),
        ("$5 + $3 = $8", 1.0),
        ("5 apples + 3 pears = 8 pieces", 1.0),
        ("6 \u00d7 2 \u00f7 3 = 4", 1.0),
        ("7 \u2212 2 = 5", 1.0),
        ("5 - 3 = 8", 0.5),
        ("20 - 2 - 3 = 21", 0.5),
        ("3 / 0 = 3", 0.5),
        ("5 + 3 = 8 and 8 - 1 = 6", 0.5),  # one of two
        ("(1 + 2) x 3 = 9", 1.0),  # not read: not judged
        ("4 x 6 = 24 - 7 = 17", 1.0),  # two results of one line: not judged
        ("x + 3 = 9", 1.0),
        ("half of 10 = 5", 1.0),
    ],
)
def test_equations_are_judged(calculation, sound):
    assert form(f"Tom has 5, and {calculation}. The answer is 8.", QUESTION).sound == sound


def test_right_and_wrong_never_meet():
    """The share of rewards above a tenth is the accuracy, whatever the form."""
    workings = ["", "Tom adds 3 to his 5 apples. ", "The moon is up. ", "5 + 3 = 9. "]
    tails = ["", ".", "!", ". Yes, indeed.", ".\nIt was easy"]
    for working in workings:
        for tail in tails:
            assert reward(f"{working}The answer is 8{tail}", ROW) > 0.1
            assert reward(f"{working}The answer is 7{tail}", ROW) <= 0.1


def test_quality_rises_with_every_repair():
    steps = [
        "The number is 9.",
        "The answer is 9.",
        "Tom adds 3 to his 5 apples. The answer is 9.",
        "The answer is 8. Bye.",
        "The answer is 8.",
        "Tom adds 3 to his 5 apples. The answer is 8.",
    ]
    assert all(worse < better for worse, better in pairwise(reward(step, ROW) for step in steps))


@pytest.mark.parametrize(
    ("gold", "stated"),
    [("1,250", "1250"), ("1250", "1,250"), ("2.5", "5/2"), ("3/4", "0.75"), ("-3", "-3"), ("$12", "12"), ("50%", "50")],
)
def test_numbers_that_are_equal_in_another_spelling(gold, stated):
    response = f"Tom adds 3 to his 5 apples. The answer is {stated}."
    assert reward(response, {**ROW, "answer": gold}) == pytest.approx(1.0)


def test_a_fraction_is_not_its_numerator():
    assert reward("Tom adds 3 to his 5 apples. The answer is 8/3.", ROW) == pytest.approx(0.1)


@pytest.mark.parametrize("gold", ["eight", "", "8 or 9", "x + 1", "\\frac{1}{2}", "9**9**9", "1/0", "8" * 40])
def test_an_answer_that_is_no_number_gives_no_reward_instead_of_zero(gold):
    assert reward(GOOD, {**ROW, "answer": gold}) is None


@given(st.text(max_size=200))
def test_reward_is_a_share_whatever_the_text(response):
    assert 0.0 <= reward(response, ROW) <= 1.0


@given(st.lists(st.sampled_from(["The answer is ", "8", " ", ".", "5 + 3 = ", "x", "-", ",", "Tom", "\n", "$", "/"])))
def test_reward_is_a_share_whatever_the_pieces(pieces):
    assert 0.0 <= reward("".join(pieces), ROW) <= 1.0


@pytest.mark.parametrize(
    "unit", ["1 + ", "1 x ", "1,", "1.", "9", " ", "answer is ", "The answer is ", "The answer is 1", "a ", "$", "= 1 "]
)
def test_no_text_makes_it_slow(unit):
    start = time.perf_counter()
    reward(unit * 3000 + "= 3. The answer is 8.", ROW)
    assert time.perf_counter() - start < 1.0


def test_it_works_in_threads_and_as_trl_calls_it():
    responses = [GOOD.replace("is 8.", f"is {number}.") for number in range(40)]
    expected = [1.0 if number == 8 else 0.1 for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda response: reward(response, ROW), responses)) == pytest.approx(expected)
    columns = {name: [ROW[name]] * 40 for name in ("question", "answer", "references")}
    scores = TrlReward(RuleReward(REASONING), REASONING)(responses, prompts=[QUESTION] * 40, **columns)
    assert scores == pytest.approx(expected)


# --- one spelling of equal answers ---

SPELLINGS = {
    "8": ["8", "8.0", "8.000000", "$8", "16/2", "008"],
    "16": ["16", "$16/2"],  # as math-verify reads it
    "-8": ["-8", "-8.0", "-16/2"],
    "0": ["0", "-0", "0.0", "-0.00", "0/5"],
    "1250": ["1250", "1,250", "$1,250.00", "2500/2"],
    "0.5": ["0.5", "0.50", "1/2", "4/8"],
    "0.333333": ["1/3", "0.333333", "2/6"],
    "0.3333": ["0.3333"],
    "80": ["80"],
    "0.8": ["0.8", "4/5"],
    "8.000001": ["8.000001"],
    "999999999999.123456": ["999999999999.123456"],
    "999999999999.123457": ["999,999,999,999.123457"],
}


@pytest.mark.parametrize("expected", SPELLINGS)
def test_equal_answers_have_one_spelling(expected: str):
    assert {canonical(spelling) for spelling in SPELLINGS[expected]} == {expected}
    assert canonical(expected) == expected


def test_one_spelling_is_what_the_reward_takes_for_equal():
    """The values are parted by more than the reward's rounding; every pair is put to it, as answer and as response."""
    spellings = [(value, spelling) for value, of_value in SPELLINGS.items() for spelling in of_value]
    for (value, gold), (other, stated) in product(spellings, repeat=2):
        response = f"Tom adds 3 to his 5 apples. The answer is {stated}."
        equal = reward(response, {**ROW, "answer": gold}) == pytest.approx(1.0)
        assert equal == (canonical(gold) == canonical(stated)) == (value == other)


@pytest.mark.parametrize("unreadable", ["-$8", "8 or 9", "eight", "1.0000005", ""])
def test_an_answer_that_cannot_be_read_is_left_as_it_is_written(unreadable: str):
    assert canonical(unreadable) == unreadable


def test_what_is_embedded_of_a_response_is_the_one_spelling():
    pick = embedded_text("answer", True, REASONING)
    assert pick("<think>The answer is 9.</think>5 + 3 makes 8. The answer is $8.00, or so.") is None
    assert pick("<think>The answer is 9.</think>5 + 3 makes 8. The answer is $8.00. Or so.") == "8"
    assert pick("It has to be. The answer is -$8.") == "-$8"
    through = embedded_text("through_answer", False, REASONING)
    assert through("5 + 3 makes 8. The answer is $8.00. Or so.") == "5 + 3 makes 8. The answer is $8.00"


# --- where the answer stands ---


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (GOOD, "8"),
        ("It is so. The answer is $1,250.50. The answer is 3.", "$1,250.50"),
        ("The final answer is: -3/4\nand so on", "-3/4"),
        ("The answer is 12 apples.", "12"),
        ("The answer is 12", "12"),
        ("The answer is 7 or 8.", None),
        ("Nothing here.", None),
        ("", None),
    ],
)
def test_where_the_answer_stands(response, found):
    span = answer(response)
    assert (span and response[slice(*span)]) == found


# --- prompt, and rows that cannot be used ---


def test_prompt_holds_the_question_and_the_form_asked_for():
    (message,) = REASONING.prompt(ROW)
    assert message["role"] == "user"
    assert QUESTION in message["content"]
    assert "The answer is" in message["content"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": None}, "question: got None; expected a non-empty string"),
        ({"question": " "}, "question: got ' '; expected a non-empty string"),
        ({"answer": 8}, "answer: got 8; expected a non-empty string"),
        ({"answer": "eight"}, "answer: got 'eight'; expected a number in digits such as '12'"),
        ({"answer": "9**9**9"}, "answer: got '9**9**9'; expected a number in digits"),
        ({"references": None}, "references: got None; expected a list"),
        ({"references": []}, "references: got []; expected a list"),
        ({"references": GOOD}, f"references: got {GOOD!r}; expected a list"),
        ({"references": [GOOD, 3]}, "references: got the item 3; expected a non-empty string"),
        ({"references": ["It is 8."]}, "references: got the item 'It is 8.'; expected a worked solution that ends in"),
        (
            {"answer": "9"},
            f"references: got the item {GOOD!r}; expected a worked solution that ends in 'The answer is 9.",
        ),
    ],
)
def test_check_names_field_and_value(change, reason):
    assert check({**ROW, **change}).startswith(reason)


def test_check_names_a_missing_field():
    assert check({"references": [GOOD]}).startswith("question: got None")


# --- preparation, bundled and public ---


@pytest.fixture(scope="module")
def tokenizer(tiny_policy):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_policy)


def recipe(**data) -> Recipe:
    section = {"max_bad_share": 1.0, "eval_fraction": 0.5, **data}
    return Recipe.model_validate({"name": "t", "data": section, "sft": {"max_response_tokens": 400}})


def test_bundled_split_is_large_enough_on_both_sides(tmp_path, tokenizer):
    card = prepare(recipe(eval_fraction=0.16, max_bad_share=0.0), REASONING, tokenizer, tmp_path / "data")
    assert card.train_rows >= 200
    assert card.eval_rows >= 40
    assert (card.rows_read, card.references, card.licence) == (len(ROWS), 2 * len(ROWS), "CC0-1.0")


def test_a_row_without_a_number_is_excluded_and_counted(tmp_path, tokenizer):
    source = tmp_path / "s.jsonl"
    bad = {**ROW, "answer": "some"}
    source.write_text("".join(f"{json.dumps(row)}\n" for row in [*ROWS[:12], bad]))
    card = prepare(recipe(source=str(source)), REASONING, tokenizer, tmp_path / "data")
    assert card.rows_quarantined == {"unusable field": 1}
    (row,) = read_rows(tmp_path / "data" / "quarantine.jsonl")
    assert (row["line"], row["reason"][:37]) == (13, "unusable field: answer: got 'some'; e")


# Rows as GSM8K has them: the form is its own, the problems are ours.
GSM8K = [
    {
        "question": "Ivy packs 4 crates with 12 jars each and sells half of them. How many jars are left?",
        "answer": "Ivy packs 4 * 12 = <<4*12=48>>48 jars.\nShe keeps 48 / 2 = <<48/2=24>>24 of them.\n#### 24",
    },
    {
        "question": "A firm pays 15 clerks $80 each. How much is that?",
        "answer": "The 15 clerks get $80 * 15 = $<<80*15=1200>>1,200\n#### 1,200",
    },
    {
        "question": "Jo is 3 floors below the ground and goes 2 down. On which floor is she?",
        "answer": "She goes from -3 down by 2:\n\nthat is floor -5\n#### -5",
    },
]


@pytest.fixture
def public(tmp_path, monkeypatch):
    """Write a folder that load_dataset takes for a set of the hub, with a configuration of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(task, rows, kind="parquet", split="train"):
        folder = tmp_path / "hub" / "set"
        folder.mkdir(parents=True)
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
        else:
            (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        if task.public.subset:
            (folder / "README.md").write_text(
                f"---\nconfigs:\n- config_name: {task.public.subset}\n  data_files:\n  - split: {split}\n"
                f"    path: {split}.{kind}\n---\n"
            )
        return replace(task, public=replace(task.public, dataset=str(folder)))

    return write


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_gsm8k(public, kind):
    source = read_source(Data(source="public"), public(REASONING, GSM8K, kind))
    assert source.licence == "MIT"
    assert source.name.endswith("hub/set@main, subset main, split train")
    assert [row.values for row in source.rows] == [
        {
            "question": GSM8K[0]["question"],
            "answer": "24",
            "references": ["Ivy packs 4 * 12 = 48 jars. She keeps 48 / 2 = 24 of them. The answer is 24."],
        },
        {
            "question": GSM8K[1]["question"],
            "answer": "1,200",
            "references": ["The 15 clerks get $80 * 15 = $1,200. The answer is 1,200."],
        },
        {
            "question": GSM8K[2]["question"],
            "answer": "-5",
            "references": ["She goes from -3 down by 2: that is floor -5. The answer is -5."],
        },
    ]
    for row in source.rows:
        assert check(row.values) is None
        assert reward(row.values["references"][0], row.values) == 1.0


def test_gsm8k_is_prepared_and_odd_rows_are_put_aside(tmp_path, tokenizer, public):
    odd = [
        {"question": "How many?", "answer": "Nobody says"},
        {"question": "How many?", "answer": None},
        {"question": "How many?", "answer": "It is some.\n#### some"},
    ]
    task = public(REASONING, [GSM8K[0], *odd, *GSM8K[1:]])
    # The fraction keeps a row on each side: the hash is that of the prompt, so it stays so while the prompt does.
    found = None
    for fraction in (0.2, 0.4, 0.6, 0.8):
        try:
            found = prepare(recipe(source="public", eval_fraction=fraction), task, tokenizer, tmp_path / "data")
            break
        except DQOError as error:
            assert "expected at least one of each" in str(error)
    assert found is not None
    assert found.train_rows + found.eval_rows == 3
    assert found.rows_quarantined == {"not convertible": 2, "unusable field": 1}
    assert found.licence == "MIT"
    reasons = {row["line"]: row["reason"] for row in read_rows(tmp_path / "data" / "quarantine.jsonl")}
    assert reasons[2] == (
        "not convertible: answer: got 'Nobody says'; expected a solution whose last line is '#### <number>'"
    )
    assert reasons[3].startswith("not convertible: answer: got None; expected a solution")
    assert reasons[4].startswith("unusable field: answer: got 'some'; expected a number")
    kept = [row for side in ("train", "eval") for row in read_rows(tmp_path / "data" / f"{side}.jsonl")]
    assert {row["question"] for row in kept} == {row["question"] for row in GSM8K}


COMMON_GEN = [
    {"concept_set_idx": 0, "concepts": ["ski", "mountain", "skier"], "target": "A skier skis down the mountain."},
    {"concept_set_idx": 0, "concepts": ["dog", "ball", "park"], "target": "The dog lost its ball in the park."},
    {"concept_set_idx": 1, "concepts": ["dog", "ball", "park"], "target": "A ball flew over a dog in the park."},
    *(
        {"concept_set_idx": 2 + index, "concepts": [word, "field"], "target": f"A {word} slept in the field."}
        for index, word in enumerate(["cat", "cow", "horse", "goat", "pig", "hen"])
    ),
    {"concept_set_idx": 9, "concepts": ["sun", "sea"], "target": ""},
]


def test_common_gen_is_prepared_and_its_sentences_merged(tmp_path, tokenizer, public):
    task = public(STORY, COMMON_GEN)
    source = read_source(Data(source="public"), task)
    assert source.rows[1].values == {"concepts": ["dog", "ball", "park"], "references": [COMMON_GEN[1]["target"]]}
    card = prepare(recipe(source="public"), task, tokenizer, tmp_path / "data")
    assert (card.rows_read, card.rows_merged, card.licence) == (10, 1, "MIT")
    assert card.rows_quarantined == {"unusable field": 1}
    kept = [row for side in ("train", "eval") for row in read_rows(tmp_path / "data" / f"{side}.jsonl")]
    (dog,) = [row for row in kept if row["concepts"][0] == "dog"]
    assert dog["references"] == [COMMON_GEN[1]["target"], COMMON_GEN[2]["target"]]
    assert [STORY.reward(reference, dog) for reference in dog["references"]] == [1.0, 1.0]


def test_split_of_the_recipe_comes_first_and_survives_its_json(public):
    task = public(REASONING, GSM8K, split="test")
    from dqo.recipe import parse

    carried = parse(recipe(source="public").to_json())
    with pytest.raises(DQOError, match="does not give this data set"):
        read_source(carried.data, task)  # the set's own: train
    own = replace(task, public=replace(task.public, split="test"))
    assert len(read_source(carried.data, own).rows) == 3
    named = parse(recipe(source="public", split="test").to_json())
    assert len(read_source(named.data, task).rows) == 3


def test_column_that_the_set_no_longer_has(public):
    task = public(REASONING, [{"question": "How many?", "solution": "#### 3"}])
    with pytest.raises(DQOError) as error:
        read_source(Data(source="public"), task)
    message = str(error.value)
    assert message.startswith("data.source 'public' (hub:")
    assert "no column 'answer'; the columns are 'question', 'solution'" in message
    assert "pin data.revision, or name the columns in data.columns with data.source 'hub:" in message


def test_a_converter_that_stumbles_costs_the_row_and_is_named(public):
    task = public(REASONING, GSM8K)
    task = replace(task, public=replace(task.public, convert=lambda row: {"answer": row["anwser"]}))
    rows = read_source(Data(source="public"), task).rows
    assert [(row.line, row.kind, row.reason) for row in rows] == [
        (number, "not convertible", "KeyError: 'anwser'") for number in (1, 2, 3)
    ]
    assert all(isinstance(row, RejectedRow) for row in rows)
    assert json.loads(rows[0].raw) == GSM8K[0]


def test_unreachable_public_set_offers_the_bundled_one():
    # tests/conftest.py sets HF_HUB_OFFLINE.
    with pytest.raises(DQOError) as error:
        read_source(Data(source="public"), REASONING)
    message = str(error.value)
    assert message.startswith(
        "data.source 'public' (hub:openai/gsm8k@main, subset main, split train): the Hugging Face hub cannot be reached"
    )
    assert "offline, take 'bundled'" in message


def test_task_without_a_public_set():
    with pytest.raises(DQOError, match=r"data\.source 'public': task 'reasoning' names no public data set; expected"):
        read_source(Data(source="public"), replace(REASONING, public=None))


def test_columns_of_a_public_set_are_known():
    with pytest.raises(DQOError) as error:
        read_source(Data(source="public", columns={"question": "problem"}), REASONING)
    assert str(error.value) == (
        "data.columns: got {'question': 'problem'} with data.source 'public', whose columns are known; expected none, "
        "or data.source 'hub:openai/gsm8k'"
    )
