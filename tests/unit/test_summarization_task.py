"""The summarization task: the shipped texts, and rewards by hand or by brute force from the documented parts."""

import json
import re
import time
from dataclasses import astuple, replace
from functools import cache
from itertools import combinations
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer

from dqo import recipe
from dqo.data.preparation import prompt_id, side
from dqo.data.sources import read_source
from dqo.recipe import Data
from dqo.tasks import get_task
from dqo.tasks.summarization import SUMMARIZATION, copied, form, reward, rouge_l

ROOT = Path(__file__).parents[2]
ROWS = [json.loads(line) for line in SUMMARIZATION.bundled.read_text(encoding="utf-8").splitlines()]
REFERENCES = [reference for row in ROWS for reference in row["references"]]
ROW = {
    "article": (
        "The bakery on Mill Street closed its doors on Saturday after 84 years. The owner said that flour and gas had "
        "become too expensive. Customers stood in line for an hour to buy the last loaves."
    ),
    "references": [
        "A family bakery has shut because flour and gas cost too much.",
        "Rising costs made the owner of an old bakery give up.",
    ],
}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_a_recipe_finds_the_task():
    assert get_task("summarization") is SUMMARIZATION
    assert SUMMARIZATION.fields == ("article",)
    assert SUMMARIZATION.answer is None


def test_the_recipe_that_is_shipped_is_valid():
    shipped = recipe.load(ROOT / "recipes" / "summarization.yaml")
    assert shipped.task == "summarization"
    assert shipped.warnings == []


# --- the shipped texts ---


def test_shipped_rows_are_many_usable_and_on_both_sides():
    assert len(ROWS) >= 260
    assert [SUMMARIZATION.check(row) for row in ROWS] == [None] * len(ROWS)
    fraction = recipe.load(ROOT / "recipes" / "summarization.yaml").data.eval_fraction
    sides = [side(prompt_id(SUMMARIZATION.prompt(row)), fraction) for row in ROWS]
    assert sides.count("train") >= 200
    assert sides.count("eval") >= 40


def test_shipped_texts_have_the_sizes_that_are_promised():
    for row in ROWS:
        assert 45 <= len(row["article"].split()) <= 80, row
        assert 3 <= len(re.findall(r"[.!?](?= |$)", row["article"])) <= 5, row
        assert len(row["references"]) == 2, row
        for reference in row["references"]:
            assert 10 <= len(reference.split()) <= 20, reference
            assert re.fullmatch(r"[A-Z][^.!?]*( [A-Z]?(Mr|Mrs|Dr|St)\. [^.!?]*)?\.", reference), reference


def test_no_shipped_text_is_like_another():
    bags = [set(words(row["article"])) for row in ROWS]
    assert max(len(a & b) / len(a | b) for a, b in combinations(bags, 2)) < 0.35
    assert len({reference.lower() for reference in REFERENCES}) == 2 * len(ROWS)


def test_the_two_references_of_a_row_differ():
    for row in ROWS:
        first, second = (set(words(reference)) for reference in row["references"])
        assert len(first & second) / len(first | second) <= 0.5, row


def test_shipped_typography_is_clean():
    for text in [*(row["article"] for row in ROWS), *REFERENCES]:
        assert re.fullmatch(r"[A-Za-z0-9 .,:;!?'()-]+", text), text
        assert not re.search(r"  | [.,:;!?]|[,:;](?! |\d)|\.\.|^ | $|\b(\w+) \1\b", text), text
        assert text[0].isupper(), text
        assert text[-1] in ".!?", text


def test_every_shipped_reference_is_worth_one_and_faultless_beside_the_other():
    assert [reference for row in ROWS for reference in row["references"] if reward(reference, row) != 1.0] == []
    for row in ROWS:
        for one, other in (row["references"], reversed(row["references"])):
            judged = form(one, {**row, "references": [other]})
            assert astuple(replace(judged, length=1.0)) == (1.0,) * 8, one
            assert judged.length >= 0.75, one


