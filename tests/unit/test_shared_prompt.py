"""Sharing prompts must change neither log-probabilities nor gradients; the reference is the plain forward pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dqo.shared_prompt import add_shared_prompt_forward, prefill

UNLIKE = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
# The first two tokens are common to all; the second prompt is the beginning of the third.
ALIKE = [[5, 6, 7, 8, 9], [5, 6, 11], [5, 6, 11, 12]]
NESTED = [[5, 6], [5, 6, 7], [5, 6, 7, 8]]
ROWS = [0, 0, 1, 2, 2, 0]
RESPONSES = [[20, 21, 22], [23], [24, 25, 26, 27], [28, 29], [30], [31, 32, 33, 34]]
TEMPERATURE = 0.7


def build(folder, lora):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    add_shared_prompt_forward(model)
    if not lora:
        return model
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def shared(model, prompts):
    ids, mask = padded(prompts)
    longest = max(map(len, RESPONSES))
    completion = torch.tensor([r + [0] * (longest - len(r)) for r in RESPONSES])
    completion_mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in RESPONSES])
    return model(
        input_ids=ids,
        attention_mask=mask,
        completion_ids=completion,
        completion_mask=completion_mask,
        prompt_rows=torch.tensor(ROWS),
        temperature=TEMPERATURE,
    )


def plain(model, prompts):
    """Each response alone, no padding, no cache: log-probabilities and entropies as nested lists of tensors."""
    log_probs, entropies = [], []
    for row, response in zip(ROWS, RESPONSES, strict=True):
        prompt = prompts[row]
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / TEMPERATURE
        steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        log_probs.append(steps.gather(-1, torch.tensor(response)[:, None])[:, 0])
        entropies.append(-(steps.exp() * steps).sum(-1))
    return log_probs, entropies


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("prompts", [UNLIKE, ALIKE, NESTED], ids=["unlike", "alike", "nested"])
def test_equals_whole_sequences(tiny_policy, prompts, lora):
    model = build(tiny_policy, lora)
    got = shared(model, prompts)
    expected, entropies = plain(model, prompts)
    weights = [torch.linspace(-1, 1, len(r)) + index for index, r in enumerate(RESPONSES)]
    for index, response in enumerate(RESPONSES):
        torch.testing.assert_close(got.log_probs[index, : len(response)], expected[index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.entropy[index, : len(response)], entropies[index], rtol=1e-4, atol=1e-5)
        assert not got.log_probs[index, len(response) :].any()

    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(
        sum((got.log_probs[i, : len(r)] * w).sum() for i, (r, w) in enumerate(zip(RESPONSES, weights, strict=True))),
        parameters,
    )
    reference = torch.autograd.grad(sum((lp * w).sum() for lp, w in zip(expected, weights, strict=True)), parameters)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "common"),
    [(UNLIKE, 0), (ALIKE, 2), (NESTED, 1), ([[5, 6, 7]], 0), ([[5, 6, 7], [5, 6, 7]], 2), ([[5], [5, 6]], 0)],
)
def test_what_prompts_begin_with_runs_once(tiny_policy, prompts, common):
    """Each prompt keeps a token of its own: its last hidden state predicts the response."""
    model = build(tiny_policy, False)
    calls = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prefilled = prefill(model, *padded(prompts))
    width = max(map(len, prompts))
    assert calls == [(1, common)] * bool(common) + [(len(prompts), width - common)]
    assert prefilled.next_position.tolist() == [len(prompt) for prompt in prompts]
    assert prefilled.mask.sum(-1).tolist() == [len(prompt) for prompt in prompts]


def test_without_completions_the_forward_is_unchanged(tiny_policy):
    ids = torch.tensor([[5, 6, 7]])
    reference = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(build(tiny_policy, False)(ids).logits, reference)
