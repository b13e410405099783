"""What a training step costs on the real model, in one run: DQO, the same with alpha = 0, and stock TRL beside it.

Run alone on a quiet machine: `make bench`. Times are of whole optimiser steps (sampling, scoring, update).
"""

import json
import statistics
import time

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from dqo.bundled import bundled_models
from dqo.embedding import ResponseEncoder
from dqo.policy import default_device, load_tokenizer, trainable
from dqo.recipe import load
from dqo.rewards import RuleReward, TrlReward
from dqo.stages.training import configuration
from dqo.tasks import get_task
from dqo.trainer import DQOConfig, DQOTrainer

ROUNDS = 6


class Clock:
    """Seconds spent in a method, by wrapping it."""

    def __init__(self, owner, name):
        self.seconds = 0.0
        original = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)


@pytest.mark.benchmark
@pytest.mark.skipif(None in bundled_models().values(), reason="the bundled models are not installed")
def test_step_times(tmp_path, pytestconfig):
    recipe = load(pytestconfig.rootpath / "recipes/quickstart.yaml")
    task = get_task(recipe.task)
    rows = [json.loads(line) for line in task.bundled.read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list([{"prompt": task.prompt(row), **row} for row in rows])
    tokenizer, encoder = load_tokenizer(recipe.policy), ResponseEncoder(recipe.encoder)
    shared = {
        "max_completion_length": recipe.rl.sampling.max_new_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "beta": 0.0,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
    }
    # Every response runs to the full length in all three trainers: no end token, so equal work is compared.
    lengths = {"dqo": [], "alpha 0": [], "stock TRL": []}

    def dqo(alpha):
        args = DQOConfig(**configuration(recipe, recipe.rl, tmp_path, quality="reward", alpha=alpha, **shared))
        args.save_strategy = "no"
        args.measure_diversity = False
        return DQOTrainer(
            args=args, model=trainable(recipe.policy, default_device(), None), encoder=encoder,
            reward_funcs=TrlReward(RuleReward(task), task), train_dataset=data, processing_class=tokenizer,
        )  # fmt: skip

    def stock():
        k, rows_a_step = recipe.method.k, recipe.method.k * recipe.rl.prompts_per_step
        args = GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=rows_a_step, num_generations=k, use_cpu=True,
            max_completion_length=shared["max_completion_length"], report_to="none", disable_tqdm=True, max_steps=99,
            remove_unused_columns=False, dataloader_pin_memory=False, bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        # float32 without checkpointing is the kindest to stock TRL here: its bf16 autocast generates more slowly.
        policy = recipe.policy.model_copy(update={"dtype": "float32"})
        return GRPOTrainer(
            args=args, model=trainable(policy, default_device(), None), reward_funcs=TrlReward(RuleReward(task), task),
            train_dataset=data, processing_class=tokenizer,
        )  # fmt: skip

    trainers = {"dqo": dqo(1.0), "alpha 0": dqo(0.0), "stock TRL": stock()}
    embed = Clock(trainers["dqo"], "encoder")
    sample = {name: Clock(trainer, "_generate_single_turn") for name, trainer in trainers.items()}
    times = {name: [] for name in trainers}
    steps = {}
    for name, trainer in trainers.items():
        trainer.eos_token_ids = [tokenizer.pad_token_id + 10**6]
        if hasattr(trainer, "generation_config"):
            trainer.generation_config.eos_token_id = None
        trainer.create_optimizer()
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        steps[name] = iter(trainer.get_train_dataloader())
    for round_ in range(ROUNDS + 1):
        for name, trainer in trainers.items():
            before = {clock: clock.seconds for clock in (embed, sample[name])}
            batch = next(steps[name])
            start = time.perf_counter()
            trainer.training_step(trainer.model, batch, None)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            seconds = time.perf_counter() - start
            if round_:  # the first round warms up
                spent = [clock.seconds - value for clock, value in before.items()]
                times[name].append((seconds, spent[1], spent[0] if name == "dqo" else 0.0))
                lengths[name].append(trainer._metrics["train"]["completions/mean_length"][-1])
    print()
    for name, values in times.items():
        total, sampling, embedding = (statistics.median(column) for column in zip(*values, strict=True))
        print(
            f"{name:>10}: {total:5.2f} s a step (sampling {sampling:.2f}, embedding {embedding:.2f}, "
            f"update {total - sampling - embedding:.2f}), {statistics.mean(lengths[name]):.0f} tokens a response"
        )
    for other in ("alpha 0", "stock TRL"):
        ratios = [a[0] / b[0] for a, b in zip(times["dqo"], times[other], strict=True)]
        print(f"dqo / {other}: {statistics.median(ratios):.2f} (of {ROUNDS} paired steps)")
    assert all(torch.isfinite(p).all() for p in trainers["dqo"].model.parameters())
