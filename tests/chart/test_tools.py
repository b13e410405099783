"""Which Helm and kubectl the tests take: from the path where they fit, else from npm, else the reason to skip."""

import subprocess
from pathlib import Path

import helm as tools
import pytest
from helm import PACKAGES, Package, ToolMissing


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the whole path, and an empty cache."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tools, "_failed", {})
    monkeypatch.setattr(tools, "TRIES", 1)
    return folder


def program(path: Path, text: str) -> Path:
    """A program that prints a text."""
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return path


def helm(major: int) -> Path:
    return tools.helm.__wrapped__(major)  # what an earlier test found does not count


def kubectl() -> Path:
    return tools.kubectl.__wrapped__()


def client(version: str) -> str:
    return f'{{"clientVersion": {{"gitVersion": "v{version}"}}}}'


def in_cache(package: Package, *names: str) -> Path:
    folder = tools.cache_folder() / f"{package.name.rpartition('-')[2]}-{package.version}"
    folder.mkdir(parents=True)
    for name in names:
        program(folder / name, "x")
    return folder


def test_helm_of_the_right_version_is_taken_from_the_path(path: Path):
    plain = program(path / "helm", "v4.1.4+g05fa379")
    assert helm(4) == plain
    with pytest.raises(ToolMissing, match="no suitable helm"):
        helm(3)
    own = program(path / "helm3", "v3.17.2+gcc0bbbd")
    assert helm(3) == own and helm(4) == plain


def test_a_helm_whose_name_promises_another_version_is_not_taken(path: Path):
    program(path / "helm3", "v4.1.4+g05fa379")
    plain = program(path / "helm", "v3.17.2+gcc0bbbd")
    assert helm(3) == plain


def test_kubectl_is_taken_from_the_path_where_npm_is_missing(path: Path):
    with pytest.raises(ToolMissing, match="no npm to fetch"):
        kubectl()
    found = program(path / "kubectl", client("1.36.0"))
    assert kubectl() == found
    program(path / "kubectl", client("1.20.2"))
    assert kubectl() == found  # old, and better than none


def test_a_newer_kubectl_goes_before_an_old_one_on_the_path(path: Path):
    folder = in_cache(PACKAGES[4], "helm", "kubectl")
    found = program(path / "kubectl", client("1.20.2"))
    assert kubectl() == folder / "kubectl"
    program(found, client("1.35.2"))
    assert kubectl() == found


def test_a_program_of_that_name_that_is_no_kubectl_is_not_taken(path: Path):
    program(path / "kubectl", "command not found: run an installer")
    with pytest.raises(ToolMissing):
        kubectl()


def test_npm_that_reaches_nothing_is_asked_once(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    npm = path / "npm"
    npm.write_text(f"#!/bin/sh\necho x >> {tmp_path}/asked\necho no network >&2\nexit 1\n")
    npm.chmod(0o755)
    for tool in (lambda: helm(4), kubectl, lambda: helm(4)):
        with pytest.raises(ToolMissing, match="no network"):
            tool()
    assert (tmp_path / "asked").read_text() == "x\n"


def test_the_version_that_goes_before_the_path_is_that_of_the_package():
    try:
        newest = tools._unpacked(PACKAGES[max(PACKAGES)]) / "kubectl"
    except ToolMissing as reason:
        pytest.skip(str(reason))
    done = subprocess.run([newest, "version", "--client", "--output=json"], capture_output=True, text=True)
    assert f'"minor": "{tools.KUBECTL}"' in done.stdout
