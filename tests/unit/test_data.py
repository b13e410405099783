import hashlib
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from math import ceil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dqo.data import (
    DataCard,
    TokenLengths,
    encode_demonstration,
    prepare,
    prompt_id,
    read_rows,
    side,
    source_fingerprint,
)
from dqo.errors import DQOError
from dqo.recipe import Recipe
from dqo.tasks import get_task

STORY = get_task("story")
TURN = "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
TEMPLATE = (
    "{% for m in messages %}"
    + TURN
    + "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
QUESTION = [{"role": "user", "content": "Say hello."}]


def byte_tokenizer(chat_template: str | None = TEMPLATE, normalizer=None, eos: str = "<|im_end|>"):
    """One token a byte and one a special token: every length is known without a tokenizer."""
    raw = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    if normalizer is not None:
        raw.normalizer = normalizer
    special = [token for token in ("<|im_start|>", "<|im_end|>") if token != eos]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, additional_special_tokens=special)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def recipe(source, sft=None, **data) -> Recipe:
    defaults = {"max_bad_share": 1.0, "eval_fraction": 0.5}
    return Recipe.model_validate(
        {
            "name": "test",
            "data": {"source": str(source), **defaults, **data},
            "sft": {"max_response_tokens": 200, **(sft or {})},
        }
    )


def story(number: int) -> dict:
    """A usable row with a prompt of its own."""
    word = "".join("abcdefghij"[int(digit)] for digit in str(number)) + "xy"
    return {"concepts": [word, "ball", "park"], "references": [f"The {word} lost a ball in the park."]}


GOOD = [story(number) for number in range(12)]


def write_lines(path: Path, *lines) -> Path:
    """Write lines given as bytes, text or objects."""
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def run(tmp_path, tokenizer, source, task=STORY, sft=None, **data):
    """Prepare a source; return the card and the rows of the three files."""
    card = prepare(recipe(source, sft, **data), task, tokenizer, tmp_path / "data")
    return card, *(read_rows(tmp_path / "data" / f"{name}.jsonl") for name in ("train", "eval", "quarantine"))


def prompts(*tables) -> set[str]:
    return {row["prompt"][0]["content"] for table in tables for row in table}


def text_of(row: dict) -> str:
    return STORY.prompt(row)[0]["content"]


# What is written --------------------------------------------------------------------------------------------------


def test_rows_of_the_files_follow_the_contract(tmp_path, tokenizer):
    _, train, evaluation, quarantine = run(tmp_path, tokenizer, write_lines(tmp_path / "s.jsonl", *GOOD))
    assert quarantine == []
    by_prompt = {row["prompt"][0]["content"]: row for row in train + evaluation}
    assert len(by_prompt) == len(GOOD)
    for source in GOOD:
        row = by_prompt[text_of(source)]
        assert set(row) == {"id", "prompt", "references", "concepts"}
        assert row["prompt"] == STORY.prompt(source)
        assert row["references"] == source["references"]
        assert row["concepts"] == source["concepts"]
        assert len(row["id"]) == 16
        int(row["id"], 16)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        "train.jsonl",
        "eval.jsonl",
        "quarantine.jsonl",
        "card.json",
        "card.md",
    }


def test_card_counts_lengths_and_digests(tmp_path, tokenizer):
    long = {
        "concepts": ["whale", "sea"],
        "references": ["A whale sang in the sea.", "The sea hid a whale, an old one."],
    }
    again = {"concepts": GOOD[0]["concepts"], "references": ["Somebody else."]}
    source = write_lines(tmp_path / "s.jsonl", *GOOD, long, again, "{", "[]", "{")
    card, train, evaluation, quarantine = run(tmp_path, tokenizer, source)

    assert (card.rows_read, card.rows_merged) == (17, 1)
    assert card.rows_quarantined == {"not JSON": 2, "not an object": 1}
    assert card.train_rows + card.eval_rows == 13
    assert (card.train_rows, card.eval_rows) == (len(train), len(evaluation))
    assert len(quarantine) == 3

    used = [*GOOD, long]
    # Two markers and the role words with their line breaks surround the text: see TEMPLATE.
    frame = len("|user\n") + len("|\n") + len("|assistant\n")
    lengths = sorted(len(text_of(row)) + frame for row in used)
    assert (card.prompt_tokens.min, card.prompt_tokens.max) == (lengths[0], lengths[-1])
    assert card.prompt_tokens.mean == pytest.approx(sum(lengths) / 13, abs=0.005)
    assert card.prompt_tokens.p95 == lengths[ceil(0.95 * 13) - 1]
    references = sorted(len(text) + 1 for row in [*used, again] for text in row["references"])
    assert (card.reference_tokens.min, card.reference_tokens.max) == (references[0], references[-1])
    assert card.reference_tokens.mean == pytest.approx(sum(references) / 15, abs=0.005)
    assert card.references == 15

    assert card.source == str(source)
    assert card.source_digest == hashlib.sha256(source.read_bytes()).hexdigest()
    canonical = "".join(
        f"{name} {json.dumps(row, sort_keys=True, separators=(',', ':'))}\n"
        for name, rows in (("train", train), ("eval", evaluation))
        for row in rows
    )
    assert card.digest == hashlib.sha256(canonical.encode()).hexdigest()
    assert card.task == "story"
    assert card.licence is None
    assert card.tokenizer == "bundled:smollm2-135m-instruct"


def test_percentile_is_a_length_that_occurs():
    assert TokenLengths.of([*range(1, 101)]) == TokenLengths(1, 50.5, 95, 100)
    assert TokenLengths.of([1, 101]) == TokenLengths(1, 51.0, 101, 101)
    assert TokenLengths.of([7]) == TokenLengths(7, 7.0, 7, 7)


