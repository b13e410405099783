"""What the documents say can be typed, opened and run: commands, options, targets, links, recipes and code."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dqo.recipe import parse
from pipelines.cli import _parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
DOCUMENTS += sorted(path for room in ("charts", "docs", "components", "dqo") for path in (ROOT / room).rglob("*.md"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def spans(text: str) -> list[str]:
    """Inline code outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def shell_lines(text: str) -> list[str]:
    lines = "\n".join(blocks(text, "sh", "bash", "shell", "console")).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip().removeprefix("$ ") for line in lines]


def typed(text: str) -> list[str]:
    """Everything that a reader may type."""
    return shell_lines(text) + spans(text)


def anchors(path: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-") for heading in headings}


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The leaf parsers by what one types after `dqo`."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                deeper = subcommands(child)
                found |= {f"{name} {rest}": leaf for rest, leaf in deeper.items()} if deeper else {name: child}
    return found


COMMANDS = subcommands(_parser())
TABLE = re.findall(r"^\| `dqo ([^`]+)` \|", README, re.MULTILINE)


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- commands ---


def test_the_table_of_commands_is_complete():
    named = {next(name for name in COMMANDS if f"{usage} ".startswith(f"{name} ")) for usage in TABLE}
    assert named == set(COMMANDS)
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("usage", TABLE)
def test_a_command_of_the_table_parses_with_and_without_its_options(usage: str):
    parser = _parser()
    bare = parser.parse_args(shlex.split(re.sub(r"\[[^]]*\]", "", usage)))
    parser.parse_args(shlex.split(re.sub(r"[][]", "", usage)))
    assert callable(bare.run)


@pytest.mark.parametrize("usage", [usage for usage in TABLE if "[--" in usage])
def test_a_value_in_the_brackets_of_the_table_is_the_default(usage: str):
    bare = vars(_parser().parse_args(shlex.split(re.sub(r"\[[^]]*\]", "", usage))))
    for option in re.findall(r"\[--([^]]+)\]", usage):
        name, _, value = option.partition(" ")
        assert str(bare[name.replace("-", "_")]) == (value or "False"), option


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_commands_in_shell_blocks_parse(path: Path):
    for line in shell_lines(path.read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)
        if words and words[0].removeprefix(".venv/bin/") == "dqo" and words[1:] != ["--help"]:
            _parser().parse_args(words[1:])  # argparse exits where a command or an option does not exist


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_commands_and_options_in_the_text_exist(path: Path):
    for code in spans(path.read_text(encoding="utf-8")):
        words = code.removeprefix(".venv/bin/").split()
        if words[:1] != ["dqo"] or len(words) == 1:
            continue
        usage = " ".join(words[1:])
        name = next((name for name in COMMANDS if f"{usage} ".startswith(f"{name} ")), None)
        assert name is not None or any(name.startswith(f"{usage} ") for name in COMMANDS), code
        for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", usage):
            assert name is not None and option in COMMANDS[name]._option_string_actions, (code, option)


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_make_targets_exist(path: Path):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for code in typed(path.read_text(encoding="utf-8")):
        words = code.split()
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, code


def test_the_readme_names_the_main_job_and_the_tests():
    assert {"make demo", "make test"} <= set(typed(README))


# --- links ---


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_relative_links_and_images_exist(path: Path):
    text = re.sub(r"`[^`\n]*`", "code", FENCE.sub("", path.read_text(encoding="utf-8")))
    for target in re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"", text):
        link = "".join(target)
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        file, _, anchor = link.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), link
        assert place.is_relative_to(ROOT), link
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), link


# --- recipes and code ---


def test_yaml_blocks_of_the_readme_are_recipes():
    found = blocks(README, "yaml")
    assert found
    for body in found:
        assert parse(body, "README.md").warnings == []


def test_python_blocks_of_the_documents_compile():
    found = [body for path in DOCUMENTS for body in blocks(path.read_text(encoding="utf-8"), "python")]
    assert found
    for body in found:
        compile(body, "block", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("body", blocks(README, "python"), ids=lambda body: body.splitlines()[0][:30])
def test_python_blocks_of_the_readme_run(body: str, tmp_path: Path):
    (tmp_path / "block.py").write_text(body, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "block.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nan" not in done.stdout


def test_every_metric_that_mlflow_holds_is_documented():
    from dqo.evaluation.catalogue import METRICS
    from dqo.stages.training import _METRICS

    named = set(spans((ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")))
    assert set(METRICS) <= named
    assert set(_METRICS) <= named
