"""Run a compiled pipeline on this machine with Kubeflow's local runner, and follow it.

Kubeflow's runner works in a process of its own (`python -m pipelines.local`), whose output, with every library's
warnings, goes to a log file. The stages report to a progress file; this process draws it.
"""

import hashlib
import importlib.util
import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

import dqo
from dqo.errors import DQOError
from dqo.files import write_text
from dqo.recipe import Recipe
from dqo.tracking import public


@dataclass(frozen=True)
class RunFolder:
    """Files of one recipe's runs below the output folder; the recipe's digest is in the name.

    Attributes:
        root: The output folder, shared by all recipes: MLflow's store and the workspace.
        path: This recipe's folder.
    """

    root: Path
    path: Path

    @classmethod
    def of(cls, recipe: Recipe, root: Path) -> "RunFolder":
        """Return the folder of a recipe."""
        root = root.resolve()
        return cls(root, root / f"{recipe.name}-{recipe.digest[:8]}")

    @property
    def workspace(self) -> Path:
        """Checkpoints and finished stages, keyed by what they depend on."""
        return self.root / "workspace"

    @property
    def log(self) -> Path:
        """Output of the runner and of every library."""
        return self.path / "run.log"

    @property
    def report(self) -> Path:
        """The finished report."""
        return self.path / "report.html"

    @property
    def result(self) -> Path:
        """What the run produced, as JSON: written last, so its presence means success."""
        return self.path / "result.json"


def library_digest() -> str:
    """Version and digest of the installed library's source, so that Kubeflow's cache sees changed code."""
    digest = hashlib.sha256()
    folder = Path(dqo.__file__).parent
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".html", ".css", ".js", ".jsonl", ".yaml"):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{dqo.__version__}+{digest.hexdigest()[:12]}"


def tracking_uri(recipe: Recipe, root: Path) -> str:
    """MLflow's address: the recipe's, else MLFLOW_TRACKING_URI, else an sqlite file in the output folder."""
    from dqo.tracking import default_uri

    return recipe.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(root)


@dataclass(frozen=True)
class Docker:
    """Run the stages in containers.

    Attributes:
        token: Tells the containers of this call from others.
        network: Docker network; None chooses one.
    """

    token: str = field(default_factory=lambda: secrets.token_hex(6))
    network: str | None = None


