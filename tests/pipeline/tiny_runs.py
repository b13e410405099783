"""Running the command line on tiny recipes, for the tests of whole pipelines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import yaml

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden" / "quickstart.yaml"
STORES = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
STAGES = ["prepare", "sft", "rl-reward_only", "rl-dqo", "evaluate", "register"]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    # A test that has read a store in this process has named it there for every process that comes after.
    inherited = {name: value for name, value in os.environ.items() if name not in STORES}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(recipe: Path, out: Path, *options: str, timeout: float = 450) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("run", recipe, "--out", out, *options),
        capture_output=True, text=True, timeout=timeout, env=environment(),
    )  # fmt: skip


def write_recipe(path: Path, policy_folder: Path, encoder_folder: Path, **changes) -> Path:
    recipe = {
        "name": "tiny",
        "policy": {"model": str(policy_folder), "dtype": "float32", "lora": {"r": 4, "alpha": 8}},
        "encoder": {"model": str(encoder_folder)},
        "data": {"max_prompts": 60, "eval_fraction": 0.2},
        "method": {"alpha": 1.0, "k": 4},
        "sft": {"steps": 3, "prompts_per_step": 4},
        "rl": {"steps": 4, "prompts_per_step": 2, "save_every": 2, "sampling": {"max_new_tokens": 12}},
        "evaluation": {"prompts": 6, "n": 4, "sampling": {"max_new_tokens": 12}, "bootstrap_draws": 200},
        "registry": {"name": "tiny-stories"},
    }
    for section, values in changes.items():
        recipe[section] = recipe.get(section, {}) | values
    path.write_text(yaml.safe_dump(recipe))
    return path


def events(out: Path) -> list[dict]:
    (path,) = (out / "workspace" / "progress").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def started(happened: list[dict]) -> list[str]:
    return [event["stage"] for event in happened if event["event"] == "start"]


def runs_of(out: Path) -> dict[str, mlflow.entities.Run]:
    """The runs of the store by their names."""
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "dqo"]
    return {run.data.tags["mlflow.runName"]: run for run in client.search_runs([experiment.experiment_id])}


def registered_model(out: Path) -> mlflow.pyfunc.PyFuncModel:
    mlflow.set_tracking_uri(f"sqlite:///{out}/mlflow.db")
    mlflow.set_registry_uri(f"sqlite:///{out}/mlflow.db")
    return mlflow.pyfunc.load_model("models:/tiny-stories@challenger")
