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
"""Time of a FLOP of attention over that of one of a matrix product: the backward of flash-attention has five products
where four are counted, and its kernels reach about four fifths of a product's rate (H200, flash-attention 4)."""


def packing_of(config: JobConfig) -> PackSettings:
    """How the run's rows become micro-batches, and what they cost with its model.

    From ``config.json`` alone, so that the preview plans as the run does. Where it does not tell the sizes, the cost is
    that of a common shape: only the balance depends on it, no result does.
    """
    settings = pack_settings(config)
    path = Path(config.model.partial_pretrain or "") / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        shape = FlopsShape.from_config(SimpleNamespace(**{**values, **(values.get("text_config") or {})}))
        return replace(settings, linear=1.0, quadratic=pair_cost(shape))
    except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError):
        return settings


def pair_cost(shape: FlopsShape) -> float:
    """Cost of a pair of tokens in attention where a token's other work costs 1.

    A causal forward has 2 FLOPs of a layer for each pair, head and channel, and 2 for each weight that a token passes.
    Layers with a sliding window are left out: beyond it, theirs grows with the length and not with its square.
    """
    pairs = shape.heads * shape.head_dim * (shape.layers - shape.sliding_layers)
    return ATTENTION_PRICE * pairs / shape.matmul_parameters
