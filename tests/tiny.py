"""A tiny random policy and encoder in ordinary folders: the real code paths in milliseconds."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from dqo.tasks import get_task

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 600 tokens, trained on the bundled stories."""
    task = get_task("story")
    rows = [json.loads(line) for line in task.bundled.read_text(encoding="utf-8").splitlines()]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((text for row in rows for text in row["references"]), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<pad>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_policy(folder: Path, width: int = 32) -> Path:
    """Save a random two-layer Llama with its tokenizer: 40,000 parameters, of width 192 800,000."""
    torch.manual_seed(7)
    fast = tokenizer()
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=fast.bos_token_id,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_encoder(folder: Path) -> Path:
    """Save a random sentence-transformers model with mean pooling, 16 dimensions."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    torch.manual_seed(8)
    fast = tokenizer()
    backbone = folder.with_name(folder.name + "-backbone")
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(backbone)
    fast.save_pretrained(backbone)
    transformer = Transformer(str(backbone), max_seq_length=64)
    SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").save(str(folder))
    return folder


def reward_model_config(labels: int, **changes) -> LlamaConfig:
    """Configuration of a small random Llama that scores."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaConfig(vocab_size=len(tokenizer()), num_labels=labels, **(sizes | changes))


def write_reward_model(folder: Path, labels: int = 1, padding: str = "pad", **changes) -> Path:
    """Save a random reward model; `padding` says what configuration and tokenizer name as the padding token."""
    torch.manual_seed(3)
    fast = tokenizer()
    changes["pad_token_id"] = fast.pad_token_id if padding == "pad" else None
    LlamaForSequenceClassification(reward_model_config(labels, **changes)).save_pretrained(folder)
    if padding == "none":
        fast.pad_token = None
    elif padding == "eos":
        fast.pad_token = fast.eos_token
    # Ends like most templates do: with the end-of-sequence token.
    fast.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}{% endfor %}"
        "{{ '<|im_end|>' }}"
    )
    fast.save_pretrained(folder)
    return folder
