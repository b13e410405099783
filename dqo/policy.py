"""Loading the model that is trained: tokenizer, base weights, adapters.

peft takes as long to import as torch and transformers together: the functions that put adapters on import it, so that
what reads a tokenizer alone does not wait for it.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dqo.bundled import locate
from dqo.checkpoint import CheckpointCard
from dqo.errors import DQOError
from dqo.recipe import Policy

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def resolve_dtype(policy: Policy, device: torch.device) -> torch.dtype:
    """Turn the recipe's `policy.dtype` into a torch dtype for this device."""
    if policy.dtype != "auto":
        return getattr(torch, policy.dtype)
    # Trained weights stay in float32: bfloat16 cannot hold an optimiser's small updates.
    return torch.bfloat16 if policy.lora is not None and computes_in_bfloat16(device) else torch.float32


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def load_tokenizer(policy: Policy) -> "PreTrainedTokenizerBase":
    """Load the policy's tokenizer, padding on the left.

    Raises:
        DQOError: If it cannot be found or has no chat template.
    """
    location = locate(policy.model, policy.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.load, revision=location.hub_revision, padding_side="left")
    except (OSError, ValueError) as error:
        raise DQOError(_load_failure("tokenizer of policy.model", policy.model, error)) from error
    if not tokenizer.chat_template:
        raise DQOError(
            f"policy.model {policy.model!r}: its tokenizer has no chat template; expected a chat or instruct model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_ids(policy: Policy) -> list[int]:
    """Tokens that the model's generation configuration lists as ends of a response; empty where it lists none."""
    location = locate(policy.model, policy.revision)
    try:
        listed = GenerationConfig.from_pretrained(location.load, revision=location.hub_revision or "main").eos_token_id
    except OSError:
        return []
    return listed if isinstance(listed, list) else [listed] if listed is not None else []


def highest_entropy(policy: Policy) -> float:
    """Entropy of the uniform distribution over the model's vocabulary, in nats: log of its size.

    Raises:
        DQOError: If the model's configuration cannot be found.
    """
    location = locate(policy.model, policy.revision)
    try:
        config = AutoConfig.from_pretrained(location.load, revision=location.hub_revision)
    except (OSError, ValueError) as error:
        raise DQOError(_load_failure("policy.model", policy.model, error)) from error
    return math.log(config.get_text_config().vocab_size)


def end_of_turn_ids(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> list[int]:
    """Every token that ends a response: the tokenizer's and those of the model's generation configuration."""
    from_model = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = from_model if isinstance(from_model, list) else [from_model]
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *listed] if i is not None))


def load_base(policy: Policy, device: torch.device, dtype: torch.dtype | None = None) -> "PreTrainedModel":
    """Load the base model's weights onto a device, in eval mode.

    Raises:
        DQOError: If the model cannot be found or loaded.
    """
    location = locate(policy.model, policy.revision)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            location.load, revision=location.hub_revision, dtype=dtype or resolve_dtype(policy, device)
        )
    except (OSError, ValueError) as error:
        raise DQOError(_load_failure("policy.model", policy.model, error)) from error
    return model.to(device).eval()


def trainable(policy: Policy, device: torch.device, parent: Path | None) -> "PreTrainedModel | PeftModel":
    """Return the model to train: the base, or a parent checkpoint, with a trainable adapter unless `lora` is null.

    Args:
        policy: The recipe's policy section.
        device: Where to put it.
        parent: Folder of the checkpoint to continue from; `None` starts at the base model.
    """
    if policy.lora is None:
        if parent is not None:
            policy = policy.model_copy(update={"model": str(parent), "revision": None})
        return load_base(policy, device)
    base = load_base(policy, device)
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model

    if parent is not None:
        return PeftModel.from_pretrained(base, str(parent), is_trainable=True)
    lora = LoraConfig(
        r=policy.lora.r,
        lora_alpha=policy.lora.alpha,
        lora_dropout=policy.lora.dropout,
        target_modules=policy.lora.target_modules,
        task_type=TaskType.CAUSAL_LM,
    )
    return get_peft_model(base, lora)


def load_for_inference(policy: Policy, device: torch.device, checkpoint: Path | None) -> "PreTrainedModel":
    """Load the base model or a checkpoint for sampling, adapters merged.

    The merge is made in float32 and rounded once: bfloat16 weights would swallow an adapter's small updates.
    """
    if checkpoint is None:
        return load_base(policy, device)
    if CheckpointCard.read(checkpoint).weights == "full":
        return load_base(policy.model_copy(update={"model": str(checkpoint), "revision": None}), device)
    from peft import PeftModel

    base = load_base(policy, device, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(base, str(checkpoint)).merge_and_unload()
    return merged.to(resolve_dtype(policy, device)).eval()


def _load_failure(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{what} {name!r}: cannot be loaded ({reason}); expected a local directory, a hub id that is reachable or in "
        "the hub cache, or bundled:smollm2-135m-instruct"
    )
