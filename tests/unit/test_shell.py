"""Commands in messages can be typed as they stand: from here, with and without an activated environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dqo
from dqo.shell import dqo_command, short

BIN = Path(sys.prefix) / "bin"


@pytest.fixture
def inactive(monkeypatch: pytest.MonkeyPatch) -> str:
    """PATH without the environment's own folder."""
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != BIN)
    monkeypatch.setenv("PATH", path)
    return path


@pytest.fixture
def active(inactive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{inactive}")


def typed(command: str) -> str:
    """What a shell prints for the command, in the current folder."""
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_in_an_activated_environment_the_name_is_enough(active):
    assert dqo_command("ui") == "dqo ui"
    assert dqo_command("run", Path("recipes/a.yaml"), "--out", Path("/data")) == "dqo run recipes/a.yaml --out /data"


def test_elsewhere_the_command_is_named_with_its_folder(inactive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert dqo_command("ui") == f"{BIN}/dqo ui"


def test_below_the_current_folder_the_path_is_a_relative_one(inactive, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(BIN.parents[1])
    assert dqo_command("ui") == f"{BIN.parent.name}/bin/dqo ui"


def test_a_folder_whose_name_only_begins_alike_is_not_the_environment(inactive, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", f"{BIN}-old{os.pathsep}{inactive}")
    assert dqo_command("ui") != "dqo ui"


def test_without_a_path_the_command_is_named_with_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("PATH")
    monkeypatch.chdir(tmp_path)
    assert dqo_command("ui") == f"{BIN}/dqo ui"


def test_words_that_a_shell_would_take_apart_are_quoted(active):
    assert dqo_command("run", "my recipe.yaml", "--out", "$HOME/a;b") == "dqo run 'my recipe.yaml' --out '$HOME/a;b'"


def test_a_path_is_relative_where_it_lies_below_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert short(tmp_path / "runs" / "run.log") == "runs/run.log"
    assert short(tmp_path.parent / "run.log") == f"{tmp_path.parent}/run.log"


# --- a shell runs what was printed ---


def test_the_printed_command_runs_in_an_activated_environment(active, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert typed(dqo_command("--version")) == f"{dqo.__version__}\n"


@pytest.mark.parametrize("folder", [BIN.parents[1], BIN.parent, BIN, Path("/")], ids=["clone", "venv", "bin", "root"])
def test_the_printed_command_runs_without_activation(folder: Path, inactive, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    assert typed(dqo_command("--version")) == f"{dqo.__version__}\n"


def test_the_printed_command_runs_from_a_folder_with_a_space(inactive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    environment, elsewhere = tmp_path / "my own env", tmp_path / "elsewhere"
    environment.symlink_to(sys.prefix)
    elsewhere.mkdir()
    monkeypatch.setattr(sys, "prefix", str(environment))
    for folder, program in ((tmp_path, "my own env/bin/dqo"), (elsewhere, f"{environment}/bin/dqo")):
        monkeypatch.chdir(folder)
        assert dqo_command("--version") == f"'{program}' --version"
        assert typed(dqo_command("--version")) == f"{dqo.__version__}\n"
