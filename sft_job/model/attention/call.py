"""What passes between a model's layers and an attention backend. Shapes: T tokens of the whole packed sequence,
H query heads, K key/value heads, D head dim; after a Ulysses exchange H and K are the heads of this rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed sequence begin and end.

    Attributes:
        lengths: tokens of each document, padding at the end included as one; none for a backend that is traced.
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
    """What a model, its data and its device need of a backend.

    Attributes:
        device: cpu or cuda.
        dtype: of q, k and v.
        head_dim: D.
        window: some layers see a window only.
        softcap: scores are capped.
        dropout: attention weights are dropped.
        deterministic: the same bits every time.
        capability: of the CUDA device, such as (9, 0).
        longest: tokens of the longest row.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    window: bool = False
    softcap: bool = False
    dropout: bool = False
    deterministic: bool = False
    capability: tuple[int, int] = (0, 0)
    longest: int = 0


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over packed documents.

    Attributes:
        name: for the log and the config.
        attend: (q [1, H, T, D], k [1, K, T, D], v [1, K, T, Dv], call) -> [1, T, H, Dv].
        lacks: the reason why it cannot serve these needs, None where it can.
        traced: torch.compile may look into ``attend``: it reads no document's length, and calls registered ops.
        saved: names of the ops whose results selective recomputation keeps.
        note: what its users should know, said in the log.
        slow_on: the reason why a device with these needs should have a faster one; None = it is right there.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]
    lacks: Callable[[Needs], str | None]
    traced: bool = False
    saved: frozenset[str] = frozenset()
    note: str = ""
    slow_on: Callable[[Needs], str | None] = lambda needs: None


@dataclass(frozen=True)
class Packed:
    """The keyword argument ``packed`` that travels down to every attention layer."""

    documents: Documents
    backend: Backend
    group: dist.ProcessGroup | None
