"""The instruction task: the shipped rows, prompts, and Dolly's form read from a real local data set."""

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pandas
import pytest

from dqo.data import prompt_id, side
from dqo.data.sources import read_source
from dqo.recipe import Data, load
from dqo.tasks import get_task
from dqo.tasks.instruction import INSTRUCTION

ROOT = Path(__file__).parents[2]
ROWS = [json.loads(line) for line in INSTRUCTION.bundled.read_text(encoding="utf-8").splitlines()]
REFERENCES = [reference for row in ROWS for reference in row["references"]]
ROW = {"instruction": "Name a fruit.", "context": "", "references": ["An apple."]}
DOLLY_ROWS = [
    {
        "instruction": "Who wrote it?",
        "context": "Emma is by Jane Austen.",
        "response": "Jane Austen.",
        "category": "qa",
    },
    {"instruction": "Name a river.", "context": "", "response": "The Nile.", "category": "brainstorming"},
]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.casefold()))


def overlap(first: str, second: str) -> float:
    """Jaccard index of the words."""
    a, b = words(first), words(second)
    return len(a & b) / len(a | b)


def text_of(row) -> str:
    (message,) = INSTRUCTION.prompt(row)
    assert message["role"] == "user"
    return message["content"]


def test_the_recipe_name_stands_for_the_task():
    assert get_task("instruction") is INSTRUCTION
    assert INSTRUCTION.reward is None


# --- the shipped rows ---


def test_shipped_rows_are_usable_and_split_as_the_recipe_splits_them():
    assert [INSTRUCTION.check(row) for row in ROWS] == [None] * len(ROWS)
    fraction = load(ROOT / "recipes" / "instruction.yaml").data.eval_fraction
    sides = Counter(side(prompt_id(INSTRUCTION.prompt(row)), fraction) for row in ROWS)
    assert sides["train"] >= 200 and sides["eval"] >= 40


def test_no_two_shipped_instructions_are_nearly_the_same():
    assert len({prompt_id(INSTRUCTION.prompt(row)) for row in ROWS}) == len(ROWS)
    near = [pair for pair in combinations(map(text_of, ROWS), 2) if overlap(*pair) > 0.7]
    assert near == []


def test_every_row_has_two_or_three_answers_that_say_different_things():
    assert {len(row["references"]) for row in ROWS} == {2, 3}
    assert len(set(REFERENCES)) == len(REFERENCES)
    pairs = [pair for row in ROWS for pair in combinations(row["references"], 2)]
    assert max(overlap(*pair) for pair in pairs) < 0.8  # a rewriting exercise
    assert sum(overlap(*pair) for pair in pairs) / len(pairs) < 0.15


def test_some_rows_have_a_context_and_begin_differently():
    assert 40 <= sum(bool(row["context"]) for row in ROWS) <= len(ROWS) / 2
    beginnings = Counter(" ".join(row["instruction"].split()[:2]) for row in ROWS)
    assert len(beginnings) > 90 and max(beginnings.values()) < 0.15 * len(ROWS)


def test_typography_is_clean():
    for text in [text for row in ROWS for text in (row["instruction"], row["context"], *row["references"])]:
        assert re.fullmatch(r"[A-Za-z0-9 \n.,;:!?'\"()&/@-]*", text), text
        assert text == text.strip() and "  " not in text and text.count('"') % 2 == 0, text
        assert not re.search(r" [.,;:!?](?!\.\.)", text), text
        assert not text or text[0].isupper() or text[0].isdigit() or text[0] == '"' or "@" in text, text


@pytest.mark.slow
def test_every_answer_is_short_for_the_bundled_model():
    from dqo.policy import load_tokenizer
    from dqo.recipe import Policy

    tokenizer = load_tokenizer(Policy())
    lengths = [len(tokenizer(reference)["input_ids"]) for reference in REFERENCES]
    assert max(lengths) <= 40
    assert max(len(tokenizer(text_of(row))["input_ids"]) for row in ROWS) <= 80


# --- prompt and check ---


def test_a_context_follows_the_instruction():
    assert text_of(ROW) == "Name a fruit."
    assert text_of(ROW | {"context": None}) == "Name a fruit."
    assert text_of(ROW | {"instruction": " Who? \n", "context": " Ann was there.\n"}) == "Who?\n\nAnn was there."


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"instruction": ""}, "instruction: got ''"),
        ({"instruction": None}, "instruction: got None"),
        ({"context": 3}, "context: got 3"),
        ({"references": []}, "references: got []"),
        ({"references": "An apple."}, "references: got 'An apple.'"),
        ({"references": ["An apple.", " "]}, "references: got ' '"),
        ({"references": ["An apple.", None]}, "references: got None"),
    ],
)
def test_an_unusable_row_is_named(change, field):
    assert INSTRUCTION.check(ROW) is None
    assert INSTRUCTION.check(ROW | {"context": None}) is None
    assert INSTRUCTION.check(ROW | change).startswith(field)


def test_check_takes_any_mapping():
    assert INSTRUCTION.check({}) is not None


# --- the public set ---


@pytest.fixture(params=["jsonl", "parquet"])
def dolly(request, tmp_path) -> Path:
    """A folder that `datasets` reads, with Dolly's columns."""
    folder = tmp_path / "dolly"
    folder.mkdir()
    frame = pandas.DataFrame(DOLLY_ROWS)
    if request.param == "jsonl":
        frame.to_json(folder / "train.jsonl", orient="records", lines=True)
    else:
        frame.to_parquet(folder / "train.parquet")
    return folder


def test_dolly_is_read_in_the_tasks_form(dolly, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = replace(INSTRUCTION, public=replace(INSTRUCTION.public, dataset=str(dolly)))
    source = read_source(Data(source="public"), task)
    assert source.licence == "CC-BY-SA-3.0"
    assert [row.values for row in source.rows] == [
        {"instruction": "Who wrote it?", "context": "Emma is by Jane Austen.", "references": ["Jane Austen."]},
        {"instruction": "Name a river.", "context": "", "references": ["The Nile."]},
    ]
    assert [INSTRUCTION.check(row.values) for row in source.rows] == [None, None]


def test_a_response_that_is_no_text_is_left_for_the_check_to_name():
    row = INSTRUCTION.public.convert({"instruction": "Name a river.", "context": None, "response": None})
    assert INSTRUCTION.check(row) == "references: got None; expected a list of answers"
