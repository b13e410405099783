"""Strategies: the files of `accelerate launch`, what the stages make of them, and which machine can follow."""

import importlib.util

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from trl import GRPOConfig

from dqo.distributed import configuration_file, environment, require_machine
from dqo.errors import DQOError
from dqo.recipe import Distributed, Rollout, parse
from dqo.stages.context import Context, running

STRATEGIES = Distributed.model_json_schema()["properties"]["strategy"]["enum"]
KINDS = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accelerate_reads_the_file(strategy):
    config = load_config_from_file(str(configuration_file(strategy)))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type.value == KINDS[strategy]
    assert config.mixed_precision == "no" and config.num_machines == 1
    stage = config.deepspeed_config.get("zero_stage") if config.deepspeed_config else None
    assert stage == {"zero2": 2, "zero3": 3}.get(strategy)


def test_fsdp_reaches_the_plugin():
    """accelerate's own plugin, read from the variables as in a process of a stage."""
    with patch_environment(**environment("fsdp")):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"


def test_the_strategies_switch_on_what_they_say():
    assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & environment("ddp").keys()
    assert environment("fsdp")["ACCELERATE_USE_FSDP"] == "true"
    for stage in ("2", "3"):
        variables = environment(f"zero{stage}")
        assert variables["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage
        # Else DeepSpeed would step at each micro-batch, whatever the recipe says.
        assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in variables
    assert environment("zero3")["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


def two_processes(strategy):
    return parse(f"name: a\npolicy: {{dtype: float32}}\ndistributed: {{processes: 2, strategy: {strategy}}}")


def test_processes_without_accelerators_are_for_ddp(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_machine(two_processes("ddp"))
    with pytest.raises(DQOError, match=r"distributed.strategy: got 'fsdp'.*this machine has none; expected 'ddp'"):
        require_machine(two_processes("fsdp"))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_machine_without_deepspeed_names_the_extra(strategy):
    with pytest.raises(DQOError, match=rf"got '{strategy}'.*not installed here; install dqo-pipelines\[gpu\]"):
        require_machine(two_processes(strategy))


def test_fewer_accelerators_than_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DQOError, match=r"distributed.processes: got 2, one an accelerator, and 1 can be seen here"):
        require_machine(two_processes("ddp"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_machine(two_processes("fsdp"))


def test_a_stage_that_torchrun_has_started_is_refused_before_it_waits_for_the_lock(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(DQOError, match=r"starts its training processes itself; got WORLD_SIZE 2"),
        running(Context(two_processes("ddp"), tmp_path, ""), "sft", "0"),
    ):
        pytest.fail("the stage has started")
    assert not list(tmp_path.iterdir())


def test_every_vllm_setting_of_a_recipe_is_one_of_trl_with_its_default():
    fields = GRPOConfig.__dataclass_fields__
    for name, field in Rollout.model_fields.items():
        if name != "engine":
            assert fields[f"vllm_{name}"].default == field.default, name
    left = {name for name in fields if name.startswith("vllm_")} - {f"vllm_{name}" for name in Rollout.model_fields}
    # What the CHANGELOG names, and TRL's deprecated name of the upper bound.
    assert left == {
        "vllm_model_impl", "vllm_structured_outputs_regex", "vllm_server_host", "vllm_server_port",
        "vllm_importance_sampling_cap",
    }  # fmt: skip
