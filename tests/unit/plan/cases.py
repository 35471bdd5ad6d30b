"""Models and measured runs that plans are held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.shapes import SHAPES
from sft_job.config.schema import JobConfig
from sft_job.plan.cards import CARDS
from sft_job.plan.estimate import Estimate, Rows, estimate
from sft_job.plan.prices import Case, with_changes
from sft_job.plan.setup import Ranks
from sft_job.plan.shape import Shape, read_shape

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": SHAPES["qwen2.5-7b"],
    "qwen3-4b": SHAPES["qwen3-4b"],
    "llama-3-8b": LLAMA_8B,
}
LORA = {"model.lora_rank": 16, "model.lora_alpha": 32}
SEVEN = read_shape(SHAPES["qwen2.5-7b"])


def rows_of(*lengths: int, exact: bool = True, longest: int = 0) -> Rows:
    return Rows(np.array(lengths, dtype=np.int32), len(lengths), exact, longest or max(lengths), 1.0, "told")


def settings(rows: int = 2, **changes: Any) -> JobConfig:
    """Those of the measured runs: bf16 weights and states, all rows of a step in one micro-batch."""
    config = JobConfig()
    config.data.train_batch_size = config.data.micro_batch_size_per_gpu = rows
    config.model.fsdp_config.model_dtype = "bf16"
    return with_changes(config, changes)


def case(
    model: str = "qwen2.5-7b",
    lengths: tuple[int, ...] = (8192, 8192),
    ranks: Ranks = Ranks(1),  # noqa: B008  frozen
    card: str = "h200",
    **changes: Any,
) -> Case:
    changes = {"data.train_batch_size": len(lengths), "data.micro_batch_size_per_gpu": len(lengths), **changes}
    return Case(settings(**changes), read_shape(MODELS[model]), CARDS[card], ranks, rows_of(*lengths))


@dataclass(frozen=True)
class Measured:
    """A run on one H200: benchmarks/results/throughput_*_h200_2026-11-23.json; of LoRA only its peak is known."""

    name: str
    model: str
    lengths: tuple[int, ...]
    peak: float
    seconds: float | None
    levels: dict[str, int]
    changes: dict[str, Any] = field(default_factory=dict)

    def estimate(self) -> Estimate:
        config = settings(len(self.lengths), **self.changes)
        shape: Shape = read_shape(MODELS[self.model])
        return estimate(config, shape, CARDS["h200"], Ranks(1), rows_of(*self.lengths))


REFERENCE = {"model.compile": False, "model.attention": "sdpa"}
MEASURED = (
    Measured("full", "qwen2.5-7b", (8192, 8192), 115.18, 1.325, {"none": 28}),
    Measured("fp8", "qwen2.5-7b", (8192, 8192), 95.93, 1.010, {"none": 28}, {"model.fp8": "tensorwise"}),
    Measured("4b, 32k", "qwen3-4b", (32768,), 129.99, 3.226, {"attention": 6, "none": 30}),
    # The reference's rehearsal found that a plan with one block more did not fit, and kept two less.
    Measured("not compiled", "qwen2.5-7b", (8192, 8192), 127.55, 1.676, {"attention": 8, "none": 20}, REFERENCE),
    Measured("LoRA", "qwen2.5-7b", (8192,), 50.9, None, {"none": 28}, LORA),
)
