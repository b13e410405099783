"""Run by torchrun in tests/unit/test_trainer.py: two steps, then each process writes its advantages and weights."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from scripted import build, weights

policy, encoder, output = map(Path, sys.argv[1:4])
world = int(os.environ["WORLD_SIZE"])
trainer = build(policy, encoder, output / "work", steps=2, processes=world)
trainer.train()
torch.save(
    {
        "advantages": trainer.used,
        "weights": weights(trainer),
        "volume": [row["log_volume"] for row in trainer.state.log_history if "log_volume" in row],
    },
    output / f"rank{os.environ['RANK']}.pt",
)
