"""What is made of a model that is split over processes: finished checkpoints, and what vLLM is sent.

As a script, for torchrun: `split_model.py POLICY FOLDER` splits by FSDP2 over CPU processes. It trains adapters and all
weights, each twice, to the end and again as if only the end of the stage had been interrupted. Then it sends a model
with adapters to a stand-in for vLLM.
"""

import copy
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from layouts import call_the_cpu_an_accelerator, demonstrations
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from vllm_engine import engine

from dqo.distributed import environment
from dqo.recipe import parse
from dqo.stages import sft, training
from dqo.stages.context import Context, StageFolder
from dqo.weight_sync import keep_frozen_weights

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


def update_vllm(policy: Path) -> dict[str, Any]:
    """Send bfloat16 weights with adapters three times.

    Returns:
        `sent` first and `expected` from the whole model; names of frozen weights of this process that `changed`.
    """
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.bfloat16()  # FSDP2 splits weights of one type together
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = engine(copy.deepcopy(model)).update()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    before = {name: value.to_local().clone() for name, value in model.named_parameters() if not value.requires_grad}
    vllm = engine(model, fsdp=2)
    keep_frozen_weights(vllm)
    sent, _, _ = vllm.update(), vllm.update(), vllm.update()
    after = {name: value.to_local() for name, value in model.named_parameters()}
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    return {"sent": sent, "expected": expected, "changed": changed, "frozen": len(before)}


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
    torch.save(update_vllm(policy), output / f"vllm-{torch.distributed.get_rank()}.pt")
