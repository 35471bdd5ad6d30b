"""Real inputs for the data tests: tokenizers trained here, templates of several families, parquet files."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_job.data.cache import CacheSpec
from sft_job.data.columns import Column

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if no_think is defined %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = ["graph", "node", "edge", "path", "tree", "root", "leaf", "walk", "cycle", "degree", "near", "shortest"]


def words(random_: random.Random, count: int) -> str:
    return " ".join(random_.choice(WORDS) for _ in range(count))


@pytest.fixture(scope="session")
def backend() -> str:
    """A byte-level BPE tokenizer as JSON; every special token has the id of its place in SPECIAL."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([words(random.Random(0), 500)], trainer)
    return tokenizer.to_str()


@pytest.fixture
def save_tokenizer(backend: str, tmp_path: Path) -> Callable[..., Path]:
    """``save_tokenizer(template, eos_token=..., frame=...)`` saves a folder; frame = pieces of a TemplateProcessing."""

    def save(template: str | None = CHATML, *, name: str = "model", frame: str | None = None, **tokens: Any) -> Path:
        from tokenizers import Tokenizer, processors
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer.from_str(backend)
        if frame:
            ids = [(token, SPECIAL.index(token)) for token in frame.split() if token in SPECIAL]
            tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
        fast.chat_template = template
        fast.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def model_folder(save_tokenizer: Callable[..., Path]) -> Path:
    return save_tokenizer(CHATML, eos_token="<|im_end|>")


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def rows_file(path: Path, count: int, seed: int = 0, longest: int = 30) -> Path:
    random_ = random.Random(seed)
    prompts = [f"{row} {words(random_, random_.randint(1, longest))}" for row in range(count)]
    return write(path, prompt=prompts, response=[words(random_, random_.randint(0, longest)) for _ in range(count)])


@pytest.fixture
def spec(model_folder: Path, tmp_path: Path) -> Callable[..., CacheSpec]:
    """``spec(*files, **changes)`` with ChatML and no truncation."""

    def make(*files: Path, **changes: Any) -> CacheSpec:
        base = CacheSpec(
            split="train",
            files=files,
            prompt=(Column("data.prompt_key", "prompt"),),
            response=(Column("data.response_key", "response"),),
            tokenizer=model_folder,
            max_length=1000,
            truncation="error",
        )
        return replace(base, **changes)

    return make
