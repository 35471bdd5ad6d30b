"""AdamW, its learning rate as a function of the step, and the global gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sft_job.config.schema import OptimConfig

WSD_STABLE = 0.9
"""Share of the steps after warm-up over which wsd holds the peak rate."""


def build_optimizer(module: nn.Module, config: OptimConfig, device_type: str) -> torch.optim.AdamW:
    """AdamW over all trained parameters; one fused kernel where a GPU is there, also for states in host memory."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    flat = [parameter for parameter in trained if config.no_decay_on_norms_and_biases and parameter.ndim < 2]
    rest = [parameter for parameter in trained if parameter.ndim >= 2 or not config.no_decay_on_norms_and_biases]
    groups = [{"params": rest}] + ([{"params": flat, "weight_decay": 0.0}] if flat else [])
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=device_type == "cuda",
        foreach=None if device_type == "cuda" else False,
    )


def warmup_steps(config: OptimConfig, total_steps: int) -> int:
    """Steps over which the learning rate rises."""
    return config.warmup_steps if config.warmup_steps is not None else int(config.warmup_steps_ratio * total_steps)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of one optimizer step.

    The first step of a warm-up already moves (its rate is not 0), and the rate reaches its end one step after the
    last one, so that no step is spent at a rate of 0.

    Args:
        config: peak rate, warm-up and shape.
        step: 0 for the first step.
        total_steps: the horizon, total_training_steps where that is set.
    """
    rising = warmup_steps(config, total_steps)
    if step < rising:
        return config.lr * (step + 1) / (rising + 1)
    if config.lr_scheduler == "constant":
        return config.lr
    falling_from = rising
    if config.lr_scheduler == "wsd":
        falling_from += int(WSD_STABLE * (total_steps - rising))
    if step < falling_from:
        return config.lr
    progress = (step - falling_from) / max(1, total_steps - falling_from)
    fall = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * fall)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], shard_group: dist.ProcessGroup) -> Tensor:
    """L2 norm over all gradients of all ranks, accumulated in at least fp32 (a collective call).

    Args:
        parameters: sharded over ``shard_group``.
        shard_group: the ranks that together hold one copy of them.

    Returns:
        Scalar tensor on the parameters' device, the same on every rank.
    """
    squares: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            grad = _local(parameter.grad)
            wide = torch.promote_types(grad.dtype, torch.float32)
            squares.append(torch.linalg.vector_norm(grad, dtype=wide).square())
    total = torch.stack(squares).sum()
    dist.all_reduce(total, group=shard_group)
    return total.sqrt()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every gradient by a number."""
    grads = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if grads:
        torch._foreach_mul_(grads, factor)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
