"""How a model is split over processes: accelerate's settings of each strategy, and whether this machine can follow.

`dqo/accelerate/<strategy>.yaml` are configuration files of `accelerate launch`. The stages start their processes with
torchrun's agent, which reads no such file, so `environment` has accelerate translate it.
"""

import importlib.util
from pathlib import Path

from dqo.errors import DQOError
from dqo.recipe import Recipe


def configuration_file(strategy: str) -> Path:
    """The file for `accelerate launch --config_file`."""
    return Path(__file__).parent / "accelerate" / f"{strategy}.yaml"


def environment(strategy: str) -> dict[str, str]:
    """The variables that `accelerate launch` would set for a strategy's file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = ["--config_file", str(configuration_file(strategy)), "--main_process_port", "0", "worker.py"]
    settings, file, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if settings.use_deepspeed:
        settings.deepspeed_fields_from_accelerate_config = ",".join(file.deepspeed_config)
        variables = prepare_deepspeed_cmd_env(settings)[1]
    else:
        variables = prepare_multi_gpu_env(settings)
    return {name: value for name, value in variables.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def require_machine(recipe: Recipe) -> None:
    """Check that this machine alone can train a recipe with its processes and strategy.

    Raises:
        DQOError: If the recipe wants several nodes, or as `require_node`.
    """
    if recipe.distributed.nodes > 1:
        raise DQOError(
            f"distributed.nodes: got {recipe.distributed.nodes}; several nodes train on a cluster with Kubeflow "
            "Trainer only; expected 1 here"
        )
    require_node(recipe)


def require_node(recipe: Recipe) -> None:
    """Check that this machine can be one of a recipe's nodes.

    Raises:
        DQOError: If accelerators or DeepSpeed are missing.
    """
    import torch

    strategy, processes = recipe.distributed.strategy, recipe.processes_per_node
    accelerators = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise DQOError(
            f"distributed.strategy: got {strategy!r}, which is DeepSpeed's, and it is not installed here; install "
            "dqo-pipelines[gpu] on a machine with accelerators, or use 'fsdp' or 'ddp'"
        )
    if strategy != "ddp" and accelerators == 0:
        raise DQOError(
            f"distributed.strategy: got {strategy!r}, which splits the model over accelerators, and this machine has "
            "none; expected 'ddp' here"
        )
    if 0 < accelerators < processes:
        raise DQOError(
            f"distributed.processes: got {processes}, one an accelerator, and {accelerators} can be seen here "
            "(CUDA_VISIBLE_DEVICES counts); lower distributed.processes and resources.accelerator_count"
        )
