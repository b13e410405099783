"""Two processes train what one trains: rollouts are given, everything behind them is the real trainer over gloo."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import ACCUMULATIONS, CASES, SPLIT, STEPS, run

ROOT = Path(__file__).parents[2]
SAME = (
    "loss", "grad_norm", "quality", "bonus", "log_volume", "demonstration_nll", "duplicate_rate", "truncation_rate",
    "unscorable_rate", "no_bonus_rate", "encoder_cut_share", "mean_tokens", "reward_std", "frac_reward_zero_std",
)  # fmt: skip
# TRL's means over the tokens of all processes, but of one micro-batch: over several it takes the mean of their means.
SAME_WITHOUT_ACCUMULATION = ("entropy", "kl", "clip_ratio/region_mean")

pytestmark = pytest.mark.slow


def in_two_processes(models: str, policy: Path, encoder: Path, output: Path) -> Path:
    """Folder of what each of two processes had of each case, with `whole` models or with `split` ones.

    Each kind has processes of its own: a second process group in the same ones would meet the first one's addresses in
    torchrun's store.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--redirects=3", f"--log-dir={output / 'logs'}", str(Path(__file__).with_name("layouts.py")), models]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += map(str, (policy, encoder, output))
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    said = [f"{path}:\n{path.read_text()[-3000:]}" for path in sorted(output.glob("logs/**/stderr.log"))]
    assert done.returncode == 0, "\n".join([*said, done.stderr[-2000:]])
    return output


@pytest.fixture(scope="module")
def two_processes(tiny_policy, tiny_encoder, tmp_path_factory):
    return in_two_processes("whole", tiny_policy, tiny_encoder, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def two_halves(tiny_policy, tiny_encoder, tmp_path_factory):
    return in_two_processes("split", tiny_policy, tiny_encoder, tmp_path_factory.mktemp("halves"))


@pytest.fixture(scope="module")
def one_process(tiny_policy, tiny_encoder, tmp_path_factory):
    work = tmp_path_factory.mktemp("one")
    gc.freeze()
    try:
        return {name: run(tiny_policy, tiny_encoder, work, name, 1, 1) for name in CASES}
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_trains(one_process, two_processes, name, accumulation):
    """Three groups of four: the middle one is cut in half, and with three micro-batches each group is."""
    metrics = SAME if accumulation > 1 else (*SAME, *SAME_WITHOUT_ACCUMULATION)
    compare(one_process[name], two_processes, f"{name}-{accumulation}", metrics)


def test_what_is_compared_is_measured(one_process):
    """A name that no run logs would compare nothing; the ties are those of whole groups."""
    logged = {name for result in one_process.values() for row in result["history"] for name in row}
    assert set(SAME) | set(SAME_WITHOUT_ACCUMULATION) <= logged
    assert max(row["kl"] for row in one_process["rl-kl"]["history"]) > 1e-4
    assert {round(3 * row["frac_reward_zero_std"], 6) for row in one_process["rl-tied"]["history"]} & {1.0, 2.0}


@pytest.mark.parametrize("name", SPLIT)
def test_a_model_split_over_two_processes_trains_as_a_whole_one(one_process, two_halves, name):
    """PyTorch's FSDP2 with the settings of `strategy: fsdp`, on CPUs that accelerate takes for accelerators."""
    compare(one_process[name], two_halves, f"{name}-fsdp", (*SAME, *SAME_WITHOUT_ACCUMULATION))


def compare(alone: dict[str, Any], folder: Path, run: str, metrics: tuple[str, ...]) -> None:
    ranks = [torch.load(folder / f"{run}-{rank}.pt") for rank in (0, 1)]
    assert len(alone["history"]) == STEPS
    for step, row in enumerate(alone["history"]):
        for rank in ranks:
            compared = [metric for metric in metrics if metric in row]
            assert {"loss", "grad_norm"} <= set(compared)
            got = {metric: rank["history"][step][metric] for metric in compared}
            assert got == pytest.approx({metric: row[metric] for metric in compared}, rel=1e-4, abs=2e-6), step
        if alone["advantages"]:
            together = ranks[0]["advantages"][step] + ranks[1]["advantages"][step]
            assert len(together) == 12
            np.testing.assert_allclose(together, alone["advantages"][step], atol=2e-5)
    moved = max((value - alone["before"][key]).abs().max().item() for key, value in alone["weights"].items())
    assert moved > 1e-3
    for key, value in alone["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][key], ranks[1]["weights"][key], rtol=0, atol=0)
        torch.testing.assert_close(ranks[0]["weights"][key], value, rtol=1e-3, atol=5e-3 * moved)
