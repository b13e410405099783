"""What is made of a model that is split over processes: finished checkpoints.

As a script, for torchrun: `split_model.py POLICY FOLDER` splits by FSDP2 over CPU processes. It trains adapters and all
weights, each twice, to the end and again as if only the end of the stage had been interrupted.
"""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from layouts import call_the_cpu_an_accelerator, demonstrations

from dqo.distributed import environment
from dqo.recipe import parse
from dqo.stages import sft, training
from dqo.stages.context import Context, StageFolder

STEPS = 2
WEIGHTS = {"adapter": "adapter_model.safetensors", "full": "model.safetensors"}


class _Run:
    """Takes what MLflow would be told."""

    id = "run"

    def last_step(self, name: str) -> int:
        return 0

    def metrics(self, *_: Any) -> None:
        pass

    tags = metrics


def train(policy: Path, workspace: Path, strategy: str, kind: str, first: bool = True) -> StageFolder:
    """Train `adapter` or `full` weights on demonstrations, or find them trained; the `first` process writes."""
    lora = {"adapter": "{r: 4, alpha: 8}", "full": "null"}[kind]
    recipe = parse(
        f"""
        name: split
        policy: {{model: {policy}, dtype: float32, lora: {lora}}}
        sft: {{steps: {STEPS}, prompts_per_step: 2, save_every: {STEPS}, learning_rate: 0.01}}
        distributed: {{processes: 2, strategy: {strategy}}}
        """
    )
    context, folder = Context(recipe, workspace, ""), StageFolder(workspace, "sft", kind)
    progress: Any = lambda *_, **__: None  # noqa: E731
    run, card = _Run() if first else None, SimpleNamespace(digest="0")
    training.train(
        context, folder, progress, run,
        model_name="sft", key="0", settings=sft._settings(context, folder), rows=demonstrations(policy), parent=None,
        card=card, prompts_per_step=2,
    )  # fmt: skip
    return folder


def last_checkpoint(folder: StageFolder) -> Path:
    """What transformers has saved at the last step."""
    return folder.path / "checkpoints" / f"checkpoint-{STEPS}"


if __name__ == "__main__":
    policy, output = map(Path, sys.argv[1:3])
    os.environ.update(environment("fsdp"))
    call_the_cpu_an_accelerator()
    first = torch.distributed.get_rank() == 0
    for kind, weights in WEIGHTS.items():
        for attempt in ("trained", "resumed"):
            folder = train(policy, output / "workspace", "fsdp", kind, first)
            if first:
                shutil.copy(folder.output / weights, output / f"{kind}-{attempt}.safetensors")
                shutil.copy(last_checkpoint(folder) / weights, output / f"{kind}-checkpoint.safetensors")
            torch.distributed.barrier()
