"""What rows cost, by the model's own sizes: the measure by which they are spread over ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from sft_job.config.schema import JobConfig
from sft_job.data.packing import PackSettings, pack_settings
from sft_job.metrics.flops import FlopsShape

ATTENTION_PRICE = 1.3
"""Time of a FLOP of attention over that of one of all other work, on an H200 with flash-attention 4.

Measured: two steps, less their optimizer, give 1.26: 1.325 s for two documents of 8,192 tokens of Qwen2.5-7B and
3.224 s for one of 32,768 of Qwen3-4B (``benchmarks/results/throughput_*_h200_2026-11-23.json``), solved for both rates,
621 and 492 TFLOP/s. A profile of the first gives 1.46: kernels of short documents are slower. The backward has five
products where four are counted.
"""


def packing_of(config: JobConfig) -> PackSettings:
    """How the run's rows become micro-batches, and what they cost with its model.

    From ``config.json`` alone, so that the preview plans as the run does. Where it does not tell the sizes, the cost is
    that of a common shape: only the balance depends on it, no result does.
    """
    settings = pack_settings(config)
    lora = config.model.lora_rank > 0 or config.model.lora_adapter_path is not None
    path = Path(config.model.partial_pretrain or "") / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        shape = FlopsShape.from_config(SimpleNamespace(**{**values, **(values.get("text_config") or {})}))
        return replace(settings, linear=1.0, quadratic=pair_cost(shape, frozen_weights=lora))
    except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError):
        return settings


def pair_cost(shape: FlopsShape, *, frozen_weights: bool = False) -> float:
    """Cost of a pair of tokens in attention where a token's other work costs 1.

    A causal forward has 2 FLOPs of a layer for each pair, head and channel, and 2 for each weight that a token passes.
    With frozen weights (LoRA) a token's other work is two thirds: there are no products for the weights' gradients.
    Layers with a sliding window are left out: beyond it, theirs grows with the length and not with its square.
    """
    pairs = shape.heads * shape.head_dim * (shape.layers - shape.sliding_layers)
    token = shape.matmul_parameters * (2 / 3 if frozen_weights else 1)
    return ATTENTION_PRICE * pairs / token
