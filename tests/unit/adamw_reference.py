"""What ``sft_job.adamw_kernel.update`` computes, in plain torch: for machines without Triton."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def update(
    parameter: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, loss: Tensor, norm: Tensor, **by: float
) -> None:
    if not (loss.isfinite() and norm.isfinite()):
        return
    given = [grad, parameter, exp_avg, exp_avg_sq]
    g, p, m, v = (tensor.to(torch.float32) for tensor in given)
    g = g * (by["clip"] / norm if norm > by["clip"] else 1.0)
    p = p - by["decay"] * p
    m = by["beta1"] * m + by["new1"] * g
    v = by["beta2"] * v + by["new2"] * g * g
    p = p - by["rate"] * m / (v.sqrt() * by["spread"] + by["eps"])
    for old, new in zip(given[1:], (p, m, v), strict=True):
        old.copy_(new)


def module() -> ModuleType:
    made = ModuleType("sft_job.adamw_kernel")
    made.update = update  # pyright: ignore[reportAttributeAccessIssue]
    return made
