"""The kernel under Triton's interpreter, which must be asked for before Triton is imported: a process of its own.

It rounds to bf16 by cutting off, so only fp32 can be compared; tests/gpu/test_optimizer.py compares bf16.
"""

from __future__ import annotations

import math

import torch

from sft_job.config.schema import OptimConfig
from sft_job.optimizer import ClippingAdamW

SIZES = (1, 1000, 1024, 1025, 4096)


def compare() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(size) * 0.02) for size in SIZES]
    theirs = [torch.nn.Parameter(each.detach().clone()) for each in ours]
    config = OptimConfig(lr=1e-3, weight_decay=0.1)
    mine = ClippingAdamW([{"params": ours[:3]}, {"params": ours[3:], "weight_decay": 0.0}], config)
    settings = {"lr": 1e-3, "betas": tuple(config.betas), "eps": config.eps, "weight_decay": 0.1, "foreach": False}
    torchs = torch.optim.AdamW([{"params": theirs[:3]}, {"params": theirs[3:], "weight_decay": 0.0}], **settings)
    for step, (loss, taken) in enumerate([(1.0, True), (2.0, True), (math.nan, False), (1.0, True), (1.0, True)]):
        grads = [torch.randn(size) * 10.0 ** -(step % 3) for size in SIZES]
        norm = torch.cat(grads).norm()
        if step == 3:
            grads[1][5], taken, norm = math.inf, False, torch.tensor(math.inf)
        for each, other, grad in zip(ours, theirs, grads, strict=True):
            each.grad, other.grad = grad.clone(), grad * min(1.0, 1.0 / norm)
        mine.step(loss=torch.tensor(loss), norm=norm, clip=1.0)
        if taken:
            torchs.step()
        else:
            mine.take_back()
        for each, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(each, other, rtol=1e-5, atol=1e-7)
            for name, value in torchs.state[other].items():
                torch.testing.assert_close(mine.state[each][name], value, rtol=1e-5, atol=1e-8)


if __name__ == "__main__":
    compare()
