"""The story task: the shipped rows, and rewards computed by hand from the documented parts."""

import json
import re
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dqo.errors import DQOError
from dqo.tasks import get_task
from dqo.tasks.story import STORY, coverage, form, reward

ROWS = [json.loads(line) for line in STORY.bundled.read_text(encoding="utf-8").splitlines()]
ROW = {"concepts": ["dog", "ball", "park"], "references": ["The dog chased a ball in the park."]}


def test_get_task_knows_the_story_task_and_names_the_choices_otherwise():
    assert get_task("story") is STORY
    assert STORY.fields == ("concepts",)
    with pytest.raises(DQOError, match=r"'poem'.*story"):
        get_task("poem")


# --- the shipped rows ---


def test_shipped_rows_are_many_usable_and_unique():
    assert len(ROWS) >= 350
    assert [STORY.check(row) for row in ROWS] == [None] * len(ROWS)
    assert len({frozenset(row["concepts"]) for row in ROWS}) == len(ROWS)
    references = [reference for row in ROWS for reference in row["references"]]
    assert len(set(references)) == len(references) == 2 * len(ROWS)


def test_shipped_vocabulary_is_wide():
    counts = Counter(concept for row in ROWS for concept in row["concepts"])
    assert len(counts) > 700
    assert max(counts.values()) <= 8


def test_every_shipped_reference_is_worth_one():
    below = [(ref, reward(ref, row)) for row in ROWS for ref in row["references"] if reward(ref, row) != 1.0]
    assert below == []


def test_the_two_references_of_a_row_differ():
    for row in ROWS:
        first, second = (set(re.findall(r"[a-z]+", reference.lower())) for reference in row["references"])
        assert len(first & second) / len(first | second) <= 0.45, row


def test_prompt_is_one_user_message_with_every_concept():
    (message,) = STORY.prompt(ROW)
    assert message == {"role": "user", "content": "Write one short sentence that uses the words dog, ball, park."}


# --- the reward, by hand: each factor is named beside its value ---


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The dog chased a ball in the park.", 1.0),
        ("Dogs chased two BALLS through the park's gate!", 1.0),  # plural, capitals, possessive
        ("  The dog chased a ball in the park.\n", 1.0),  # surrounding space is not the policy's fault
        ('"The dog lost a ball in the park."', 1.0),  # a quoted sentence
        ('Mr. Hill cried "Stop!" when the dog dropped a ball in the park.', 1.0),  # neither mark ends the sentence
        ("The dog chased a ball across the road.", 2 / 3),  # coverage 2/3
        ("The dog slept all day on the sofa.", 1 / 3),  # coverage 1/3
        ("The doghouse is by the parking ballot.", 1 / 3),  # whole words only, but parking is an inflection
        ("the dog chased a ball in the park.", 0.5),  # opening
        ("The dog chased a ball in the park", 0.5),  # ending
        ("the dog chased a ball in the park", 0.25),  # both
        ("The dog chased a ball in the park. It was", 0.5 * 0.5),  # fragment (single 1/2), ending
        ("The dog saw a ball. He ran to the park.", 0.5),  # two sentences
        ("The dog saw a ball\nHe ran to the park.", 0.5 * (1 - 5 / 38)),  # two lines; one odd character of 38
        ("A dog ran.", 1 / 3 * 3 / 5),  # coverage, length 3/5
        ("Once there was a dog, a ball and a park.", 0.3),  # woven
        ("Write one short sentence that uses the words dog, ball, park.", 0.3),  # woven: the prompt repeated
        ("The dog dog chased a ball in the park.", 0.5),  # variety: one direct repetition
        ("The dog and the dog saw the dog and the dog.", 1 / 3 * (4 / 11) / 0.7),  # variety: 4 distinct of 11 words
        ("Dog muddy ball near green park.", 1.0),  # one function word of six is enough: telegrams pass
        ("Dog chases muddy yellow ball, empty park waits near.", 7 / 9),  # one of nine is not: prose 7/9
        ("The dog chased a ball in the park * * *.", 1 - 5 * 3 / 40),  # plain: 3 odd characters of 40
    ],
)
def test_reward_by_hand(response, expected):
    assert reward(response, ROW) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "most"),
    [
        ("", 0.0),
        (" \n ", 0.0),
        ("... !?", 0.0),
        ("dog, ball, park", 0.0),
        ("Dog, ball, park.", 0.0),
        ("dog ball park", 0.0),
        ('"dog", "ball", and "park"', 0.3),
        ("1. Dog\n2. Ball\n3. Park", 0.0),
        ("- the dog\n- the ball\n- the park", 0.05),
        ("The dog the dog the dog the dog the ball the ball the park the park.", 0.4),
        ("Dog dog dog dog ball ball ball ball park park park park.", 0.0),
        ("The the the the dog ball park.", 0.2),
        ("El perro corre con la pelota por el parque.", 0.0),
        ("El dog corre con la ball por el park.", 0.0),
        ("Der Hund jagte einen Ball im Park.", 0.0),
        ("小狗在公园里追着一个球跑。", 0.0),
        ("The dog 在公园里追着 ball 跑 in the park.", 0.1),
        ("The dog chased a ball in the park. " * 4, 0.2),
        ("Dog ball park tree moon river stone candle.", 0.0),
    ],
)
def test_hacks_score_low(response, most):
    assert reward(response, ROW) <= most


