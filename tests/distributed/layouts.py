"""Training runs that have to be the same in every layout, and the script that torchrun runs them with."""

import gc
import os
import sys
import typing
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from scripted import build, weights
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from dqo.data import encode_demonstration
from dqo.distributed import environment
from dqo.policy import load_tokenizer
from dqo.recipe import Policy
from dqo.trainer import DQOConfig

STEPS = 3


def halves_alike(completions, **_):
    """2/3 or 1/3 by the number of words: of the middle group, which two processes share, one half may be tied alone."""
    return [(2 if len(completion[-1]["content"].split()) > 1 else 1) / 3 for completion in completions]


SCORES = typing.get_args(typing.get_type_hints(DQOConfig)["score"])
FORMS = ("decoupled", "centred", "paper")
ACCUMULATIONS = (1, 3)
CASES: dict[str, dict[str, Any]] = {
    **{f"rl-{score}": {"score": score, "advantage": FORMS[i % 3]} for i, score in enumerate(SCORES)},
    "rl-reward-only": {"alpha": 0.0, "scale_rewards": "batch"},
    "rl-defended": {"drop_truncated": True, "min_prompt_similarity": 0.0, "min_quality": 0.15},
    "rl-tied": {"reward_funcs": halves_alike, "scale_rewards": "batch"},
    "rl-kl": {"beta": 0.1, "learning_rate": 2.0},
    "rl-full-fine-tuning": {"lora": False, "learning_rate": 0.05},
    "sft": {"quality": "demonstration", "alpha": 0.7},
    "sft-hot": {"quality": "demonstration", "alpha": 0.7, "temperature": 0.7},
    "sft-plain": {"quality": "demonstration", "alpha": 0.0},
}

SPLIT = ("rl-log_volume", "rl-kl", "rl-full-fine-tuning", "sft")


def demonstrations(policy: Path) -> list[dict[str, Any]]:
    """Ten prompts with two demonstrations each, of many lengths."""
    tokenizer = load_tokenizer(Policy(model=str(policy)))
    rows = []
    for index in range(10):
        prompt = [{"role": "user", "content": f"say {index}"}]
        texts = [f"the boat {'sails ' * (index % 4)}home.", f"a storm {index} comes{' again' * (index % 3)}."]
        encoded = [asdict(encode_demonstration(tokenizer, prompt, text)) for text in texts]
        rows.append({"prompt": prompt, "demonstrations": encoded})
    return rows


class _Rows(TrainerCallback):
    """What the recorder of a stage is given: the log history holds rounded texts."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:
            self.rows.append({name: float(value) for name, value in logs.items()})


def run(policy: Path, encoder: Path, work: Path, name: str, processes: int, accumulation: int) -> dict[str, Any]:
    """Train one case; returns what each process has of it."""
    settings = dict(CASES[name])
    if settings.get("quality") == "demonstration":
        settings |= {"rows": demonstrations(policy), "reward_funcs": None}
    recorded = _Rows()
    trainer = build(
        policy, encoder, work, steps=STEPS, processes=processes, accumulation=accumulation, callbacks=[recorded],
        **{"alpha": 0.7, **settings},
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    return {
        "advantages": getattr(trainer, "used", []),
        "before": before,
        "weights": weights(trainer),
        "history": recorded.rows,
    }


def call_the_cpu_an_accelerator() -> None:
    """accelerate 1.15 splits no model over CPU processes, though PyTorch can: tell it that these are accelerators."""
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


if __name__ == "__main__":
    models, policy, encoder, output = sys.argv[1], *map(Path, sys.argv[2:5])
    gc.freeze()  # each run collects garbage at its start; what is imported is none
    world, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    if models == "whole":
        for name in CASES:
            for accumulation in ACCUMULATIONS:
                result = run(policy, encoder, output / "work", name, world, accumulation)
                torch.save(result, output / f"{name}-{accumulation}-{rank}.pt")
    else:
        os.environ.update(environment("fsdp"))
        call_the_cpu_an_accelerator()
        for name in SPLIT:
            result = run(policy, encoder, output / "work", name, world, 1)
            assert all(isinstance(value, DTensor) for value in result["weights"].values())
            full = {key: value.full_tensor() for key, value in result["weights"].items()}
            torch.save(result | {"before": None, "weights": full}, output / f"{name}-fsdp-{rank}.pt")