def test_card_is_read_back_and_readable(tmp_path, tokenizer):
    card, *_ = run(tmp_path, tokenizer, write_lines(tmp_path / "a|b.jsonl", *GOOD, "{broken"))
    assert DataCard.read(tmp_path / "data" / "card.json") == card
    text = (tmp_path / "data" / "card.md").read_text(encoding="utf-8")
    assert "| rows read | 13 |" in text
    assert "| rows quarantined | 1 (7.7%) |" in text
    assert "a\\|b.jsonl" in text
    assert "line 13: not JSON:" in text
    assert card.digest in text


def test_reading_a_card_that_is_missing_or_foreign(tmp_path):
    with pytest.raises(DQOError, match=r"card\.json: missing; expected the data card"):
        DataCard.read(tmp_path / "card.json")
    (tmp_path / "card.json").write_text('{"task": "story"}')
    with pytest.raises(DQOError, match=r"card\.json: not a data card \(KeyError"):
        DataCard.read(tmp_path / "card.json")
    with pytest.raises(DQOError, match=r"train\.jsonl: missing; expected a file written by the prepare stage"):
        read_rows(tmp_path / "train.jsonl")


def test_bundled_data_is_whole(tmp_path, tokenizer):
    card, train, evaluation, quarantine = run(tmp_path, tokenizer, "bundled", eval_fraction=0.16, max_bad_share=0.0)
    rows = [json.loads(line) for line in STORY.bundled.read_text(encoding="utf-8").splitlines()]
    assert quarantine == []
    assert prompts(train, evaluation) == {text_of(row) for row in rows}
    assert card.rows_read == len(rows)
    assert card.references == sum(len(row["references"]) for row in rows)
    assert card.licence == STORY.licence
    # The hash is a fair coin: the evaluation share lies within four standard deviations of 0.16.
    assert abs(len(evaluation) / len(rows) - 0.16) < 4 * (0.16 * 0.84 / len(rows)) ** 0.5


# Sources ----------------------------------------------------------------------------------------------------------


def test_line_endings_byte_order_mark_and_blank_lines(tmp_path, tokenizer):
    lines = [json.dumps(row).encode() for row in GOOD]
    source = tmp_path / "windows.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([*lines[:6], b"", b"  \t", *lines[6:], b"nonsense"]))
    card, train, evaluation, quarantine = run(tmp_path, tokenizer, source)
    assert card.rows_read == 13
    assert prompts(train, evaluation) == {text_of(row) for row in GOOD}
    # Six rows, two blank lines, six rows: blank lines are no rows but count as lines.
    assert [(row["line"], row["row"]) for row in quarantine] == [(15, "nonsense")]


def test_line_separators_of_unicode_do_not_cut_a_line(tmp_path, tokenizer):
    reference = "The ball\u2028rolled\u0085into the park.\x0cOh."
    row = {"concepts": ["sun", "ball"], "references": [reference]}
    escaped_only_where_json_must = json.dumps(row, ensure_ascii=False)
    source = write_lines(tmp_path / "s.jsonl", *GOOD, escaped_only_where_json_must)
    _, train, evaluation, quarantine = run(tmp_path, tokenizer, source)
    assert quarantine == []
    assert [reference] in [row["references"] for row in train + evaluation]


def test_columns_are_renamed_and_a_text_is_one_reference(tmp_path, tokenizer):
    rows = [{"words": row["concepts"], "target": row["references"][0], "other": 1} for row in GOOD]
    source = write_lines(tmp_path / "s.jsonl", *rows)
    columns = {"concepts": "words", "references": "target"}
    _, train, evaluation, _ = run(tmp_path, tokenizer, source, columns=columns)
    assert {(tuple(row["concepts"]), tuple(row["references"])) for row in train + evaluation} == {
        (tuple(row["concepts"]), tuple(row["references"])) for row in GOOD
    }


def test_parquet_gives_the_same_data_as_jsonl(tmp_path, tokenizer):
    lines = write_lines(tmp_path / "s.jsonl", *GOOD)
    table = tmp_path / "s.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "extra": 1.5} for row in GOOD]), table)
    from_lines, *line_rows = run(tmp_path, tokenizer, lines)
    from_table, *table_rows = run(tmp_path, tokenizer, table)
    assert table_rows == line_rows
    assert from_table.digest == from_lines.digest
    assert from_table.source_digest == hashlib.sha256(table.read_bytes()).hexdigest()


def test_parquet_rows_are_numbered_over_row_groups(tmp_path, tokenizer):
    rows = [*GOOD, {"concepts": None, "references": ["Nobody."]}]
    table = tmp_path / "s.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=5)
    *_, quarantine = run(tmp_path, tokenizer, table)
    (bad,) = quarantine
    assert (bad["file"], bad["line"]) == (str(table), 13)
    assert bad["reason"] == "unusable field: concepts: got None; expected a list of one or more strings"
    assert json.loads(bad["row"]) == rows[-1]


def test_parquet_text_that_is_not_utf8_costs_its_row(tmp_path, tokenizer):
    texts = [row["references"][0].encode() for row in GOOD]
    texts[4] = b"caf\xe9"
    offsets = pyarrow.array([sum(map(len, texts[:i])) for i in range(len(texts) + 1)], pyarrow.int32())
    column = pyarrow.StringArray.from_buffers(len(texts), offsets.buffers()[1], pyarrow.py_buffer(b"".join(texts)))
    table = tmp_path / "s.parquet"
    concepts = pyarrow.array([row["concepts"] for row in GOOD])
    pyarrow.parquet.write_table(pyarrow.table({"concepts": concepts, "references": column}), table)
    card, *_, quarantine = run(tmp_path, tokenizer, table)
    assert card.train_rows + card.eval_rows == 11
    assert [(row["line"], row["reason"], row["row"]) for row in quarantine] == [
        (5, "not UTF-8: column 'references': byte 0xe9 at position 4; expected UTF-8", "caf\\xe9")
    ]