def start(recipe: Recipe, folder: RunFolder, fresh: bool, docker: Docker | None = None) -> subprocess.Popen[bytes]:
    """Check everything that can be checked at once, compile, and start the runner's process.

    Args:
        recipe: The recipe.
        folder: Where its runs are.
        fresh: Forget what is there.
        docker: Run the stages in containers of `resources.image`; None runs them in processes.

    Raises:
        DQOError: If the data, a model, the reward, the judge or MLflow cannot be used; nothing has been started then.
    """
    from dqo import defences, judges, rewards
    from dqo.bundled import identity
    from dqo.data import source_fingerprint
    from dqo.distributed import require_machine
    from dqo.mlflow_errors import in_words
    from dqo.tasks import get_task
    from dqo.tracking import check_registered_name, client_of
    from pipelines.pipeline import compile_recipe

    task = get_task(recipe.task)
    source = source_fingerprint(recipe.data, task)
    rewards.check(recipe, task)
    defences.check(recipe, task)
    if recipe.judge is not None:
        judges.check(recipe.judge)
    # Only a look: rebuilding the bundled model (once) is for the runner's process, whose output goes to the log.
    models = [identity(name, revision) for name, revision in recipe.models]
    uri = tracking_uri(recipe, folder.root)
    client = client_of(uri, "trained", "tracking.uri")
    with in_words(f"look up the registered model {recipe.registry.name!r}"):
        check_registered_name(client, recipe.registry.name)
    containers = None
    if docker is not None:
        from pipelines.containers import prepare

        containers = prepare(recipe, folder.root, uri, docker.network, docker.token)
    elif recipe.rl.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise DQOError(
            "rl.rollout.engine: got 'vllm', which is not installed here; install dqo-pipelines[gpu] on a machine with "
            "a GPU, or use 'transformers'"
        )
    if recipe.processes > 1:
        require_machine(recipe)
    if fresh:
        _require_idle(folder.workspace)
        shutil.rmtree(folder.path, ignore_errors=True)
        shutil.rmtree(folder.workspace, ignore_errors=True)
    _drop_stale_cache(recipe, folder, uri)
    library = library_digest()
    if containers is not None:
        from pipelines.containers import check, image_identity

        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / "artifacts").mkdir(exist_ok=True)
        library = f"{check(containers, uri)} {image_identity(containers.image)}"
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.result.unlink(missing_ok=True)
    write_text(folder.path / "recipe.yaml", recipe.to_yaml())
    compile_recipe(recipe, folder.path / "pipeline.yaml")
    arguments = {
        "recipe_json": recipe.to_json(),
        "workspace": str(folder.workspace),
        "mlflow_uri": uri,
        "library": " ".join([library, *models]),
        "source": source,
    }
    write_text(folder.path / "arguments.json", json.dumps(arguments, indent=1))
    (folder.path / "containers.json").unlink(missing_ok=True)
    if containers is not None:
        write_text(folder.path / "containers.json", containers.to_json())
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    names = [name for name, _ in recipe.models]
    offline = all(name.startswith("bundled:") or Path(name).expanduser().exists() for name in names)
    if offline and recipe.data.source != "public" and not recipe.data.source.startswith("hub:"):
        environment["HF_HUB_OFFLINE"] = "1"  # nothing to ask the hub for; without a network it would retry
    # A GPU a process: with two in sight of one process, transformers would wrap the model for both, which TRL refuses.
    environment.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(recipe.processes))))
    with folder.log.open("ab") as log:
        log.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S')} {recipe.name} {recipe.digest}\n".encode())
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.local", str(folder.path)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the runner and the stage it runs: ask first, so that MLflow's run is closed, then insist."""
    for number, patience in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
        deadline = time.monotonic() + patience
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()  # reaps the runner, which ends at once; its stage is still closing MLflow's run
                os.killpg(process.pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def _require_idle(workspace: Path) -> None:
    """Refuse to delete what another run is working on.

    Raises:
        DQOError: If a stage's lock is held.
    """
    for path in workspace.glob("stages/*/.lock"):
        try:
            FileLock(path).acquire(timeout=0)
        except Timeout:
            raise DQOError(
                f"--fresh: another run is working in {path.parent}; stop it first, or give this one another --out"
            ) from None


def _drop_stale_cache(recipe: Recipe, folder: RunFolder, uri: str) -> None:
    """Kubeflow's cache remembers the MLflow run; forget it when that run is gone (another or a deleted store)."""
    from mlflow import MlflowClient

    from dqo.mlflow_errors import in_words
    from dqo.tracking import is_active

    remembered = folder.workspace / "runs" / f"{recipe.name}-{recipe.digest}.json"
    if not remembered.is_file():
        return
    with in_words("look for the run that this pipeline continues"):
        alive = is_active(MlflowClient(uri), json.loads(remembered.read_text(encoding="utf-8"))["run_id"])
    if not alive:
        remembered.unlink()
        shutil.rmtree(folder.path / "cache", ignore_errors=True)


def _watch_parent() -> None:
    """End this process group when the command line is gone, even by SIGKILL: nothing may train on unseen."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpgid(0), signal.SIGTERM)


def _main(path: Path) -> None:
    """Body of the runner's process."""
    threading.Thread(target=_watch_parent, daemon=True).start()
    from kfp import local

    from dqo.recipe import parse
    from pipelines.pipeline import build

    arguments = json.loads((path / "arguments.json").read_text(encoding="utf-8"))
    recipe = parse(arguments["recipe_json"])
    runner = local.SubprocessRunner(use_venv=False)
    if (path / "containers.json").is_file():
        from pipelines.containers import Containers, fetch_models, run_pipeline_in

        fetch_models(recipe)
        runner = run_pipeline_in(Containers(**json.loads((path / "containers.json").read_text(encoding="utf-8"))))
    local.init(
        runner,
        pipeline_root=str(path / "artifacts"),
        enable_caching=True,
        cache_root=str(path / "cache"),
        raise_on_error=True,
    )
    build(recipe, cluster=False)(**arguments)
    shutil.copyfile(_newest(path, "evaluate/report"), path / "report.html.part")
    (path / "report.html.part").rename(path / "report.html")
    evaluation = json.loads(_newest(path, "evaluate/evaluation/evaluation.json").read_text(encoding="utf-8"))
    registration = json.loads(_newest(path, "register/registration").read_text(encoding="utf-8"))
    result = {
        "registration": registration,
        "metrics": {name: model["metrics"] for name, model in evaluation["models"].items()},
        "prompts": evaluation["prompts"],
        "n": evaluation["n"],
        "confidence": evaluation["confidence"],
        "mlflow_uri": public(arguments["mlflow_uri"]),
        "mlflow_experiment": registration["mlflow_experiment"],
        "mlflow_run": registration["mlflow_run"],
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
    }
    write_text(path / "result.json", json.dumps(result, indent=1) + "\n")


def _newest(path: Path, artifact: str) -> Path:
    """An artifact of the newest run that wrote it: Kubeflow's cache leaves the others in the folders of earlier runs.

    The folders' names end in the time of their run.
    """
    return max((path / "artifacts").glob(f"*/{artifact}"), key=lambda file: file.relative_to(path / "artifacts").parts)


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]))
    except DQOError as error:
        sys.exit(str(error))
