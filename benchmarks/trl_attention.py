"""Attention over packed documents for the peer: flash-attention 4, called directly, under transformers' own interface.

TRL's padding-free collator gives every layer the borders of the documents; on a CPU the same borders cut the sequence
for torch's SDPA, so that the peer's script can be tried without a GPU.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "benchmark_packed"


def register() -> str:
    """Make it known to transformers; its name for ``attn_implementation``."""
    AttentionInterface.register(NAME, packed_attention)
    return NAME


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention of a layer, [1, H, T, D] in, [1, T, H, D] out.

    Raises:
        ValueError: the batch is not one packed sequence.
    """
    del module, attention_mask, ignored
    if cu_seq_lens_q is None or max_length_q is None or query.shape[0] != 1:
        raise ValueError("this attention wants one packed sequence with the borders of its documents")
    attend = _flash4 if query.is_cuda else _sdpa
    return attend(query, key, value, cu_seq_lens_q, int(max_length_q), scaling), None


def _flash4(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float | None) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func  # noqa: PLC0415  # pyright: ignore  an optional package

    heads_last = [tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v)]
    out = flash_attn_varlen_func(
        *heads_last,
        cu_seqlens_q=borders,
        cu_seqlens_k=borders,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
    )
    return (out[0] if isinstance(out, tuple) else out)[None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, scale: float | None) -> Tensor:
    del longest
    parts: list[Tensor] = []
    for start, end in pairwise(borders.tolist()):
        one_q, one_k, one_v = (tensor[:, :, start:end] for tensor in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        parts.append(
            F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True, scale=scale, enable_gqa=grouped)
        )
    return torch.cat(parts, dim=2).transpose(1, 2)