def test_max_prompts_takes_the_first_rows(tmp_path, tokenizer):
    source = write_lines(tmp_path / "s.jsonl", *GOOD[:3], "", "{", *GOOD[3:])
    card, train, evaluation, _ = run(tmp_path, tokenizer, source, max_prompts=10)
    assert card.rows_read == 10
    assert prompts(train, evaluation) == {text_of(row) for row in GOOD[:9]}
    table = tmp_path / "s.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), table)
    card, train, evaluation, _ = run(tmp_path, tokenizer, table, max_prompts=9)
    assert prompts(train, evaluation) == {text_of(row) for row in GOOD[:9]}


def test_hub_data_set(tmp_path, tokenizer, monkeypatch):
    import datasets

    # load_dataset takes a folder for an id, so the hub's code path runs without a hub.
    folder = tmp_path / "hub" / "stories"
    folder.mkdir(parents=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"words": row["concepts"], "target": row["references"][0]} for row in GOOD]
    rows.insert(2, {"words": [], "target": "Nobody."})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "validation.parquet")
    columns = {"concepts": "words", "references": "target"}
    name = f"hub:{folder}"
    card, train, evaluation, quarantine = run(tmp_path, tokenizer, name, split="validation", columns=columns)
    assert prompts(train, evaluation) == {text_of(row) for row in GOOD}
    assert [(row["file"], row["line"]) for row in quarantine] == [(name, 3)]
    assert card.source == f"{name}@main, split validation"
    with pytest.raises(DQOError) as error:
        run(tmp_path, tokenizer, name, split="validation", columns={"concepts": "words"})
    assert "no column 'references' for the field 'references'; the columns are 'words', 'target'" in str(error.value)
    # A split that does not exist is the recipe's mistake, not the network's.
    with pytest.raises(DQOError) as error:
        run(tmp_path, tokenizer, name, split="tset", columns=columns)
    assert "the Hugging Face hub does not give this data set" in str(error.value)
    assert "tset" in str(error.value)


def test_unreachable_hub_names_the_offline_way(tmp_path, tokenizer):
    # tests/conftest.py sets HF_HUB_OFFLINE.
    with pytest.raises(DQOError) as error:
        run(tmp_path, tokenizer, "hub:nobody/nothing", revision="v1", subset="easy")
    message = str(error.value)
    assert message.startswith(
        "data.source 'hub:nobody/nothing@v1, subset easy, split train': the Hugging Face hub cannot"
    )
    assert "HF_HUB_OFFLINE" in message
    assert "offline, take 'bundled' or the path of a local .jsonl or .parquet file as data.source" in message


SOURCES = "expected 'bundled', 'public', the path of a .jsonl or .parquet file, or hub:<dataset id>"


def refusal(tmp_path, source, **data) -> str:
    """The message of a source that cannot be used; nothing may have been written."""
    with pytest.raises(DQOError) as error:
        prepare(recipe(source, **data), STORY, byte_tokenizer(), tmp_path / "out" / "data")
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_missing_file(tmp_path):
    assert refusal(tmp_path, "no/such.jsonl") == f"data.source 'no/such.jsonl': no such file; {SOURCES}"


def test_directory(tmp_path):
    assert refusal(tmp_path, tmp_path) == f"data.source '{tmp_path}': is a directory; {SOURCES}"


@pytest.mark.parametrize(("name", "suffix"), [("rows.csv", ".csv"), ("allenai/common_gen", ""), ("bundeld", "")])
def test_unknown_kind_of_file(tmp_path, name, suffix):
    assert refusal(tmp_path, name) == f"data.source {name!r}: got a file of kind {suffix!r}; {SOURCES}"


def test_file_that_cannot_be_opened(tmp_path):
    name = "x" * 300 + ".jsonl"
    assert refusal(tmp_path, name) == f"data.source '{name}': cannot be read (File name too long)"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", *GOOD)
    source.chmod(0)
    assert refusal(tmp_path, source) == f"data.source '{source}': cannot be read (Permission denied)"


def test_broken_parquet(tmp_path):
    source = write_lines(tmp_path / "s.parquet", *GOOD)
    assert refusal(tmp_path, source).startswith(f"data.source '{source}': not a readable Parquet file (")


def test_parquet_with_a_damaged_page(tmp_path):
    source = tmp_path / "s.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), source, compression="zstd")
    content = bytearray(source.read_bytes())
    content[4:120] = bytes(116)
    source.write_bytes(content)
    assert refusal(tmp_path, source).startswith(f"data.source '{source}': ")


