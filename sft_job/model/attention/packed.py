"""The function that models call for attention: documents kept apart, Ulysses around any backend.

It is registered with transformers under ``PACKED``; what it needs to know of the packing travels down as the keyword
argument ``packed``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.model.attention.call import AttentionCall, Packed
from sft_job.parallel.ulysses import gather_sequence, scatter_sequence

PACKED = "sft_job_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the layer's attention module.
        query: [1, H, T/u, D], positions applied.
        key: [1, K, T/u, D].
        value: [1, K, T/u, Dv].
        attention_mask: None: documents are kept apart by ``packed``.
        packed: documents, backend and Ulysses group.
        scaling: factor on the scores; None = 1/sqrt(D).
        dropout: probability with which attention weights are dropped.
        sliding_window: tokens that a query sees, itself included; None = all before it.
        softcap: scores are bent to +-softcap by tanh.
        other: what a model may pass besides; attention sinks and position biases are refused.

    Returns:
        [1, T/u, H, Dv] and None (no attention weights).

    Raises:
        JobError: the model needs what no backend offers (exit code 2).
    """
    unknown = [name for name in ("s_aux", "position_bias") if other.get(name) is not None]
    if unknown or other.get("is_causal") is False:
        raise JobError(ExitCode.CONFIG, f"this model's attention needs {unknown or 'no causal mask'}: not supported")
    call = AttentionCall(packed.documents, scaling, dropout, sliding_window, softcap)
    attend = _attend if packed.backend.traced else _untraced
    if packed.group is None:
        return attend(packed, query, key, value, call), None
    query, key, value = gather_sequence(query, key, value, packed.group)
    return scatter_sequence(attend(packed, query, key, value, call), packed.group), None


def _attend(packed: Packed, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
    return packed.backend.attend(query, key, value, call)


# As it stands, between two compiled graphs: traced, every new set of document lengths would compile anew.
_untraced: Any = torch.compiler.disable(_attend)


def register_packed_attention() -> None:
    """Make ``attn_implementation=PACKED`` known to transformers, through its public registry.

    It is not registered as a kind of mask: transformers then builds none, where it would otherwise look for document
    borders in the positions, which makes the CPU wait for the GPU in every forward.
    """
    AttentionInterface.register(PACKED, packed_attention)
