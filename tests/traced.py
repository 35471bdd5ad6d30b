"""An attention backend that torch.compile may look into, on the CPU: registered ops with a backward of their own."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sft_job.model.attention.call import AttentionCall, Backend

CALLS: Counter[str] = Counter()
"""How often each op has computed. Of the process, as the ops are; a test reads differences."""


def _pieces(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> list[tuple[slice, Tensor, Tensor, Tensor]]:
    """Document by document: its tokens, q, and k and v repeated for every query head."""
    groups, ends = q.shape[1] // k.shape[1], borders.tolist()
    places = [slice(first, last) for first, last in pairwise(ends)]
    return [(at, q[at], k[at].repeat_interleave(groups, 1), v[at].repeat_interleave(groups, 1)) for at in places]


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


@torch.library.custom_op("sft_job_tests::attend", mutates_args=())
def attend_op(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float) -> Tensor:
    CALLS["attend"] += 1
    return torch.cat(
        [torch.einsum("hts,shd->thd", _weights(q, k, scale), v) for _, q, k, v in _pieces(q, k, v, borders)]
    )


@attend_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.custom_op("sft_job_tests::attend_backward", mutates_args=())
def backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    CALLS["backward"] += 1
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for at, query, key, value in _pieces(q, k, v, borders):
        weights = _weights(query, key, scale)
        slope = torch.einsum("thd,shd->hts", grad[at], value)
        slope = weights * (slope - (slope * weights).sum(-1, keepdim=True)) * scale
        grads[0][at] = torch.einsum("hts,shd->thd", slope, key)
        grads[1][at] = _one_a_group(torch.einsum("hts,thd->shd", slope, query), k.shape[1])
        grads[2][at] = _one_a_group(torch.einsum("hts,thd->shd", weights, grad[at]), v.shape[1])
    return grads


def _one_a_group(grad: Tensor, heads: int) -> Tensor:
    return grad.reshape(grad.shape[0], heads, -1, grad.shape[2]).sum(2)


@backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *other: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    # The result too, as flash-attention does: what selective recomputation keeps is asked for in the backward.
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, borders, _ = ctx.saved_tensors
    return *backward_op(grad, q, k, v, borders, ctx.scale), None, None


attend_op.register_autograd(_backward, setup_context=_save)


def _attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    scale = call.scale if call.scale is not None else q.shape[2] ** -0.5
    out = attend_op(q, k, v, call.documents.cu_seqlens, scale)
    return F.dropout(out, call.dropout)[None] if call.dropout else out[None]


TRACED = Backend("traced", _attend, lambda needs: None, traced=True, saved=frozenset({"sft_job_tests::attend"}))
