"""Small real inputs: a trained tokenizer, models of several families, parquet rows of very unequal lengths."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("alpha", "beta", "gamma", "graph", "node", "edge", "path", "short", "long", "tree", "root", "walk", "degree")


def sentence(random_: random.Random, words: int) -> str:
    return " ".join(random_.choice(WORDS) for _ in range(words))


def save_tokenizer(folder: Path, template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer with <|im_end|> as its eos token, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentence(random.Random(0), 400)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def model_config(kind: str, vocab_size: int, **more: Any) -> Any:
    """Config of a two-block model: qwen3 and gemma tied, qwen2, llama and gemma2 as their families are."""
    import transformers

    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    extra: dict[str, dict[str, Any]] = {
        "qwen2": {"tie_word_embeddings": False},
        "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
        "llama": {"tie_word_embeddings": False, "num_key_value_heads": 4},
        "gemma": {"head_dim": 8, "num_key_value_heads": 1},
        "gemma2": {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
        "mistral": {"sliding_window": 16},
    }
    classes = {
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "llama": transformers.LlamaConfig,
        "gemma": transformers.GemmaConfig,
        "gemma2": transformers.Gemma2Config,
        "mistral": transformers.MistralConfig,
    }
    return classes[kind](**{**sizes, **extra[kind], **more})


def save_model(
    folder: Path, kind: str = "qwen3", template: str | None = CHATML, file_size: str = "5GB", **sizes: Any
) -> Path:
    """A model folder with random weights (norms and biases away from their neutral start) and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = save_tokenizer(folder, template)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model_config(kind, len(tokenizer), **sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size=file_size)
    return folder


def write_rows(path: Path, count: int, seed: int = 0, longest: int = 40) -> Path:
    """Prompt/response rows: most short, a few long, one with an empty response."""
    random_ = random.Random(seed)
    prompts, responses = [], []
    for row in range(count):
        long = row % 7 == 3
        prompts.append(f"{row} " + sentence(random_, random_.randint(1, longest if long else 5)))
        responses.append("" if row == 1 else sentence(random_, random_.randint(1, longest // 2 if long else 6)))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": prompts, "response": responses}), path)
    return path
