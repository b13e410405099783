"""What vLLM is sent of a LoRA model, and what becomes of the frozen weights: TRL's own engine, no vLLM behind it."""

import copy

import pytest
import torch
import trl.trainer.grpo_trainer
from peft import LoraConfig, get_peft_model
from scripted import build
from transformers import AutoModelForCausalLM
from vllm_engine import Engine, engine

from dqo.weight_sync import keep_frozen_weights

UPDATES = 4


def adapted(policy, dtype=torch.bfloat16, **settings):
    """The tiny model with an adapter on all linear layers, drawn so that it matters."""
    base = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype)
    model = get_peft_model(
        base, LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings)
    )
    step(model, 0)
    return model


def step(model, seed):
    """Change the adapter, as an update would; the generator is the seed's own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def frozen(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if not value.requires_grad}


def changed(model, before):
    return [name for name, value in frozen(model).items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_frozen_weights_stay_as_they_are(tiny_policy, mode):
    """TRL's own engine changes them, without which there would be nothing to keep."""
    ours = adapted(tiny_policy)
    theirs, before = copy.deepcopy(ours), frozen(ours)
    assert {value.dtype for value in before.values()} == {torch.bfloat16} and not changed(theirs, before)
    expected = engine(copy.deepcopy(ours)).update()  # before anything has drifted
    keeping, drifting = engine(ours, mode), engine(theirs, mode)
    keep_frozen_weights(keeping)
    for seed in range(UPDATES):
        step(ours, seed)
        step(theirs, seed)
        drifting.update()
        sent = keeping.update()
        assert list(sent) == list(expected)
        assert all(torch.equal(sent[name], value) for name, value in expected.items()) == (seed == 0)
    assert changed(ours, before) == []
    assert len(changed(theirs, before)) >= 10  # of 14 adapted weights


def test_what_is_sent_is_the_policy(tiny_policy):
    """Under the names of the model without adapters, with W + alpha / r B A for each adapted W, rounded once."""
    model = adapted(tiny_policy, lora_alpha=12)
    plain = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.bfloat16)
    keeping = engine(model)
    keep_frozen_weights(keeping)
    sent = keeping.update()
    assert list(sent) == [name for name, _ in plain.named_parameters()]
    state, adapters = model.state_dict(), 0
    for name, value in plain.named_parameters():
        stem = "base_model.model." + name.removesuffix(".weight")
        expected = value.detach().double()
        if (down := state.get(f"{stem}.lora_A.default.weight")) is not None:
            expected += 3.0 * state[f"{stem}.lora_B.default.weight"].double() @ down.double()
            adapters += 1
        torch.testing.assert_close(sent[name].double(), expected, rtol=2**-8, atol=1e-6)
    assert adapters == 14


def test_an_interrupted_update_leaves_the_model_as_it_was(tiny_policy):
    model = adapted(tiny_policy)
    before, keeping = frozen(model), engine(model)
    keep_frozen_weights(keeping)
    walk = keeping._iter_named_params()
    for _ in range(3):
        next(walk)
    walk.close()
    assert changed(model, before) == []
    model.merge_adapter()  # peft's own again
    assert changed(model, before)


def test_other_adapters_are_merged_by_trl(tiny_policy):
    """DoRA is more than a sum; TRL's way merges what it sends, in float32 here, where the drift is small."""
    model = adapted(tiny_policy, dtype=torch.float32, use_dora=True)
    keeping, expected = engine(model), engine(copy.deepcopy(model)).update()
    keep_frozen_weights(keeping)
    sent = keeping.update()
    assert list(sent) == list(expected)
    assert all(torch.equal(sent[name], value) for name, value in expected.items())
    assert not any(
        torch.equal(sent[name], value) for name, value in plain_weights(tiny_policy).items() if "proj" in name
    )


def plain_weights(policy):
    return dict(AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).named_parameters())


def test_a_trl_that_merges_or_names_otherwise_is_found_out(tiny_policy):
    model = adapted(tiny_policy)
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]

    class Merging(Engine):
        def _iter_named_params(self):
            self.model.base_model.merge_adapter()
            for name, value in self.model.named_parameters():
                yield name.removeprefix("base_model.model.").replace(".base_layer", ""), value.data
            self.model.base_model.unmerge_adapter()

    class Renaming(Engine):
        def _iter_named_params(self):
            for name, value in super()._iter_named_params():
                yield name.removeprefix("model."), value

    made = engine(model)
    for kind, message in (
        (Merging, "TRL has merged the adapters itself"),
        (Renaming, r"under the name model\.layers\.0"),
    ):
        other = kind(model, made.accelerator, None)
        keep_frozen_weights(other)
        with pytest.raises(RuntimeError, match=message):
            other.update()
        for layer in layers:
            if layer.merged:
                layer.unmerge()

    class Without:
        model, accelerator = made.model, made.accelerator

    with pytest.raises(AttributeError, match="_iter_named_params"):
        keep_frozen_weights(Without())


@pytest.mark.parametrize("lora", [True, False])
def test_the_trainer_keeps_them(tiny_policy, tiny_encoder, tmp_path, monkeypatch, lora):
    monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", Engine)
    trainer = build(tiny_policy, tiny_encoder, tmp_path, steps=1, lora=lora, use_vllm=True, vllm_mode="colocate")
    model = trainer.model
    assert isinstance(trainer.vllm_generation, Engine)
    step(model, 1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for _ in range(UPDATES):
        sent = trainer.vllm_generation.update()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert sent.keys() == plain_weights(tiny_policy).keys()
    untouched = [name for name, value in plain_weights(tiny_policy).items() if torch.equal(sent[name], value)]
    assert any("proj" in name for name in untouched) == (not lora)
