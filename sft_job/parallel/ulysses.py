"""Ulysses sequence parallelism: ranks trade "all heads of my tokens" for "all tokens of my heads", and back.

Shapes: B = 1 (packed), H query heads, K key/value heads, T tokens of the whole packed sequence, D head dim,
u ranks of the Ulysses group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


@torch.library.custom_op("sft_job::all_to_all", mutates_args=())
def all_to_all(x: Tensor, group_name: str) -> Tensor:
    """Equal-split all-to-all over tensor dim 0: row i goes to rank i, and row i of the result came from rank i.

    A registered op, so that torch.compile keeps it as one call. Its own transpose: the backward is the same exchange.

    Args:
        x: [u, ...].
        group_name: of the Ulysses group; ops take no group itself.
    """
    # Without contiguous() an incoming gradient view is exchanged in memory order: the loss stays exact while
    # the gradients are silently wrong.
    x = x.contiguous()
    out = torch.empty_like(x)
    name: Any = group_name  # torch has a type of its own for it, from 2.12 on
    dist.all_to_all_single(out, x, group=_resolve_process_group(name))
    return out


@all_to_all.register_fake
def _(x: Tensor, group_name: str) -> Tensor:
    return x.new_empty(x.shape)


def _keep_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group_name = inputs[1]


def _exchange_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return all_to_all(grad, ctx.group_name), None


all_to_all.register_autograd(_exchange_back, setup_context=_keep_group)


def kv_repeats(kv_heads: int, ulysses_size: int) -> int:
    """How often each key/value head is repeated so that every rank of the group gets one.

    Raises:
        ValueError: neither number divides the other.
    """
    if kv_heads % ulysses_size == 0:
        return 1
    if ulysses_size % kv_heads == 0:
        return ulysses_size // kv_heads
    raise ValueError(f"{kv_heads} key/value heads cannot be spread over {ulysses_size} ulysses ranks")


def gather_sequence(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Trade heads for tokens in one exchange of q, k and v together.

    Args:
        query: [1, H, T/u, D]; H is a multiple of u.
        key: [1, K, T/u, D]; K divides u or is a multiple of it.
        value: [1, K, T/u, Dv].
        group: the Ulysses group; rank i holds the i-th part of the sequence.

    Returns:
        query [1, H/u, T, D], key [1, max(K, u)/u, T, D], value [1, max(K, u)/u, T, Dv]; views of what was received,
        where a token's heads lie together.
    """
    u = group.size()
    repeats = kv_repeats(key.shape[1], u)
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # [T/u, h, d]: a view, as layers make their heads
    if repeats > 1:
        rows[1:] = [x.repeat_interleave(repeats, dim=1) for x in rows[1:]]
    heads = [(x.shape[1] // u, x.shape[2]) for x in rows]
    parts = [x.reshape(x.shape[0], u, -1).transpose(0, 1) for x in rows]  # [u, T/u, h/u * d]: heads i for rank i
    # The one copy: token by token, so that what comes is in the order of the whole sequence and is cut up by views.
    received = all_to_all(torch.cat(parts, dim=2), group.group_name)  # row i: rank i's tokens of this rank's heads
    whole = received.flatten(0, 1).split([h * d for h, d in heads], dim=1)  # [T, h/u * d] each
    outs = [part.unflatten(1, size).transpose(0, 1)[None] for part, size in zip(whole, heads, strict=True)]
    return outs[0], outs[1], outs[2]  # [1, h/u, T, d]


def scatter_sequence(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Trade tokens for heads: attention output [1, T, H/u, D] -> [1, T/u, H, D]."""
    u = group.size()
    _, t, h, d = out.shape
    parts = out.reshape(u, t // u, h, d)  # row i: rank i's tokens of this rank's heads
    received = all_to_all(parts, group.group_name)  # [u, T/u, H/u, D]: row i holds rank i's heads
    return received.transpose(0, 1).reshape(1, t // u, u * h, d)