def test_the_reward_ranks_summary_copy_and_summary_of_another_text():
    """Over the shipped rows: another writer's summary, the first sentence copied, a summary of another text."""
    first_sentence = [re.split(r"(?<=[.!?]) ", row["article"])[0] for row in ROWS]
    other_writer = [reward(row["references"][1], {**row, "references": row["references"][:1]}) for row in ROWS]
    copy = [reward(sentence, row) for sentence, row in zip(first_sentence, ROWS, strict=True)]
    other_text = [reward(previous["references"][0], row) for previous, row in zip(ROWS[-1:] + ROWS, ROWS, strict=False)]
    means = [sum(values) / len(ROWS) for values in (other_writer, copy, other_text)]
    assert means[0] > means[1] + 0.1 > means[2] + 0.2
    assert sum(value > copied_ for value, copied_ in zip(other_writer, copy, strict=True)) > 0.7 * len(ROWS)


@pytest.mark.slow
def test_shipped_texts_fit_the_bundled_models_tokens():
    from transformers import AutoTokenizer

    from dqo.bundled import locate

    tokenizer = AutoTokenizer.from_pretrained(locate("bundled:smollm2-135m-instruct").load)
    assert max(len(tokenizer(row["article"])["input_ids"]) for row in ROWS) <= 110
    assert max(len(tokenizer(reference)["input_ids"]) for reference in REFERENCES) <= 32


# --- the prompt ---


def test_prompt_asks_for_as_much_as_the_references_hold():
    (message,) = SUMMARIZATION.prompt(ROW)
    assert message == {"role": "user", "content": f"{ROW['article']}\n\nSummarize this text in one sentence."}
    (message,) = SUMMARIZATION.prompt({**ROW, "references": ["Prices rose.", "A bakery closed. Flour was dear."]})
    assert message["content"].endswith("Summarize this text in a few sentences.")


# --- ROUGE-L, against every subsequence there is ---


def stems(text: str) -> list[str]:
    stemmer = PorterStemmer()
    return [stemmer.stem(word) if len(word) > 3 else word for word in re.findall(r"[a-z0-9]+", text.lower())]