@pytest.mark.parametrize("content", [b"", b"\n \r\n"])
def test_file_without_rows(tmp_path, content):
    source = tmp_path / "s.jsonl"
    source.write_bytes(content)
    assert refusal(tmp_path, source) == f"data.source '{source}': holds no rows; expected at least two"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_column_that_no_row_has(tmp_path, kind):
    rows = [{"concepts": row["concepts"], "target": row["references"]} for row in GOOD]
    source = tmp_path / f"s.{kind}"
    if kind == "jsonl":
        write_lines(source, *rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    assert refusal(tmp_path, source) == (
        f"data.source '{source}': no column 'references' for the field 'references'; the columns are 'concepts', "
        "'target'; name the right one in data.columns, e.g. {references: concepts}"
    )
    renamed = refusal(tmp_path, source, columns={"references": "targets"})
    assert "no column 'targets' for the field 'references'; the columns are 'concepts', 'target'" in renamed


def test_columns_of_an_unknown_field(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", *GOOD)
    assert refusal(tmp_path, source, columns={"concept": "words"}) == (
        "data.columns: 'concept' (column 'words') is not a field of task 'story'; expected one of: concepts, references"
    )


@pytest.mark.parametrize("key", ["revision", "subset", "split"])
def test_hub_settings_of_a_file(tmp_path, key):
    message = refusal(tmp_path, "bundled", **{key: "v1"})
    assert message == (
        f"data.{key}: got 'v1' with data.source 'bundled'; expected no {key}, only 'public' and hub: sources have one"
    )


# Fingerprint ------------------------------------------------------------------------------------------------------


def test_fingerprint_is_that_of_the_bytes(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", *GOOD)
    expected = "sha256:" + hashlib.sha256(source.read_bytes()).hexdigest()
    assert source_fingerprint(recipe(source).data, STORY) == expected
    moved = source.rename(tmp_path / "t.jsonl")
    assert source_fingerprint(recipe(moved).data, STORY) == expected
    moved.write_bytes(moved.read_bytes() + b"\n")
    assert source_fingerprint(recipe(moved).data, STORY) != expected
    bundled = "sha256:" + hashlib.sha256(STORY.bundled.read_bytes()).hexdigest()
    assert source_fingerprint(recipe("bundled").data, STORY) == bundled


def test_fingerprint_of_a_hub_data_set_needs_no_hub():
    settings = [
        {},
        {"revision": "v1"},
        {"revision": "v2"},
        {"subset": "easy"},
        {"split": "test"},
    ]
    found = {source_fingerprint(recipe("hub:a/b", **chosen).data, STORY) for chosen in settings}
    assert len(found) == len(settings)
    assert source_fingerprint(recipe("hub:a/c").data, STORY) not in found


def test_fingerprint_of_a_missing_file():
    with pytest.raises(DQOError, match=r"data\.source 'no\.jsonl': no such file"):
        source_fingerprint(recipe("no.jsonl").data, STORY)


# Bad rows ---------------------------------------------------------------------------------------------------------


def quarantined(tmp_path, tokenizer, bad, *more, task=STORY, sft=None, **data) -> dict:
    """Prepare the good rows with a bad one in the middle; everything else must survive it."""
    source = write_lines(tmp_path / "s.jsonl", *GOOD[:6], bad, *GOOD[6:], *more)
    card, train, evaluation, quarantine = run(tmp_path, tokenizer, source, task, sft, **data)
    assert prompts(train, evaluation) == {text_of(row) for row in GOOD}
    (row,) = quarantine
    assert row["file"] == str(source)
    assert row["line"] == 7
    assert list(card.rows_quarantined) == [row["reason"].split(":")[0]]
    if not isinstance(bad, bytes):
        assert row["row"] == (bad if isinstance(bad, str) else json.dumps(bad))
    return row


def test_broken_json(tmp_path, tokenizer):
    row = quarantined(tmp_path, tokenizer, '{"concepts": ["a", "b"]')
    assert row["reason"] == "not JSON: Expecting ',' delimiter at position 24; expected a JSON object"


@pytest.mark.parametrize("line", ["[" * 200_000, '{"concepts": ' + "9" * 5000 + "}"], ids=["deep", "digits"])
def test_json_that_python_refuses(tmp_path, tokenizer, line):
    assert quarantined(tmp_path, tokenizer, line)["reason"].startswith("not JSON: ")


@pytest.mark.parametrize("line", ["[1, 2]", "3", "null", '"text"'])
def test_json_that_is_no_object(tmp_path, tokenizer, line):
    row = quarantined(tmp_path, tokenizer, line)
    assert row["reason"] == f"not an object: got {line}; expected a JSON object with the task's fields"


def test_byte_that_is_not_utf8(tmp_path, tokenizer):
    row = quarantined(tmp_path, tokenizer, b'{"concepts": ["caf\xe9", "ball"], "references": ["x"]}')
    assert row["reason"] == "not UTF-8: byte 0xe9 at position 19 of the line; expected UTF-8"
    assert row["row"] == '{"concepts": ["caf\\xe9", "ball"], "references": ["x"]}'


def test_lone_surrogate(tmp_path, tokenizer):
    bad = '{"concepts": ["moon", "ball"], "references": ["A ball \\ud83d"]}'
    row = quarantined(tmp_path, tokenizer, bad)
    assert row["reason"] == "not text: holds the lone surrogate '\\ud83d'; expected Unicode characters"


def test_row_without_the_column(tmp_path, tokenizer):
    row = quarantined(tmp_path, tokenizer, {"concepts": ["moon", "ball"], "reference": ["A ball."]})
    assert row["reason"] == "missing column: no column 'references'; the row has 'concepts', 'reference'"


def test_empty_concepts(tmp_path, tokenizer):
    row = quarantined(tmp_path, tokenizer, {"concepts": [], "references": ["A ball."]})
    assert row["reason"] == "unusable field: concepts: got []; expected a list of one or more strings"


@pytest.mark.parametrize(
    ("references", "seen"),
    [
        ([], "got []; expected a list of one or more strings"),
        (None, "got None; expected a list of one or more strings"),
        ("", "got the item ''; expected a non-empty string"),
        (["A moon ball.", "  "], "got the item '  '; expected a non-empty string"),
        (["A moon ball.", 3], "got the item 3; expected a non-empty string"),
    ],
)
def test_missing_or_empty_reference_costs_the_row(tmp_path, tokenizer, references, seen):
    row = quarantined(tmp_path, tokenizer, {"concepts": ["moon", "ball"], "references": references})
    assert row["reason"] == f"unusable field: references: {seen}"


def test_empty_prompt(tmp_path, tokenizer):
    task = replace(
        STORY,
        prompt=lambda row: [{"role": "user", "content": " " if "moon" in row["concepts"] else text_of(row)}],
    )
    row = quarantined(tmp_path, tokenizer, {"concepts": ["moon", "ball"], "references": ["A ball."]}, task=task)
    assert row["reason"] == "empty prompt: got [{'role': 'user', 'content': ' '}]; expected messages with text"


def unnamed(row: dict) -> str:
    return row["thing"]


@pytest.mark.parametrize("function", ["check", "prompt"])
def test_what_a_task_of_ones_own_raises_is_named_with_the_row(tmp_path, tokenizer, function):
    source, task = write_lines(tmp_path / "s.jsonl", *GOOD), replace(STORY, **{function: unnamed})
    with pytest.raises(DQOError) as caught:
        run(tmp_path, tokenizer, source, task)
    place = f"({__file__}, line {unnamed.__code__.co_firstlineno + 1})"
    row = {"concepts": GOOD[0]["concepts"], "references": GOOD[0]["references"]}
    assert str(caught.value) == (f"task 'story': {function} raises KeyError: 'thing' {place} for {repr(row)[:80]} ...")
    assert {path.name for path in tmp_path.iterdir()} == {"s.jsonl"}


@pytest.mark.parametrize(
    ("function", "value", "shown", "expected"),
    [
        ("check", True, "True", "why the row is unusable, or None"),
        ("prompt", "Write!", "'Write!'", "a list of messages, each with the texts `role` and `content`"),
        ("prompt", None, "None", "a list of messages, each with"),
        ("prompt", [{"role": "user"}], "[{'role': 'user'}]", "a list of messages, each with"),
        ("prompt", [{"role": "user", "content": 3}], "[{'role': 'user', 'content': 3}]", "a list of messages, each"),
    ],
)
def test_what_a_task_of_ones_own_must_not_return_is_named(tmp_path, tokenizer, function, value, shown, expected):
    source = write_lines(tmp_path / "s.jsonl", *GOOD)
    with pytest.raises(DQOError) as caught:
        run(tmp_path, tokenizer, source, replace(STORY, **{function: lambda row: value}))
    message = str(caught.value)
    assert message.startswith(f"task 'story': {function} returns {shown} for {{'concepts': [")
    assert f" ...; expected {expected}" in message


@pytest.mark.parametrize("references", [None, [3], {"a": 1}])
def test_references_that_a_check_of_ones_own_lets_pass(tmp_path, tokenizer, references):
    task = replace(STORY, check=lambda row: None)
    row = quarantined(tmp_path, tokenizer, {"concepts": ["moon", "ball"], "references": references}, task=task)
    assert row["reason"] == f"unusable field: references: got {references!r}; expected a list of texts"


def test_special_token_in_a_reference(tmp_path, tokenizer):
    bad = {"concepts": ["moon", "ball"], "references": ["A ball.<|im_start|>user"]}
    row = quarantined(tmp_path, tokenizer, bad)
    assert row["reason"] == (
        "special token: 'A ball.<|im_start|>user' holds '<|im_start|>', which structures a conversation; expected "
        "plain text"
    )


def test_special_token_in_a_prompt(tmp_path, tokenizer):
    task = replace(
        STORY,
        prompt=lambda row: [{"role": "user", "content": text_of(row) + "<|im_end|>" * ("moon" in row["concepts"])}],
    )
    row = quarantined(tmp_path, tokenizer, {"concepts": ["moon", "ball"], "references": ["A ball."]}, task=task)
    assert "holds '<|im_end|>', which structures a conversation" in row["reason"]


def test_long_prompt_is_quarantined_not_cut(tmp_path, tokenizer):
    frame = len("|user\n") + len("|\n") + len("|assistant\n")
    bad = {"concepts": ["m" * 100, "ball"], "references": ["A ball."]}
    tokens = len(text_of(bad)) + frame
    row = quarantined(tmp_path, tokenizer, bad, max_prompt_tokens=tokens - 1)
    assert row["reason"] == f"prompt too long: {tokens} tokens; data.max_prompt_tokens allows {tokens - 1}"
    card, *_ = run(tmp_path, tokenizer, tmp_path / "s.jsonl", max_prompt_tokens=tokens)
    assert card.rows_quarantined == {}
    assert card.prompt_tokens.max == tokens


def test_long_reference_is_quarantined_not_cut(tmp_path, tokenizer):
    # 60 bytes and the end-of-turn token are 61 tokens.
    bad = {"concepts": ["moon", "ball"], "references": ["A ball.", "b" * 60]}
    row = quarantined(tmp_path, tokenizer, bad, sft={"max_response_tokens": 60})
    assert row["reason"] == (
        "reference too long: reference 2 has 61 tokens with the end of turn; sft.max_response_tokens allows 60"
    )
    card, *_ = run(tmp_path, tokenizer, tmp_path / "s.jsonl", sft={"max_response_tokens": 61})
    assert card.rows_quarantined == {}
    assert card.reference_tokens.max == 61


def test_reference_that_the_tokenizer_cannot_reproduce(tmp_path):
    lossy = byte_tokenizer(normalizer=normalizers.Replace("é", "e"))
    row = quarantined(tmp_path, lossy, {"concepts": ["moon", "ball"], "references": ["A café."]})
    assert row["reason"] == (
        "chat template: the reference 'A café.' comes back from the tokens before the end of turn as 'A cafe.'; "
        "expected the same text"
    )


def test_long_values_are_cut_in_the_reason_only(tmp_path, tokenizer):
    bad = {"concepts": "w" * 10_000, "references": ["A ball."]}
    row = quarantined(tmp_path, tokenizer, bad)
    assert len(row["reason"]) < 500


# Repeated prompts -------------------------------------------------------------------------------------------------


def test_repeated_prompt_gives_its_new_references_to_the_first(tmp_path, tokenizer):
    words = GOOD[0]["concepts"]
    more = [
        {"concepts": words, "references": ["Second.", GOOD[0]["references"][0]]},
        {"concepts": words, "references": [" Third. "]},
    ]
    source = write_lines(tmp_path / "s.jsonl", *GOOD, *more)
    card, train, evaluation, quarantine = run(tmp_path, tokenizer, source)
    (row,) = [row for row in train + evaluation if row["concepts"] == words]
    assert row["references"] == [GOOD[0]["references"][0], "Second.", "Third."]
    assert quarantine == []
    assert card.rows_merged == 2


def test_repeated_row_is_quarantined(tmp_path, tokenizer):
    row = quarantined(tmp_path, tokenizer, GOOD[2])
    assert row["reason"] == "duplicate prompt: the prompt of line 3 with no new reference"


def test_same_prompt_with_other_fields_is_quarantined(tmp_path, tokenizer):
    capital = {"concepts": [word.upper() for word in GOOD[2]["concepts"]], "references": ["A new one."]}
    row = quarantined(tmp_path, tokenizer, capital)
    assert row["reason"] == (
        f"duplicate prompt: the prompt of line 3 with concepts {capital['concepts']!r} instead of "
        f"{GOOD[2]['concepts']!r}"
    )


def test_reference_written_twice_in_a_row_is_kept_once(tmp_path, tokenizer):
    source = write_lines(tmp_path / "s.jsonl", *GOOD, {"concepts": ["moon", "ball"], "references": ["A.", "B.", " A."]})
    _, train, evaluation, _ = run(tmp_path, tokenizer, source)
    assert ["A.", "B."] in [row["references"] for row in train + evaluation]


# Too many bad rows ------------------------------------------------------------------------------------------------


def test_too_many_bad_rows_stop_the_run(tmp_path, tokenizer):
    source = write_lines(tmp_path / "s.jsonl", *GOOD[:5], "{", "[]", *GOOD[5:], "{", "{")
    with pytest.raises(DQOError) as error:
        run(tmp_path, tokenizer, source, max_bad_share=0.2)
    path = tmp_path / "data.quarantine.jsonl"
    assert str(error.value) == (
        f"{source}: 4 of 16 rows (25.0%) are unusable; data.max_bad_share allows 20.0%. The first:\n"
        "  line 6: not JSON: Expecting property name enclosed in double quotes at position 2; expected a JSON object\n"
        "  line 7: not an object: got []; expected a JSON object with the task's fields\n"
        "  line 15: not JSON: Expecting property name enclosed in double quotes at position 2; expected a JSON object\n"
        f"  All of them: {path}"
    )
    assert [row["line"] for row in read_rows(path)] == [6, 7, 15, 16]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["data.quarantine.jsonl", "s.jsonl"]


@pytest.mark.parametrize(("good", "bad", "limit"), [(12, 4, 0.25), (71, 29, 0.29)])
def test_the_limit_itself_is_allowed(tmp_path, tokenizer, good, bad, limit):
    # 0.29 * 100 is 28.999999999999996.
    source = write_lines(tmp_path / "s.jsonl", *(story(number) for number in range(good)), *["{"] * bad)
    card, *_ = run(tmp_path, tokenizer, source, max_bad_share=limit)
    assert card.rows_quarantined == {"not JSON": bad}


def test_no_bad_row_is_allowed_at_zero(tmp_path, tokenizer):
    source = write_lines(tmp_path / "s.jsonl", *GOOD, "{")
    with pytest.raises(DQOError, match=r"1 of 13 rows \(7\.7%\) are unusable; data\.max_bad_share allows 0\.0%"):
        run(tmp_path, tokenizer, source, max_bad_share=0.0)


def test_a_mended_file_removes_the_quarantine_of_the_failed_call(tmp_path, tokenizer):
    source = write_lines(tmp_path / "s.jsonl", *GOOD, "{")
    with pytest.raises(DQOError):
        run(tmp_path, tokenizer, source, max_bad_share=0.0)
    write_lines(source, *GOOD)
    run(tmp_path, tokenizer, source, max_bad_share=0.0)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["data", "s.jsonl"]


def test_template_that_fits_no_row_stops_the_run_with_the_reason(tmp_path):
    never_ends = byte_tokenizer(TEMPLATE.replace("<|im_end|>", ""))
    source = write_lines(tmp_path / "s.jsonl", *GOOD)
    with pytest.raises(DQOError) as error:
        run(tmp_path, never_ends, source, max_bad_share=0.02)
    assert "12 of 12 rows (100.0%) are unusable" in str(error.value)
    assert "line 1: chat template: " in str(error.value)


def empty_side_message(tmp_path, tokenizer, rows, fraction) -> str:
    source = write_lines(tmp_path / "s.jsonl", *rows)
    with pytest.raises(DQOError) as error:
        run(tmp_path, tokenizer, source, eval_fraction=fraction)
    assert not (tmp_path / "data").exists()
    assert str(error.value).startswith(f"{source}: data.eval_fraction = {fraction} gives ")
    return str(error.value).removeprefix(f"{source}: data.eval_fraction = {fraction} gives ")


def test_no_evaluation_prompt(tmp_path, tokenizer):
    message = empty_side_message(tmp_path, tokenizer, GOOD, 1e-9)
    assert message.startswith("12 training and 0 evaluation prompts of 12 usable ones; expected at least one of each")


def test_no_training_prompt(tmp_path, tokenizer):
    message = empty_side_message(tmp_path, tokenizer, GOOD, 1 - 1e-9)
    assert message.startswith("0 training and 12 evaluation prompts of 12 usable ones; expected at least one of each")


def test_no_usable_row(tmp_path, tokenizer):
    message = empty_side_message(tmp_path, tokenizer, ["{"], 0.5)
    assert message.startswith("0 training and 0 evaluation prompts of 0 usable ones")
    assert [row["line"] for row in read_rows(tmp_path / "data.quarantine.jsonl")] == [1]


# The output folder ------------------------------------------------------------------------------------------------


def test_earlier_output_is_replaced_whole(tmp_path, tokenizer):
    first, *_ = run(tmp_path, tokenizer, write_lines(tmp_path / "a.jsonl", *GOOD))
    second, train, evaluation, _ = run(tmp_path, tokenizer, write_lines(tmp_path / "b.jsonl", *GOOD[:8]))
    assert prompts(train, evaluation) == {text_of(row) for row in GOOD[:8]}
    assert DataCard.read(tmp_path / "data" / "card.json") == second != first
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "data"]


def test_a_failed_call_leaves_earlier_output_as_it_was(tmp_path, tokenizer):
    first, *_ = run(tmp_path, tokenizer, write_lines(tmp_path / "s.jsonl", *GOOD))
    with pytest.raises(DQOError):
        run(tmp_path, tokenizer, write_lines(tmp_path / "s.jsonl", "{", "{"), max_bad_share=0.1)
    assert DataCard.read(tmp_path / "data" / "card.json") == first


def test_a_call_that_dies_while_writing_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    # The card is written last but one: three files exist by then.
    monkeypatch.setattr(DataCard, "to_markdown", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, tokenizer, write_lines(tmp_path / "s.jsonl", *GOOD))
    assert [item.name for item in tmp_path.iterdir()] == ["s.jsonl"]


def test_output_is_readable_for_others(tmp_path, tokenizer):
    (tmp_path / "plain").mkdir()
    run(tmp_path, tokenizer, write_lines(tmp_path / "s.jsonl", *GOOD))
    assert (tmp_path / "data").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_with_other_files_is_never_replaced(tmp_path, tokenizer):
    kept = tmp_path / "data" / "thesis.tex"
    kept.parent.mkdir()
    kept.write_text("years of work")
    with pytest.raises(
        DQOError, match=r"data: holds 'thesis\.tex', which is no prepared data; expected a new or empty"
    ):
        run(tmp_path, tokenizer, write_lines(tmp_path / "s.jsonl", *GOOD))
    assert kept.read_text() == "years of work"


def test_an_empty_folder_is_used_and_a_file_refused(tmp_path, tokenizer):
    source = write_lines(tmp_path / "s.jsonl", *GOOD)
    (tmp_path / "data").mkdir()
    run(tmp_path, tokenizer, source)
    with pytest.raises(DQOError, match=r"s\.jsonl: is a file; expected a folder"):
        prepare(recipe(source), STORY, tokenizer, source)


# Split ------------------------------------------------------------------------------------------------------------


def test_id_is_the_hash_of_the_normalised_text():
    expected = hashlib.sha256(b"say hello.").hexdigest()[:16]
    assert prompt_id(QUESTION) == expected


@pytest.mark.parametrize(
    "text",
    [
        "SAY HELLO.",
        "  Say \t\n hello.\u00a0",
        "\uff33\uff41\uff59 hello.",  # full-width letters
        "Say hel\u2113o.",  # a script small l
        "Say \u210bello.",  # a script capital H, which has no lower case of its own
    ],
)
def test_spelling_of_a_prompt_does_not_change_its_id(text):
    assert prompt_id([{"role": "user", "content": text}]) == prompt_id(QUESTION)


def test_letter_case_is_folded_not_lowered():
    written = [[{"role": "user", "content": text}] for text in ("die Stra\u00dfe", "DIE STRASSE")]
    assert prompt_id(written[0]) == prompt_id(written[1])


def test_other_prompts_have_other_ids():
    assert prompt_id([{"role": "user", "content": "Say hallo."}]) != prompt_id(QUESTION)
    assert prompt_id([{"role": "user", "content": "Sayhello."}]) != prompt_id(QUESTION)
    assert prompt_id([{"role": "system", "content": "Be brief."}, *QUESTION]) != prompt_id(QUESTION)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_side_compares_the_id_as_a_fraction(fraction):
    # At a quarter of the range the first hex digit decides alone.
    for digit in range(16):
        expected = "eval" if digit < 16 * fraction else "train"
        assert side(f"{digit:x}000000000000000", fraction) == expected
        assert side(f"{digit:x}fffffffffffffff", fraction) == expected


def test_split_does_not_depend_on_order_file_or_kind(tmp_path, tokenizer):
    shuffled = random.Random(3).sample(GOOD, len(GOOD))
    _, train, evaluation, _ = run(tmp_path, tokenizer, write_lines(tmp_path / "a.jsonl", *GOOD))
    _, train_2, evaluation_2, _ = run(tmp_path, tokenizer, write_lines(tmp_path / "b.jsonl", *shuffled))
    assert train
    assert evaluation
    assert prompts(train) == prompts(train_2)
    assert prompts(evaluation) == prompts(evaluation_2)


def test_adding_rows_moves_none(tmp_path, tokenizer):
    sides = {}
    for count in (12, 40, 200):
        rows = [story(number) for number in range(count)]
        random.Random(count).shuffle(rows)
        _, train, evaluation, _ = run(tmp_path, tokenizer, write_lines(tmp_path / "s.jsonl", *rows), eval_fraction=0.3)
        found = dict.fromkeys(prompts(train), "train") | dict.fromkeys(prompts(evaluation), "eval")
        assert len(found) == count
        assert sides.items() <= found.items()
        sides = found


def test_a_larger_fraction_only_moves_rows_to_evaluation():
    ids = [prompt_id(STORY.prompt(story(number))) for number in range(300)]
    small = {id_ for id_ in ids if side(id_, 0.1) == "eval"}
    large = {id_ for id_ in ids if side(id_, 0.3) == "eval"}
    assert small < large


def test_no_prompt_stands_on_both_sides(tmp_path, tokenizer):
    # Each prompt in four spellings that a reader would call the same.
    task = replace(STORY, prompt=lambda row: [{"role": "user", "content": row["concepts"][0]}], check=lambda row: None)
    spelt = [
        {"concepts": [variant], "references": [f"Reference {i}."]}
        for number in range(50)
        for word in [story(number)["concepts"][0]]
        for i, variant in enumerate([f"a {word}", f"A  {word.upper()} ", f"a\t{word}", f"\uff21 {word}"])
    ]
    random.Random(5).shuffle(spelt)
    _, train, evaluation, _ = run(tmp_path, tokenizer, write_lines(tmp_path / "s.jsonl", *spelt), task)
    keys = [
        {" ".join(text.replace("\uff21", "a").lower().split()) for text in prompts(rows)}
        for rows in (train, evaluation)
    ]
    assert not keys[0] & keys[1]
    assert len(keys[0]) + len(keys[1]) == len(train) + len(evaluation) == 50


def test_digest_follows_content_and_split_only(tmp_path, tokenizer):
    first, *_ = run(tmp_path, tokenizer, write_lines(tmp_path / "a.jsonl", *GOOD))
    spaced, *_ = run(
        tmp_path, tokenizer, write_lines(tmp_path / "b.jsonl", "", *(json.dumps(r, indent=None) + " " for r in GOOD))
    )
    assert spaced.source_digest != first.source_digest
    assert spaced.digest == first.digest
    changed = [*GOOD[:-1], {**GOOD[-1], "references": ["Another."]}]
    assert run(tmp_path, tokenizer, write_lines(tmp_path / "c.jsonl", *changed))[0].digest != first.digest
    resplit, *_ = run(tmp_path, tokenizer, tmp_path / "a.jsonl", eval_fraction=0.8)
    assert resplit.eval_rows > first.eval_rows
    assert resplit.digest != first.digest


# Demonstrations ---------------------------------------------------------------------------------------------------


def test_demonstration_is_prompt_reference_and_end_of_turn(tokenizer):
    demonstration = encode_demonstration(tokenizer, QUESTION, "Hello — you.")
    prompt = "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n"
    expected_prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response = [*tokenizer("Hello — you.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    # The template's line break after the end of turn is neither kept nor trained.
    assert demonstration.input_ids == expected_prompt + response
    assert demonstration.labels == [-100] * len(expected_prompt) + response
    assert demonstration.prompt_tokens == len(expected_prompt)
    assert demonstration.response_tokens == len("Hello — you.".encode()) + 1
    assert tokenizer.decode([label for label in demonstration.labels if label != -100]) == "Hello — you.<|im_end|>"


def test_default_system_message_of_a_template_is_no_label(tokenizer):
    system = byte_tokenizer("{{'<|im_start|>system\nBe kind.<|im_end|>\n'}}" + TEMPLATE)
    demonstration = encode_demonstration(system, QUESTION, "Hi.")
    assert tokenizer.decode([label for label in demonstration.labels if label != -100]) == "Hi.<|im_end|>"
    assert tokenizer.decode(demonstration.input_ids).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user"
    )


def test_white_space_of_the_template_around_a_response_is_trained():
    spaced = byte_tokenizer(TEMPLATE.replace("m['content'] +", "' ' + m['content'] + ' ' +"))
    demonstration = encode_demonstration(spaced, QUESTION, "Hi.")
    assert spaced.decode([label for label in demonstration.labels if label != -100]) == " Hi. <|im_end|>"


def test_conversation_of_several_turns(tokenizer):
    turns = [*QUESTION, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Again."}]
    demonstration = encode_demonstration(tokenizer, turns, "Hello again.")
    assert tokenizer.decode([label for label in demonstration.labels if label != -100]) == "Hello again.<|im_end|>"


def test_tokenizer_without_chat_template(tmp_path):
    plain = byte_tokenizer(None)
    with pytest.raises(DQOError, match="has no chat template; expected that of a chat or instruct model"):
        encode_demonstration(plain, QUESTION, "Hi.")
    with pytest.raises(DQOError) as error:
        run(tmp_path, plain, write_lines(tmp_path / "s.jsonl", *GOOD))
    assert str(error.value).startswith(
        "policy.model 'bundled:smollm2-135m-instruct': its tokenizer has no chat template"
    )


def test_generation_prompt_that_training_does_not_see():
    thinking = byte_tokenizer(TEMPLATE.replace("{{'<|im_start|>assistant\n'}}", "{{'<|im_start|>assistant\n<think>'}}"))
    with pytest.raises(DQOError) as error:
        encode_demonstration(thinking, QUESTION, "Hi.")
    position = len("|user\nSay hello.|\n|assistant\n") + 1
    assert str(error.value).startswith(
        f"chat template: from token {position} of the prompt on, sampling sees '<think>' but training 'H"
    )


def test_template_that_never_ends_a_turn():
    with pytest.raises(DQOError) as error:
        encode_demonstration(byte_tokenizer(TEMPLATE.replace("<|im_end|>", "")), QUESTION, "Hi.")
    assert str(error.value) == (
        "chat template: no token that ends sampling follows the reference in 'Hi.\\n'; expected one of ['<|im_end|>']"
    )


def test_end_of_turn_that_only_the_model_knows():
    # Gemma, for one: the tokenizer's end of sequence is <eos>, the template ends turns with another token.
    other = byte_tokenizer(eos="<eos>")
    end = other.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(DQOError, match=r"no token that ends sampling follows .*; expected one of \['<eos>'\]"):
        encode_demonstration(other, QUESTION, "Hi.")
    demonstration = encode_demonstration(other, QUESTION, "Hi.", stop_ids=[end])
    assert demonstration.labels[-1] == end
    assert other.decode(demonstration.labels[-4:]) == "Hi.<|im_end|>"


def test_reference_that_ends_early(tokenizer):
    with pytest.raises(DQOError, match=r"the reference 'Hi\.<\|im_end\|>there' comes back .* as 'Hi\.'; expected"):
        encode_demonstration(tokenizer, QUESTION, "Hi.<|im_end|>there")


def test_template_that_refuses_a_role():
    strict = byte_tokenizer(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    )
    with pytest.raises(DQOError) as error:
        encode_demonstration(strict, [{"role": "system", "content": "Be kind."}, *QUESTION], "Hi.")
    assert str(error.value) == "chat template: refuses messages of the roles system, user (no system role)"


# Imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_importing_and_reading_needs_no_deep_learning_library(tmp_path):
    source = write_lines(tmp_path / "s.jsonl", *GOOD)
    code = (
        "import sys; from dqo.data import source_fingerprint; from dqo.recipe import Data;"
        "from dqo.tasks import get_task;"
        f"source_fingerprint(Data(source={str(source)!r}), get_task('story'));"
        "print([name for name in ('torch', 'transformers', 'datasets', 'mlflow', 'kfp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
