"""Prompts and references that the encoder reads in part only: counted, logged by the trainer, said once."""

from types import SimpleNamespace

import pytest
from scripted import build

from dqo.embedding import ResponseEncoder
from dqo.files import read_jsonl
from dqo.recipe import Encoder
from dqo.rewards import TrlReward
from dqo.rewards.similarity import ReferenceSimilarity
from dqo.stages.training import _Recorder
from dqo.tasks import get_task

LONG = "an old storm came over the mountain and the boat went home " * 8  # the tiny encoder reads 64 tokens


def prompt(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_similarity_counts_what_the_last_call_compared(tiny_encoder):
    reward = ReferenceSimilarity(ResponseEncoder(Encoder(model=str(tiny_encoder)), "cpu"))
    assert reward.cut_shares == {}
    rows = [
        {"prompt": prompt("Who ran?"), "references": ["A dog.", LONG, "It was the dog."]},
        {"prompt": prompt(LONG + "Who?"), "references": ["Ducks."]},
    ]
    reward(["The dog did.", "Some ducks."], rows)
    assert reward.cut_shares == {"prompts": 1 / 2, "references": 1 / 4}
    reward(["The dog did.", "..."], rows)  # what has no words is compared with nothing
    assert reward.cut_shares == {"prompts": 0.0, "references": 1 / 3}  # known from the call before
    reward(["..."], rows[:1])
    assert reward.cut_shares == {}


def test_the_trainer_logs_it_and_the_recorder_says_it_once(tiny_policy, tiny_encoder, tmp_path):
    """All prompts are long, and one of each row's two references."""
    reward = ReferenceSimilarity(ResponseEncoder(Encoder(model=str(tiny_encoder)), "cpu"))
    told, tags = [], {}
    run = SimpleNamespace(last_step=lambda name: 0, metrics=lambda values, step: None, tags=tags.update)
    recorder = _Recorder(tmp_path, run, lambda kind, *_, **fields: told.append((kind, fields.get("message"))), None)
    trainer = build(
        tiny_policy, tiny_encoder, tmp_path, steps=2, alpha=0.7, min_prompt_similarity=-0.9, callbacks=[recorder],
        rows=[
            {"prompt": prompt(f"{i} {LONG}"[:420]), "instruction": "", "context": "", "references": ["A dog.", LONG]}
            for i in range(10)
        ],
        reward_funcs=TrlReward(reward, get_task("instruction")),
    )  # fmt: skip
    trainer.train()
    rows = read_jsonl(tmp_path / "history.jsonl")
    assert [row["encoder_cut_prompts"] for row in rows] == [1.0, 1.0]
    assert [row["encoder_cut_references"] for row in rows] == pytest.approx([0.5, 0.5])
    warnings = [message for kind, message in told if kind == "warning"]
    assert len(warnings) == 2
    assert "reads 100% of this step's prompts in part only" in warnings[0]
    assert "reads 50% of this step's references in part only" in warnings[1]
    assert set(tags) == {"dqo.encoder_cut_prompts", "dqo.encoder_cut_references"}
