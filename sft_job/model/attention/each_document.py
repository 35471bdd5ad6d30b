"""Attention one document at a time: SDPA in its variants, and the plain formula for what SDPA lacks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sft_job.model.attention.call import AttentionCall, Documents, Needs

CUDNN_FROM = 4096
"""Longest row, in tokens, from which cuDNN's kernels win over a varlen call in spite of a launch for each document."""


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """Causal mask [length, length], True where a query may look; a window counts the query's own token."""
    ahead = torch.arange(length, device=device)
    distance = ahead[:, None] - ahead[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def _per_document(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Run ``attend`` on each document alone: [1, h, T, d] in, [1, T, H, Dv] out."""
    lengths = list(documents.lengths)
    parts = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), v.split(lengths, dim=2), strict=True)
    return torch.cat([attend(*part) for part in parts], dim=2).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, whichever kernel torch chooses."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        windowed = call.window is not None and call.window < length
        mask = _window_mask(length, call.window, q.device) if windowed else None
        return F.scaled_dot_product_attention(
            q, k, v, mask, call.dropout, is_causal=mask is None, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    return _per_document(q, k, v, call.documents, attend)


def cudnn(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """SDPA through cuDNN where it can, which on Hopper is nearly twice as fast as torch's own kernel."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        return sdpa(q, k, v, call)


def eager(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """The formula as it stands, with a whole matrix of scores for each document."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(2, 3) * (call.scale if call.scale is not None else q.shape[3] ** -0.5)
        if call.softcap is not None:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        scores = scores.masked_fill(~_window_mask(q.shape[2], call.window, q.device), float("-inf"))
        # Softmax in at least fp32, as the models' own eager attention has it.
        wide = torch.promote_types(q.dtype, torch.float32)
        weights = F.dropout(scores.softmax(dim=-1, dtype=wide).to(q.dtype), call.dropout)
        return weights @ v

    return _per_document(q, k, v, call.documents, attend)


def sdpa_lacks(needs: Needs) -> str | None:
    """What SDPA does not offer."""
    return "no logit soft cap" if needs.softcap else None


def cudnn_lacks(needs: Needs) -> str | None:
    """What cuDNN does not offer, or offers only slowly."""
    if needs.capability < (9, 0):
        return "Hopper or later only"
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return "bf16 only"
    if needs.head_dim > 128 or needs.head_dim % 8:
        return f"head_dim {needs.head_dim}: multiples of 8 up to 128 only"
    if needs.longest < CUDNN_FROM:
        return f"rows of at most {needs.longest} tokens: a call for each is slow"
    for name in ("window", "softcap", "dropout", "deterministic"):
        if getattr(needs, name):
            return f"no {name}"
    return None
