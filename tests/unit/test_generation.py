import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, MambaConfig, MistralConfig

from dqo.errors import DQOError
from dqo.generation import _draw, _mergeable, _warpers, plain_lora, sample, sample_texts, shares_prompts
from dqo.recipe import Sampling


@pytest.fixture(scope="module")
def model(tiny_policy):
    return AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32).eval()


def test_draw_follows_the_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, -math.inf, 1.0])
    draws = _draw(logits.expand(20000, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(draws, minlength=5)
    expected = logits.softmax(-1) * 20000
    assert counts[3] == 0
    keep = [0, 1, 2, 4]
    assert chisquare(counts[keep].numpy(), expected[keep].numpy(), sum_check=False).pvalue > 1e-3


def test_draw_never_takes_an_impossible_token():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    seen = {int(_draw(logits, torch.Generator().manual_seed(seed))) for seed in range(50)}
    assert seen == {1, 2}


def test_first_tokens_are_distributed_as_the_model_says(model):
    """Frequencies of the first two tokens against the exact probabilities from a plain forward pass."""
    prompt = [5, 17, 40, 41]
    rows = 6000
    drawn = sample(model, [prompt] * rows, Sampling(max_new_tokens=2, top_k=4), [], 0, torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1]
    top = first.topk(4).indices.tolist()
    probability = {}
    for token in top:
        with torch.no_grad():
            second = model(torch.tensor([[*prompt, token]])).logits[0, -1]
        follow = second.topk(4)
        for index, value in zip(follow.indices.tolist(), follow.values.softmax(-1).tolist(), strict=True):
            probability[token, index] = first[top].softmax(-1)[top.index(token)].item() * value
    counts = dict.fromkeys(probability, 0)
    for a, b in drawn:
        counts[a, b] += 1
    observed = [counts[pair] for pair in probability]
    assert chisquare(observed, [p * rows for p in probability.values()], sum_check=False).pvalue > 1e-3


def test_greedy_limit_equals_transformers(model):
    """top_k = 1 leaves one token, so every sampler must agree, whatever the padding and the dropping of rows."""
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13, 14], [8], [5, 6, 7]]
    ends = list(range(0, 600, 7))
    ours = sample(model, prompts, Sampling(max_new_tokens=12, top_k=1), ends, 0)
    for prompt, got in zip(prompts, ours, strict=True):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=ends,
            pad_token_id=0,
        )
        assert got == out[0, len(prompt) :].tolist()


@pytest.fixture
def adapted(tiny_policy):
    """The tiny model with an adapter that changes what it says."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    wrapped = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


def test_an_adapter_is_sampled_and_left_as_it_was(adapted, model):
    prompt, settings = [5, 6, 7], Sampling(max_new_tokens=10, top_k=1)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    got = sample(adapted, [prompt], settings, [], 0)[0]
    out = adapted.generate(
        input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=[], pad_token_id=0
    )
    assert got == out[0, len(prompt) :].tolist()
    assert got != sample(model, [prompt], settings, [], 0)[0], "the adapter must matter"
    after = adapted.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(layer.merged for layer in adapted.modules() if isinstance(layer, LoraLayer))


def test_an_interrupted_sample_leaves_the_adapter_unmerged(adapted):
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = adapted.get_base_model().base_model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample(adapted, [[5, 6, 7]], Sampling(max_new_tokens=4), [], 0)
    hook.remove()
    assert all(torch.equal(adapted.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(layer.merged for layer in adapted.modules() if isinstance(layer, LoraLayer))


def test_frozen_weights_in_half_precision_are_not_merged(adapted):
    """Rounding to bfloat16 would lose the adapter, so its own products must run."""
    layers = [layer for layer in adapted.modules() if isinstance(layer, LoraLayer)]
    assert list(_mergeable(adapted)) == layers
    layers[0].get_base_layer().bfloat16()
    assert not list(_mergeable(adapted))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},  # of the tiny model, the embedding's weight too
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
def test_what_is_no_plain_adapter_of_a_weight_of_its_own_is_not_merged(tiny_policy, settings):
    base = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32)
    assert plain_lora(base) is None
    plain = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert len(plain_lora(plain) or ()) == 2
    plain.merge_adapter()
    assert plain_lora(plain) is None
    plain.unmerge_adapter()
    assert plain_lora(get_peft_model(plain.unload(), LoraConfig(r=4, task_type="CAUSAL_LM", **settings))) is None


def test_a_diverged_policy_is_an_error(tiny_policy):
    broken = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(DQOError, match="logits are not finite"):
        sample(broken, [[5, 6]], Sampling(max_new_tokens=2), [], 0)


def test_temperature_and_nucleus_cut():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    warped = _warpers(Sampling(temperature=0.5, top_p=0.9))(torch.zeros(1, 1, dtype=torch.long), logits)
    assert torch.isfinite(warped[0]).tolist() == [True, True, False, False]  # .87, .12 of the mass
    assert warped[0, 0] == 6.0


def test_same_seed_same_responses(tiny_policy, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_policy, padding_side="left")
    prompts = [[{"role": "user", "content": text}] for text in ("a dog", "the boat sails far away")]

    def draw(seed):
        return sample_texts(
            model,
            tokenizer,
            prompts,
            3,
            Sampling(max_new_tokens=6),
            [tokenizer.eos_token_id],
            torch.Generator().manual_seed(seed),
        )

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert [len(group) for group in draw(3)] == [3, 3]
    for response in (response for group in draw(3) for response in group):
        assert response.tokens == 6 if response.truncated else response.tokens <= 6


def test_which_models_share_prompts():
    small = {
        "vocab_size": 10,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    assert shares_prompts(LlamaConfig(**small))
    assert not shares_prompts(MistralConfig(**small, num_key_value_heads=2, sliding_window=4))
    assert not shares_prompts(MambaConfig(vocab_size=10, hidden_size=8, num_hidden_layers=2))
    assert not shares_prompts(GraniteConfig(**small, logits_scaling=2.0))  # the head's output is scaled
