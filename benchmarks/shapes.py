"""Model folders of the benchmarks: a config of a known shape and a tokenizer, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}
_QWEN2_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {**_QWEN2, **_QWEN2_7B},
    "qwen2.5-7b-long": {**_QWEN2, **_QWEN2_7B, "max_position_embeddings": 1048576},
    "qwen2.5-7b-long-20-layers": {**_QWEN2, **_QWEN2_7B, "max_position_embeddings": 1048576, "num_hidden_layers": 20},
    "qwen2.5-7b-long-7-layers": {**_QWEN2, **_QWEN2_7B, "max_position_embeddings": 1048576, "num_hidden_layers": 7},
    "qwen3-4b": {
        **_QWEN2,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny8": {
        **_QWEN2,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "tiny": {
        **_QWEN2,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
"""Name -> config.json. ``tiny`` and ``tiny8`` are for trying the scripts on a CPU."""


def write_model_folder(folder: Path, shape: str) -> Path:
    """A folder that ``model.init=random`` and transformers' ``from_config`` can use; left alone where it is there."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    # The benchmarks' rows are token ids already: the tokenizer is there because both sides insist on one.
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=1) + "\n", encoding="utf-8")
    return folder
