"""Finding tasks by name, and the page that says how to add one: its example is run as it stands."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dqo.data import prepare, read_rows
from dqo.data.sources import RejectedRow, read_source
from dqo.errors import DQOError
from dqo.recipe import Data, parse
from dqo.rewards import RuleReward, TrlReward
from dqo.tasks import TASKS, Task, get_task

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [body for found, body in FENCE.findall(PAGE) if found == language]


# --- the tasks there are ---


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_whole(name: str):
    task = get_task(name)
    assert task.name == name
    rows = [json.loads(line) for line in task.bundled.read_text(encoding="utf-8").splitlines()]
    assert rows
    for row in rows:
        assert task.check(row) is None
        assert {*task.fields, "references"} <= set(row)
        if task.reward is not None:
            value = task.reward(row["references"][0], row)
            assert value is not None and 0.0 <= value <= 1.0
    if task.public is not None:
        assert task.public.licence
        assert task.public.columns


@pytest.mark.parametrize("name", ["story", "reasoning", "summarization", "instruction"])
def test_the_page_has_a_row_of_the_task_with_its_data_and_licences(name: str):
    task = get_task(name)
    (row,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, re.MULTILINE)
    _, _, _, _, bundled, public, _ = row.split(" | " if " | " * 4 in row else "|")
    count = len(task.bundled.read_text(encoding="utf-8").splitlines())
    assert f" {count} " in bundled
    assert task.licence in bundled
    assert f"`{task.public.dataset}`" in public
    assert public.strip().endswith(task.public.licence)
    (note,) = re.findall(r"\]\(\.\./([^)]+LICENSE\.md)\)", bundled)
    assert str(count) in (ROOT / note).read_text(encoding="utf-8")
    assert task.licence in (ROOT / note).read_text(encoding="utf-8")


# --- a task of one's own, as the page shows it ---


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder that Python imports from; modules of it are forgotten afterwards."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield folder
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def haiku(own) -> Task:
    (module,) = blocks("python")
    (data,) = blocks("json")
    (own / "haiku.py").write_text(module, encoding="utf-8")
    (own / "haiku.jsonl").write_text(data, encoding="utf-8")
    importlib.invalidate_caches()
    return get_task("haiku:HAIKU")


def page_recipe(task: str):
    (text,) = [block for block in blocks("yaml") if yaml.safe_load(block)["task"] == task]
    return parse(text, "docs/tasks.md")


def test_recipes_of_the_page_are_valid():
    assert page_recipe("haiku:HAIKU").data.source == "bundled"
    gsm8k = page_recipe("reasoning")
    assert gsm8k.data.source == "public"
    assert gsm8k.sft.max_response_tokens == gsm8k.rl.sampling.max_new_tokens == 400


def test_the_example_is_a_task_whose_rows_are_prepared(haiku, tmp_path, tiny_policy):
    from transformers import AutoTokenizer

    assert (haiku.name, haiku.fields) == ("haiku", ("thing",))
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    card = prepare(page_recipe("haiku:HAIKU"), haiku, tokenizer, tmp_path / "data")
    assert (card.task, card.rows_read, card.train_rows, card.eval_rows) == ("haiku", 2, 1, 1)
    assert (card.rows_quarantined, card.licence) == ({}, "CC0-1.0")
    rows = [row for side in ("train", "eval") for row in read_rows(tmp_path / "data" / f"{side}.jsonl")]
    assert {row["thing"] for row in rows} == {"frog", "moon"}
    assert all(f"haiku about a {row['thing']}:" in row["prompt"][0]["content"] for row in rows)


def test_the_reward_of_the_example(haiku):
    rows = [json.loads(line) for line in haiku.bundled.read_text(encoding="utf-8").splitlines()]
    assert [haiku.reward(row["references"][0], row) for row in rows] == [1.0, 1.0]
    frog = rows[0]
    responses = ["A frog\nsits\nstill.", "A frog\nsits.", "A frog.", "A dog\nsits\nstill.", "a frog\n" * 7, ""]
    expected = [1.0, 2 / 3, 1 / 3, 0.0, 0.0, 0.0]
    assert [haiku.reward(response, frog) for response in responses] == pytest.approx(expected)
    columns = {"thing": ["frog"] * 6, "references": [frog["references"]] * 6}
    scored = TrlReward(RuleReward(haiku), haiku)(responses, prompts=["p"] * 6, **columns)
    assert scored == pytest.approx(expected)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"references": ["a"]}, "thing: got None; expected a word"),
        ({"thing": "frog", "references": "a"}, "references: got 'a'; expected a list"),
        ({"thing": "frog", "references": [" "]}, "references: got the item ' '; expected a haiku"),
    ],
)
def test_the_check_of_the_example(haiku, row, reason):
    assert haiku.check(row).startswith(reason)


def test_the_public_set_of_the_example(haiku, tmp_path, monkeypatch):
    from dataclasses import replace

    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "haikus"
    folder.mkdir()
    rows = [{"keyword": "rain", "text": "rain all day / and all night / rain"}, {"keyword": "sun", "text": "one line"}]
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = replace(haiku, public=replace(haiku.public, dataset=str(folder)))
    good, bad = read_source(Data(source="public"), task).rows
    assert good.values == {"thing": "rain", "references": ["rain all day\nand all night\nrain"]}
    assert isinstance(bad, RejectedRow)
    assert bad.reason == "text: got 'one line'; expected lines parted by /"


def test_the_example_can_be_pickled_and_is_found_by_another_process(haiku):
    folder = haiku.bundled.parent
    code = (
        "import pickle; from dqo.tasks import get_task; task = get_task('haiku:HAIKU');"
        "print(pickle.loads(pickle.dumps(task)) == task)"
    )
    environment = {"PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "True"


# --- tasks that cannot be had ---


def write(own: Path, text: str) -> None:
    (own / "mine.py").write_text(text, encoding="utf-8")
    importlib.invalidate_caches()


def refusal(name: str) -> str:
    with pytest.raises(DQOError) as error:
        get_task(name)
    return str(error.value)


def test_a_field_of_task_is_missing(own):
    write(own, "from dqo.tasks import Task\nfrom pathlib import Path\n\nMINE = Task(name='m', bundled=Path('m'))\n")
    message = refusal("mine:MINE")
    assert message.startswith("task: got 'mine:MINE', but importing 'mine' fails: TypeError: Task() missing ")
    for field in ("'fields'", "'licence'", "'prompt'", "'check'", "'reward'"):
        assert field in message
    assert f"({own / 'mine.py'}, line 4)" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MINE = (", "SyntaxError: '(' was never closed (mine.py, line 1)"),
        ("MINE = 1 / 0", "ZeroDivisionError: division by zero"),
        ("import nosuchthing", "there is no module 'nosuchthing'"),
        ("from json import nosuchname", "ImportError: cannot import name 'nosuchname' from 'json'"),
    ],
)
def test_a_module_that_fails(own, text, said):
    write(own, text)
    assert said in refusal("mine:MINE").replace("ModuleNotFoundError: No module named", "there is no module")


def test_a_module_that_does_not_exist():
    for name, module in (("nosuch:X", "nosuch"), ("nosuch.deep:X", "nosuch"), ("dqo.nosuch:X", "dqo.nosuch")):
        assert refusal(name) == (
            f"task: got {name!r}, but there is no module {module!r}; expected one that is installed or in a folder of "
            "PYTHONPATH"
        )


def test_a_name_that_the_module_does_not_have(own):
    write(own, "OTHER = 1")
    expected = "task: got 'mine:MINE', but 'mine' has no 'MINE'; expected the name of a dqo.tasks.Task in it"
    assert refusal("mine:MINE") == expected
    assert refusal("mine:OTHER") == "task: 'mine:OTHER' is of type int; expected a dqo.tasks.Task"


@pytest.mark.parametrize("name", ["poem", "a b:C", "mine:", ":X", "mine.:X", "mine:X.y", "../mine:X", ""])
def test_a_name_of_another_form(name):
    assert (
        refusal(name)
        == f"task: got {name!r}; expected one of: {', '.join(TASKS)}, or module:NAME of a task of your own"
    )


def test_names_are_judged_without_an_import():
    code = (
        "import sys; from dqo.tasks import problem, TASKS; assert all(problem(name) is None for name in TASKS);"
        "print([path for path in TASKS.values() if path.partition(':')[0] in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
