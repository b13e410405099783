"""A DQO trainer whose rollouts are given by their place in the batch, so every process layout sees the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from dqo.embedding import ResponseEncoder
from dqo.policy import default_device, load_tokenizer, trainable
from dqo.recipe import Encoder, Lora, Policy
from dqo.trainer import DQOConfig, DQOTrainer

WORDS = "river boat storm lantern violin bakery mountain winter garden letter".split()


class ScriptedTrainer(DQOTrainer):
    """Rollouts come from a table; everything behind them is the real trainer. Keeps the advantages it used."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        offset = self.accelerator.process_index * len(prompt_ids)
        step = self.state.global_step
        responses = []
        for index in range(offset, offset + len(prompt_ids)):
            count = 1 + (index * 7 + step * 3) % 5
            text = " ".join(WORDS[(index * 3 + step + j * (1 + index % 3)) % len(WORDS)] for j in range(count))
            responses.append(self._tokenizer(text, add_special_tokens=False)["input_ids"] + [self.eos_token_ids[0]])
        return responses, None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if "advantages" in output:
            self.used = [*getattr(self, "used", []), output["advantages"].tolist()]
        return output


def reward(completions, **_):
    """Length of the response, in tenths; one word in the table cannot be judged."""
    texts = [completion[-1]["content"] for completion in completions]
    return [None if text.startswith("violin") else len(text.split()) / 10 for text in texts]


def build(
    policy: Path,
    encoder: Path,
    output: Path,
    *,
    steps: int,
    processes: int = 1,
    prompts: int = 3,
    k: int = 4,
    lora: bool = True,
    callbacks: list[TrainerCallback] | None = None,
    cls: type[DQOTrainer] = ScriptedTrainer,
    reward_funcs: Any = reward,
    rows: list[dict[str, Any]] | None = None,
    accumulation: int = 1,
    embedded_text: Callable[[str], str | None] = str,
    **settings: Any,
) -> DQOTrainer:
    """A trainer on the tiny models, float32."""
    spec = Policy(model=str(policy), dtype="float32", lora=Lora(r=4, alpha=8) if lora else None)
    args = DQOConfig(
        **{
            "output_dir": str(output),
            "max_steps": steps,
            "per_device_train_batch_size": prompts * k // processes // accumulation,
            "gradient_accumulation_steps": accumulation,
            "steps_per_generation": accumulation,
            "num_generations": k,
            "max_completion_length": 16,
            # Plain gradient descent: Adam turns rounding errors of tiny gradients into whole steps.
            "optim": "sgd",
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "loss_type": "dr_grpo",
            "scale_rewards": "none",
            "beta": 0.0,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "dataloader_pin_memory": False,
            "gradient_checkpointing": False,
            "remove_unused_columns": False,
            **settings,
        }
    )
    rows = rows or [{"prompt": [{"role": "user", "content": f"{word} {index}"}]} for index, word in enumerate(WORDS)]
    torch.manual_seed(0)
    return cls(
        args=args,
        model=trainable(spec, default_device(), None),
        encoder=ResponseEncoder(Encoder(model=str(encoder)), "cpu"),
        reward_funcs=reward_funcs,
        embedded_text=embedded_text,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(spec),
        callbacks=callbacks,
    )


def weights(trainer: DQOTrainer) -> dict[str, torch.Tensor]:
    """The trained parameters by name, without a wrapper's prefix."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
