"""Clipping and AdamW of one tensor in one pass over it, on a GPU (Triton).

The arithmetic is that of ``torch.optim.AdamW`` (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2), in the order of
its fused kernel: in fp32, rounded once, to the nearest even, where it is stored. Whether the step may be taken is
decided on the device, so that no host has to know it first.

Import this only where Triton is: it comes with torch for CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Elements of a program: eight for each of its 128 threads, a load of 16 bytes in bf16."""


def update(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    loss: Tensor,
    norm: Tensor,
    *,
    clip: float,
    decay: float,
    beta1: float,
    new1: float,
    beta2: float,
    new2: float,
    rate: float,
    spread: float,
    eps: float,
) -> None:
    """Queue one tensor's step; nothing is written where loss or norm is not finite.

    The numbers are made in double precision on the host: 1 - beta2 from a beta2 in fp32 would be off by 5e-5.

    Args:
        parameter: contiguous, n elements of bf16, fp16 or fp32; written.
        grad: its gradient before clipping, contiguous, n elements of any of these dtypes; only read.
        exp_avg: first moment, likewise; written.
        exp_avg_sq: second moment, likewise; written.
        loss: scalar on the device.
        norm: scalar on the device: the global gradient norm before clipping.
        clip: largest norm, to which gradients are scaled down; inf = as they are.
        decay: learning rate times weight decay.
        beta1: of the first moment.
        new1: 1 - beta1.
        beta2: of the second moment.
        new2: 1 - beta2.
        rate: learning rate over the first moment's bias correction.
        spread: one over the root of the second moment's bias correction.
        eps: added to the root of the second moment.
    """
    size = parameter.numel()
    if size == 0:
        return  # a rank's empty shard
    kernel: Any = _adamw
    kernel[(triton.cdiv(size, _BLOCK),)](
        parameter, grad, exp_avg, exp_avg_sq, loss, norm, size,
        clip, decay, beta1, new1, beta2, new2, rate, spread, eps, BLOCK=_BLOCK,
    )  # fmt: skip


def failure(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernel cannot run here (no C compiler, say); empty where it can. Compiles it on a node's first run."""
    one = torch.ones((), device=device)
    weights, grad, exp_avg, exp_avg_sq = (torch.ones(16, device=device, dtype=dtype) for _ in range(4))
    try:
        update(
            weights, grad, exp_avg, exp_avg_sq, one, one,
            clip=1.0, decay=0.0, beta1=0.0, new1=1.0, beta2=0.0, new2=1.0, rate=0.0, spread=1.0, eps=1.0,
        )  # fmt: skip
        torch.cuda.synchronize(device)
    except Exception as error:  # Triton, its compiler and the driver each have kinds of their own
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return ""


@triton.jit
def _adamw(
    parameter_at, grad_at, exp_avg_at, exp_avg_sq_at, loss_at, norm_at, size,
    clip, decay, beta1, new1, beta2, new2, rate, spread, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    # A tensor may have more elements than 32 bits count.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    loss = tl.load(loss_at).to(tl.float32)
    norm = tl.load(norm_at).to(tl.float32)
    # NaN fails both comparisons. Loads do not wait for the answer, only stores do.
    finite = (tl.abs(loss) < float("inf")) & (tl.abs(norm) < float("inf"))
    grad = tl.load(grad_at + at, inside, 0.0).to(tl.float32)
    parameter = tl.load(parameter_at + at, inside, 0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_at + at, inside, 0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_at + at, inside, 0.0).to(tl.float32)

    grad = grad * tl.where(norm > clip, clip / norm, 1.0)
    parameter = parameter - decay * parameter
    exp_avg = beta1 * exp_avg + new1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + new2 * grad * grad
    parameter = parameter - rate * exp_avg / (tl.sqrt(exp_avg_sq) * spread + eps)

    if finite:
        tl.store(parameter_at + at, parameter.to(parameter_at.dtype.element_ty), inside)
        tl.store(exp_avg_at + at, exp_avg.to(exp_avg_at.dtype.element_ty), inside)
        tl.store(exp_avg_sq_at + at, exp_avg_sq.to(exp_avg_sq_at.dtype.element_ty), inside)
