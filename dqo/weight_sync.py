"""Sending a LoRA policy to vLLM without touching its frozen weights.

TRL merges the adapters into the frozen weights, sends these, and subtracts the adapters again. In bfloat16, the type of
frozen weights on a GPU, the difference is not always what was there before, so the frozen weights drift with each
update of vLLM's weights, one an optimiser step. A checkpoint holds the adapters alone: they would have been trained on
other weights than those that they are put on afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from torch.distributed.tensor import DTensor

from dqo.generation import plain_lora


def keep_frozen_weights(engine: Any) -> None:
    """Have a TRL vLLM engine send merged weights that are computed beside the frozen ones, one layer at a time.

    Needs memory for one merged layer, and sends what TRL sends at its first update, bit for bit. Works for models that
    are whole in each process (DDP, ZeRO-2), gathered (ZeRO-3) or split by FSDP2. TRL's own way stays, with its drift,
    for adapters that are not plain LoRA (`dqo.generation.plain_lora`), and for FSDP1, which no recipe uses.

    Args:
        engine: TRL's `VLLMGeneration` of a peft model. Its `_iter_named_params` is replaced, which goes over the
            parameters under vLLM's names and calls the model's `merge_adapter` and `unmerge_adapter` before and after.

    Raises:
        AttributeError: If TRL's engine has no such method.
    """
    walk, model = engine._iter_named_params, engine.model
    fsdp = getattr(engine.accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.fsdp_version == 1:
        return

    def merged_parameters() -> Iterator[tuple[str, Tensor]]:
        layers = plain_lora(model)
        if layers is None:
            yield from walk()
            return
        missing = {_sent_name(path): layer for path, layer in layers.items()}
        with _merging_switched_off(model):
            for name, weight in walk():
                layer = missing.pop(name, None)
                if layer is not None and layer.merged:
                    raise RuntimeError(f"{name}: TRL has merged the adapters itself, so they would be sent twice")
                yield name, weight if layer is None else _with_adapters(layer, weight)
        if missing:
            raise RuntimeError(f"TRL sends no weight under the name {min(missing)}, so its adapter was not sent")

    engine._iter_named_params = merged_parameters


def _sent_name(path: str) -> str:
    """TRL's name, which is vLLM's, for the weight of the LoRA layer at `path` of a peft model."""
    # The second prefix is that of activation checkpointing with FSDP.
    return path.removeprefix("base_model.model.").replace("_checkpoint_wrapped_module.", "") + ".weight"


@contextmanager
def _merging_switched_off(model: Any) -> Iterator[None]:
    """Let `merge_adapter` and `unmerge_adapter` of a peft model do nothing."""
    model.merge_adapter = model.unmerge_adapter = lambda *_, **__: None  # found before those of the model inside
    try:
        yield
    finally:
        del model.merge_adapter, model.unmerge_adapter


@torch.no_grad()
def _with_adapters(layer: LoraLinear, weight: Tensor) -> Tensor:
    """Add a layer's active adapters to its whole frozen weight, `(out, in)`, in a new tensor of the same type."""
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            delta = layer.get_delta_weight(adapter)
            if isinstance(delta, DTensor):
                delta = delta.full_tensor()  # in all processes, like the weight, which TRL has gathered
            weight = (weight + delta).to(weight.dtype)
    return weight
