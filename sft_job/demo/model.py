"""The demo's base model: a small Qwen3-shaped decoder with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM


def write_base_model(tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int) -> int:
    """Write weights and config beside the tokenizer's files; the number of parameters.

    Args:
        tokenizer: its vocabulary and its special tokens are the model's.
        folder: the tokenizer's folder.
        seed: the same seed gives the same weights; the process's random state is left as it was.
    """
    special: Any = tokenizer  # transformers types its token ids as almost anything
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,  # at this width the usual 0.02 takes many more steps to start learning
        bos_token_id=None,
        eos_token_id=special.eos_token_id,
        pad_token_id=special.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return model.num_parameters()