def longest_common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, by trying every subsequence of the first."""

    def inside(part: tuple[str, ...]) -> bool:
        rest = iter(second)
        return all(word in rest for word in part)

    return max(size for size in range(len(first) + 1) if any(map(inside, combinations(first, size))))


def f_measure(response: str, reference: str) -> float:
    common = longest_common(stems(response), stems(reference))
    return 2 * common / (len(stems(response)) + len(stems(reference)))


@pytest.mark.parametrize(
    "response",
    [
        "A family bakery has shut because flour and gas cost too much.",
        "The family's bakeries are shutting, as flour costs too much.",
        "Gas and flour cost a bakery too much.",
        "The owner gave up an old bakery.",
        "Much too cost gas and flour because shut has bakery family a.",
        "It rained in Rome.",
        "bakery bakery bakery",
    ],
)
def test_rouge_l_is_that_of_the_nearest_reference(response):
    each = [f_measure(response, reference) for reference in ROW["references"]]
    assert rouge_l(response, ROW["references"]) == pytest.approx(max(each))
    assert rouge_l(response, ROW["references"][:1]) == pytest.approx(each[0])


@given(st.lists(st.sampled_from("flour gas bakery bakeries cost the a".split()), min_size=1, max_size=8).map(" ".join))
def test_rouge_l_of_any_words(response):
    expected = max(f_measure(response, reference) for reference in ROW["references"])
    assert rouge_l(response, ROW["references"]) == pytest.approx(expected)


# --- the reward, by hand: each factor is named beside its value ---

FIRST = ROW["references"][0]  # 12 words


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (FIRST, 1.0),
        (f"  {FIRST}\n", 1.0),  # surrounding space is not the policy's fault
        (f'"{FIRST}"', 1.0),  # quoted
        ("A family bakery has shut because bread is cheap.", 1.0),  # 6 of 9 and 12 words: ROUGE-L 12/21 > 1/2
        ("A family bakery has sold cakes and bread for years.", 2 * 5 / 22 / 0.5),  # 4 words and "and": 10/22
        ("It was a dull day in Rome and much too cold.", 2 * 3 / 23 / 0.5),  # "a", "and" or "too", "much": see below
        (FIRST.lower(), 0.5),  # opening
        (FIRST[:-1], 0.5),  # ending
        (f"{FIRST} It was", 0.5 * 0.5),  # a fragment: single 1/2, ending 1/2; ROUGE-L 24/26
        ("A family bakery has shut. Flour and gas cost too much.", 0.5),  # two sentences; ROUGE-L 22/23
        (
            "A family bakery has shut because\nflour and gas cost too much.",
            0.5 * (1 - 5 / 61),
        ),  # lines, one odd character
        ("A bakery shut.", 2 * 3 / 15 / 0.5 * 3 / 5.5),  # length 3 of 5.5, half of 11
        ("Bakery, flour, gas, cost, family, much.", 0.0),  # prose: no function word
        (f"{FIRST[:-1]} \U0001f35e\U0001f35e\U0001f35e.", 1 - 5 * 3 / 65),  # plain: three odd characters of 65
    ],
)
def test_reward_by_hand(response, expected):
    assert reward(response, ROW) == pytest.approx(expected)


def test_length_falls_off_on_both_sides():
    lengths = {n: form(" ".join(["word"] * n), ROW).length for n in (1, 5, 6, 18, 36)}  # references of 11 and 12 words
    assert lengths == pytest.approx({1: 1 / 5.5, 5: 5 / 5.5, 6: 1.0, 18: 1.0, 36: 0.5})


def test_longer_references_allow_longer_responses():
    row = {**ROW, "references": ["The bakery closed. " * 10, "Prices rose."]}
    assert form("The old bakery shut. " * 10, row).single == 1.0
    judged = form("The old bakery shut. " * 20, row)
    assert judged.single == pytest.approx(10 / 20)
    assert judged.length == pytest.approx(1.5 * 30 / 80)
    assert judged.variety == pytest.approx(4 / 80 / 0.7)


# --- copying ---


@cache
def article_runs(n: int) -> set[tuple[str, ...]]:
    text = stems(ROW["article"])
    return {tuple(text[i : i + n]) for i in range(len(text)) if len(text[i : i + n]) == n}


def copied_by_hand(response: str) -> float:
    """Words that belong to a common run of any length from five up, over all words."""
    text = stems(response)
    spans = [(i, n) for n in range(5, len(text) + 1) for i in range(len(text) - n + 1)]
    marked = {j for i, n in spans if tuple(text[i : i + n]) in article_runs(n) for j in range(i, i + n)}
    return len(marked) / len(text)


@pytest.mark.parametrize(
    ("response", "share", "own"),
    [
        ("The bakery on Mill Street closed its doors on Saturday after 84 years.", 1.0, 0.5),  # the first sentence
        ("The bakery on Mill Street closes its door on Saturday after 84 years.", 1.0, 0.5),  # other endings
        ("The bakery on Mill Street shut its doors on Saturday after 84 years.", 12 / 13, 1.5 - 12 / 13),  # one word
        ("The bakery in Mill Street shut its doors last Saturday after 84 years.", 0.0, 1.0),  # a word in five
        ("A shop closed as flour and gas had become too dear.", 6 / 11, 1.5 - 6 / 11),
        ("Bread lovers mourn as flour and gas had become too dear for one family.", 6 / 14, 1.0),  # less than half
        (FIRST, 0.0, 1.0),
    ],
)
def test_copying_costs_up_to_half(response, share, own):
    assert copied(response, ROW["article"]) == pytest.approx(share) == copied_by_hand(response)
    assert form(response, ROW).own == pytest.approx(own)


def test_a_short_article_can_be_repeated_in_words():
    assert copied("Snow fell in Rome.", "Snow fell in Rome.") == 0.0  # no run of five


# --- hacks ---


@pytest.mark.parametrize(
    ("response", "most"),
    [
        ("", 0.0),
        (" \n ", 0.0),
        ("... !?", 0.0),
        ("84", 0.0),
        (ROW["article"], 0.15),
        (f"{ROW['article']}\n\nSummarize this text in one sentence.", 0.1),
        ("Summarize this text in one sentence.", 0.2),
        ("Here is a summary of the text in one sentence:", 0.2),
        ("- bakery shut\n- flour and gas\n- cost too much", 0.15),
        ("Family bakery shut, flour gas cost much.", 0.0),
        ("The bakery bakery bakery bakery bakery bakery bakery bakery bakery bakery.", 0.3),
        (f"{FIRST} " * 4, 0.15),
        (f"{FIRST[:-1]} " * 3, 0.15),
        (f"{FIRST[:-1]} {FIRST}", 0.6),
        (f"{FIRST[:-1]} while seven green boats sail the bright moon under old hats daily.", 0.8),
        ("A family bakery has shut 因为面粉和煤气太贵了 because flour and gas cost too much.", 0.4),
        ("Una panaderia familiar cerro porque la harina cuesta mucho.", 0.1),
        ("家庭面包店关门了。", 0.0),
    ],
)
def test_hacks_score_low(response, most):
    assert reward(response, ROW) <= most


def test_the_first_sentence_copied_earns_half_of_what_the_same_facts_earn_in_own_words():
    article = "The river rose over its banks on Sunday and flooded the cellars of the town."
    row = {"article": article, "references": ["The river flooded the cellars of the town on Sunday."]}
    own_words = "On Sunday the river left its bed and flooded many cellars of the town."
    assert min(rouge_l(article, row["references"]), rouge_l(own_words, row["references"])) > 0.5  # both full content
    assert reward(article, row) == pytest.approx(0.5)
    assert reward(own_words, row) == 1.0


@given(st.text(max_size=200))
def test_reward_is_a_share_whatever_the_text(response):
    assert 0.0 <= reward(response, ROW) <= 1.0


@pytest.mark.parametrize("unit", [",", "\n", ". ", '"', "bakery, ", "' ", ".!?", "flour and gas "])
def test_no_text_makes_it_slow(unit):
    reward(FIRST, ROW)  # what is imported and cached once
    start = time.perf_counter()
    reward("The bakery" + unit * 1000 + "shut.", ROW)
    assert time.perf_counter() - start < 2.0


# --- rows that cannot be used ---


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"article": None}, "article: got None; expected a text"),
        ({"article": " "}, "article: got ' '"),
        ({"article": ["a"]}, r"article: got \['a'\]"),
        ({"references": None}, "references: got None"),
        ({"references": []}, r"references: got \[\]"),
        ({"references": "A bakery shut."}, "references: got 'A bakery shut.'; expected a list"),
        ({"references": [FIRST, ""]}, "references: got the item ''"),
        ({"references": [3]}, "references: got the item 3"),
        (
            {"references": ["面包店关门了。"]},
            "references: got the item '面包店关门了。'; expected a summary with English",
        ),
    ],
)
def test_check_names_field_and_value(change, reason):
    assert re.match(reason, SUMMARIZATION.check({**ROW, **change}))


def test_check_names_a_missing_field():
    assert SUMMARIZATION.check({}).startswith("article: got None")


# --- the public set, from a folder of the same columns ---

HIGHLIGHTS = [
    {
        "id": "0",
        "article": "LONDON -- Rain fell.",
        "highlights": "Rain fell in London .\nNobody was hurt , police say .",
    },
    {"id": "1", "article": "A cow ran off.", "highlights": "A cow called 'Bess' ran off .\n\nNEW: She is back"},
    {"id": "2", "article": "Nothing happened.", "highlights": ""},
    {"id": "3", "article": "No highlights.", "highlights": None},
]


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_public_rows_are_read_and_their_highlights_joined(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    data = datasets.Dataset.from_list(HIGHLIGHTS)
    data.to_parquet(folder / "train-0.parquet") if kind == "parquet" else data.to_json(folder / "train.jsonl")
    public = replace(SUMMARIZATION.public, dataset=str(folder), subset=None)
    source = read_source(Data(source="public"), replace(SUMMARIZATION, public=public))
    assert source.licence == "Apache-2.0"
    rows = [row.values for row in source.rows]
    assert rows[:2] == [
        {"article": "LONDON -- Rain fell.", "references": ["Rain fell in London. Nobody was hurt, police say."]},
        {"article": "A cow ran off.", "references": ["A cow called 'Bess' ran off. NEW: She is back."]},
    ]
    assert [SUMMARIZATION.check(row) for row in rows] == [
        None,
        None,
        "references: got the item ''; expected a summary with English words",
        "references: got None; expected a list of one or more summaries",
    ]
    (message,) = SUMMARIZATION.prompt(rows[0])
    assert message["content"] == "LONDON -- Rain fell.\n\nSummarize this text in a few sentences."


def test_the_public_set_is_named_as_on_the_hub():
    public = SUMMARIZATION.public
    assert (public.dataset, public.subset, public.split) == ("abisee/cnn_dailymail", "3.0.0", "train")
    assert public.columns == ("article", "highlights")