def test_reward_grows_with_every_concept_that_is_added():
    responses = [
        "The boy chased a hen in the rain.",
        "The dog chased a hen in the rain.",
        "The dog chased a ball in the rain.",
        "The dog chased a ball in the park.",
    ]
    assert [reward(response, ROW) for response in responses] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_concept_counts_once():
    assert coverage("The dog met a dog whose dogs like dogs.", ROW["concepts"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("word", "concept"),
    [
        ("slept", "sleep"),
        ("children", "child"),
        ("mice", "mouse"),
        ("shelves", "shelf"),
        ("stolen", "steal"),
        ("saw", "see"),
        ("saw", "saw"),
        ("chopped", "chop"),
        ("carries", "carry"),
        ("baking", "bake"),
    ],
)
def test_inflections_count(word, concept):
    assert coverage(f"They {word} it.", [concept]) == 1.0


@pytest.mark.parametrize(("word", "concept"), [("catalog", "cat"), ("carpet", "car"), ("handsome", "hand")])
def test_words_that_only_share_letters_do_not_count(word, concept):
    assert coverage(f"They {word} it.", [concept]) == 0.0


def test_length_falls_off_on_both_sides():
    lengths = {n: form(" ".join(["word"] * n), ["dog"]).length for n in (1, 4, 5, 25, 50)}
    assert lengths == pytest.approx({1: 0.2, 4: 0.8, 5: 1.0, 25: 1.0, 50: 0.5})


def test_words_beside_each_other_are_no_list_without_a_comma_or_and():
    row = {"concepts": ["vacuum", "sock", "swallow"]}
    assert reward("Our old vacuum swallowed a sock in the hall.", row) == 1.0


@given(st.text(max_size=200))
def test_reward_is_a_share_whatever_the_text(response):
    assert 0.0 <= reward(response, ROW) <= 1.0


@settings(max_examples=50)
@given(st.permutations(["cat", "dog", "ball", "park", "tree"]))
def test_order_of_concepts_does_not_matter(concepts):
    response = "A cat threw the ball over a dog."
    assert reward(response, {"concepts": concepts}) == pytest.approx(3 / 5)


@pytest.mark.parametrize("unit", [",", " , ", "\n", ". ", '"', "dog, ", "' ", ".!?"])
def test_no_text_makes_it_slow(unit):
    start = time.perf_counter()
    reward("dog" + unit * 3000 + "ball", ROW)
    assert time.perf_counter() - start < 1.0


# --- rows that cannot be used ---


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"concepts": None}, "concepts: got None"),
        ({"concepts": []}, r"concepts: got \[\]"),
        ({"concepts": "dog ball"}, "concepts: got 'dog ball'; expected a list"),
        ({"concepts": ["dog", ""]}, "concepts: got the item ''"),
        ({"concepts": ["dog", 3]}, "concepts: got the item 3"),
        ({"concepts": ["dog", "ice cream"]}, "concepts: got 'ice cream'; expected a single word"),
        ({"concepts": ["dog", "Dogs"]}, "concepts: got 'dog' and 'Dogs'"),
        ({"references": None}, "references: got None"),
        ({"references": []}, r"references: got \[\]"),
        ({"references": ["  "]}, "references: got the item '  '"),
        ({"references": "The dog."}, "references: got 'The dog.'; expected a list"),
    ],
)
def test_check_names_field_and_value(change, reason):
    assert re.match(reason, STORY.check({**ROW, **change}))


def test_check_names_a_missing_field():
    assert STORY.check({"references": ["A dog."]}).startswith("concepts: got None")
