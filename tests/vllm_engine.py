"""TRL's `VLLMGeneration` with a stand-in for vLLM, which keeps what it is sent. vLLM is not installed here."""

from types import SimpleNamespace
from typing import Any

import torch
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration


class Engine(VLLMGeneration):
    """Everything but `_init_vllm`, which starts or reaches vLLM, is TRL's own.

    Attributes:
        sent: Weights by name, copies of those of the latest update.
    """

    def _init_vllm(self) -> None:
        self.sent: dict[str, torch.Tensor] = {}
        model = SimpleNamespace(load_weights=self._take)
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        executor = SimpleNamespace(driver_worker=runner)
        self.llm = SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor), reset_prefix_cache=lambda: None)
        self.vllm_client = SimpleNamespace(update_named_params=self._stream, reset_prefix_cache=lambda: None)

    def _take(self, weights: Any) -> None:
        for name, weight in weights:
            assert name not in self.sent
            self.sent[name] = weight.detach().clone()

    def _stream(self, metadata: Any, weights: Any) -> None:
        self._take(weights)
        described = [
            (name, str(value.dtype).removeprefix("torch."), list(value.shape)) for name, value in self.sent.items()
        ]
        assert metadata == described

    def update(self) -> dict[str, torch.Tensor]:
        """Send the model's weights once; returns what was sent."""
        self.sent = {}
        self.sync_weights()
        return self.sent


def engine(model: Any, mode: str = "colocate", fsdp: int | None = None) -> Engine:
    """TRL's engine of a model that is whole, or split by this version of FSDP."""
    plugin = None if fsdp is None else SimpleNamespace(fsdp_version=fsdp)
    state = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=plugin)
    accelerator: Any = SimpleNamespace(state=state, is_main_process=True, device=torch.device("cpu"))
    made = Engine(model, accelerator, None, mode=mode)
    assert isinstance(made._dist, DistributedBackend)
    return made
