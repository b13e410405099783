"""Whole weights of a split model, for finished checkpoints, also where only a stage's end is repeated, and for vLLM.

FSDP is PyTorch's own, over gloo. **DeepSpeed is not installed here**: a minimal engine stands in for its own, with the
methods that accelerate and the stage ask it for, so what is tested is who is asked for what, not DeepSpeed.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from split_model import WEIGHTS, last_checkpoint, train
from transformers import Trainer

import dqo.stages.training as training
from dqo.trainer import DQOTrainer

ROOT = Path(__file__).parents[2]


class Engine:
    """What is asked of a DeepSpeed engine: the whole weights, which are nowhere else with ZeRO-3.

    Args:
        module: The model, whose parameters are empty with ZeRO-3.
        whole: Its weights by name.
        gather: `stage3_gather_16bit_weights_on_model_save`.
    """

    def __init__(self, module: torch.nn.Module, whole: dict[str, torch.Tensor], gather: bool) -> None:
        self.module, self._whole, self._gather = module, whole, gather

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        return self._gather

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, torch.Tensor]:
        parameters = self.module.named_parameters(remove_duplicate=False)
        wanted = [name for name, value in parameters if value.requires_grad or not exclude_frozen_parameters]
        return {name: self._whole[name] for name in wanted}


class ZeroAccelerator:
    """accelerate's own `get_state_dict`, told that DeepSpeed is there; `deepspeed_config` comes with the engine."""

    distributed_type = DistributedType.DEEPSPEED

    def __init__(self, stage: int) -> None:
        self.state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))

    def prepare(self, loader: Any) -> Any:
        return loader

    def unwrap_model(self, model: Any) -> torch.nn.Module:
        return model.module if isinstance(model, Engine) else model

    def get_state_dict(self, model: Any) -> dict[str, torch.Tensor]:
        names = ("deepspeed", "deepspeed.checkpoint", "deepspeed.checkpoint.utils")
        modules: dict[str, Any] = {name: ModuleType(name) for name in names}
        modules[names[-1]].clone_tensors_for_torch_save = lambda weights: {k: v.clone() for k, v in weights.items()}
        with patch.dict(sys.modules, modules):
            return Accelerator.get_state_dict(self, model)


class ZeroTrainer(DQOTrainer):
    """Trains on the CPU and shows itself, before and after, as transformers leaves a trainer with DeepSpeed.

    That is: `model` is the bare model, with ZeRO-3 of empty parameters, and `model_wrapped` the engine once the model
    was prepared, and not before.
    """

    stage: ClassVar[int]
    gather: ClassVar[bool]
    steps: ClassVar[int]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._bare = self.accelerator
        self._split(prepared=False)

    def train(self, **kwargs: Any) -> Any:
        self._join()
        result = super().train(**kwargs)
        type(self).steps += self.state.global_step
        self._split(prepared=True)
        return result

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.is_deepspeed_enabled:  # its own `train`
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._join()
        self._load_from_checkpoint(resume_from_checkpoint)
        self._split(prepared=True)
        return self.model_wrapped, train_dataloader

    def _split(self, prepared: bool) -> None:
        self._whole = {name: value.data for name, value in self.model.named_parameters(remove_duplicate=False)}
        if self.stage == 3:
            for value in self.model.parameters():
                value.data = torch.empty(0)
        self.is_deepspeed_enabled, self.accelerator = True, ZeroAccelerator(self.stage)
        if prepared:
            self.accelerator.deepspeed_config = {"zero_optimization": {"stage": self.stage}}
            self.model_wrapped = self.deepspeed = Engine(self.model, self._whole, self.gather)

    def _join(self) -> None:
        for name, value in self.model.named_parameters():
            value.data = self._whole[name]
        self.is_deepspeed_enabled, self.accelerator = False, self._bare


def assert_same(got: Path, expected: Path) -> dict[str, torch.Tensor]:
    """Both hold the same weights; one of two tied names may be missing."""
    mine, theirs = load_file(got), load_file(expected)
    assert mine.keys() ^ theirs.keys() <= {"lm_head.weight"}
    for name in mine.keys() & theirs.keys():
        assert torch.equal(mine[name], theirs[name]), name
    return mine


def assert_trained(weights: dict[str, torch.Tensor], policy: Path, kind: str) -> None:
    """All weights have moved from those of the policy, and all that begin at zero in an adapter from there."""
    base = load_file(policy / "model.safetensors")
    if kind == "full":
        assert base.keys() <= weights.keys()
        assert not any(torch.equal(weights[name], value) for name, value in base.items())
    else:
        raised = [value for name, value in weights.items() if "lora_B" in name]
        assert len(raised) == 14 and all(value.count_nonzero() for value in raised)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("stage", "gather"), [(2, False), (3, True), (3, False)])
def test_zero(stage: int, gather: bool, kind: str, tiny_policy: Path, tmp_path: Path, monkeypatch):
    """The finished checkpoint holds what transformers saved at the last step, before the weights were split."""
    monkeypatch.setattr(training, "DQOTrainer", ZeroTrainer)
    for name, value in {"stage": stage, "gather": gather, "steps": 0}.items():
        monkeypatch.setattr(ZeroTrainer, name, value, raising=False)
    for _ in ("trained", "resumed"):
        folder = train(tiny_policy, tmp_path, f"zero{stage}", kind)
        weights = assert_same(folder.output / WEIGHTS[kind], last_checkpoint(folder) / WEIGHTS[kind])
        assert_trained(weights, tiny_policy, kind)
        assert ZeroTrainer.steps == 2  # and no step more the second time


def test_transformers_prepares_a_model_under_the_name_that_is_called():
    names = list(inspect.signature(Trainer._prepare_for_training).parameters)
    assert names == ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"]


@pytest.fixture(scope="module")
def two_halves(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make of models that FSDP2 has split."""
    output = tmp_path_factory.mktemp("halves")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(__file__).with_name("split_model.py")), str(tiny_policy), str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


@pytest.mark.slow
@pytest.mark.parametrize("attempt", ["trained", "resumed"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_fsdp(two_halves: Path, tiny_policy: Path, kind: str, attempt: str):
    weights = assert_same(two_halves / f"{kind}-{attempt}.safetensors", two_halves / f"{kind}-checkpoint.safetensors")
    assert_trained(weights, tiny_policy, kind)


@pytest.mark.slow
def test_fsdp_sends_vllm_whole_merged_weights_and_keeps_the_frozen_ones(two_halves: Path):
    """What TRL sends of the whole model, in each process."""
    for rank in (0, 1):
        result = torch.load(two_halves / f"vllm-{rank}.pt")
        assert result["sent"].keys() == result["expected"].keys()
        for name, value in result["expected"].items():
            torch.testing.assert_close(result["sent"][name], value, rtol=2**-7, atol=1e-3)
        assert result["frozen"] == 20 and result["changed"] == []
