"""Attention over packed documents: named backends with declared abilities, Ulysses around any of them.

The model calls one function, registered with transformers under ``PACKED``; what it needs to know of the packing
travels down as the keyword argument ``packed``. Shapes: T tokens of the whole packed sequence, u Ulysses ranks,
H query heads, K key/value heads, D head dim; after the Ulysses exchange H and K are the heads of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.parallel.ulysses import gather_sequence, scatter_sequence

PACKED = "sft_job_packed"


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed sequence begin and end.

    Attributes:
        lengths: tokens of each document, padding at the end included as one.
        cu_seqlens: int32 [documents + 1] on the computing device: the documents' borders.
        max_seqlen: the longest document.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int


@dataclass(frozen=True)
class AttentionCall:
    """What a model's layer asks for besides q, k and v."""

    documents: Documents
    scale: float | None
    dropout: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class Needs:
    """What a model and its device need of a backend."""

    device: str
    dtype: torch.dtype
    head_dim: int
    window: bool = False
    softcap: bool = False
    dropout: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over packed documents.

    Attributes:
        name: for the log and the config.
        attend: (q [1, H, T, D], k [1, K, T, D], v [1, K, T, Dv], call) -> [1, T, H, Dv].
        lacks: the reason why it cannot serve these needs, None where it can.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]
    lacks: Callable[[Needs], str | None]


@dataclass(frozen=True)
class Packed:
    """The keyword argument ``packed`` that travels down to every attention layer."""

    documents: Documents
    backend: Backend
    group: dist.ProcessGroup | None


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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        windowed = call.window is not None and call.window < length
        mask = _window_mask(length, call.window, q.device) if windowed else None
        return F.scaled_dot_product_attention(
            q, k, v, mask, call.dropout, is_causal=mask is None, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    return _per_document(q, k, v, call.documents, attend)


def _eager(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
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


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  only where CUDA is

    cu_seqlens, longest = call.documents.cu_seqlens, call.documents.max_seqlen
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))  # [T, H, D]
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), scale=call.scale)
    assert isinstance(out, Tensor)
    return out[None]


def _sdpa_lacks(needs: Needs) -> str | None:
    return "no logit soft cap" if needs.softcap else None


def _varlen_lacks(needs: Needs) -> str | None:
    if needs.device != "cuda":
        return "CUDA only"
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return "bf16 only"
    if needs.head_dim > 256 or needs.head_dim % 8:
        return f"head_dim {needs.head_dim}: multiples of 8 up to 256 only"
    for name in ("window", "softcap", "dropout", "deterministic"):
        if getattr(needs, name):
            return f"no {name}"
    return None


BACKENDS: tuple[Backend, ...] = (
    Backend("torch_varlen", _torch_varlen, _varlen_lacks),
    Backend("sdpa", _sdpa, _sdpa_lacks),
    Backend("eager", _eager, lambda needs: None),
)
"""Fastest first."""


def choose_backend(needs: Needs, backends: Sequence[Backend] = BACKENDS) -> tuple[Backend, str]:
    """The first backend that offers all that is needed, and a line for the log that says why.

    Raises:
        JobError: none does (exit code 2).
    """
    passed: list[str] = []
    for backend in backends:
        reason = backend.lacks(needs)
        if reason is None:
            why = f" ({'; '.join(passed)})" if passed else ""
            return backend, f"attention: {backend.name}{why}"
        passed.append(f"{backend.name}: {reason}")
    raise JobError(ExitCode.CONFIG, f"no attention backend serves this model: {'; '.join(passed)}")


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
    if packed.group is None:
        return packed.backend.attend(query, key, value, call), None
    query, key, value = gather_sequence(query, key, value, packed.group)
    return scatter_sequence(packed.backend.attend(query, key, value, call), packed.group), None


def register_packed_attention() -> None:
    """Make ``attn_implementation=PACKED`` known to transformers, through its public registry.

    It is not registered as a kind of mask: transformers then builds none, where it would otherwise look for document
    borders in the positions, which makes the CPU wait for the GPU in every forward.
    """
    AttentionInterface.register(PACKED, packed_attention)
