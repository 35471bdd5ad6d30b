"""AdamW, its learning rate as a function of the step, and the global gradient norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sft_job.config.schema import OptimConfig

WSD_STABLE = 0.9
"""Share of the steps after warm-up over which wsd holds the peak rate."""
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernel computes right: its arithmetic is fp32."""


class ClippingAdamW(torch.optim.AdamW):
    """torch's AdamW for GPUs: clips in the same pass, and steps by a norm and a loss that only the device knows yet.

    States have the names, shapes and dtypes of torch's, so checkpoints are the same. ``step`` counts in host memory, as
    in torch's own AdamW that is not fused: the kernel gets the bias corrections as numbers.

    Args:
        groups: parameters on one GPU, plain or sharded; bf16, fp16 or fp32.
        config: betas, eps, weight decay.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, **_adamw_settings(config), foreach=False)
        self._counted: list[Tensor] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for values in self.state.values():  # a state that torch's fused AdamW saved comes with its count on the GPU
            if "step" in values:
                values["step"] = values["step"].cpu()

    @torch.no_grad()
    def step(
        self, closure: None = None, *, loss: Tensor | None = None, norm: Tensor | None = None, clip: float = 0.0
    ) -> None:
        """Queue a step on the device; it changes no weight and no moment where loss or norm is not finite.

        Args:
            closure: none, as torch's own code says it.
            loss: the step's loss, scalar on the device; None = it is finite.
            norm: global gradient norm, likewise.
            clip: largest norm; gradients of a larger one are scaled down to it. 0 = off.
        """
        # Triton comes with torch for CUDA alone.
        from sft_job.adamw_kernel import update  # noqa: PLC0415

        assert closure is None
        self._counted = []
        largest = float(clip) if clip > 0 and norm is not None else math.inf
        for group in self.param_groups:
            numbers: dict[float, dict[str, float]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter)
                state["step"].add_(1)
                self._counted.append(state["step"])
                count = state["step"].item()
                if count not in numbers:
                    numbers[count] = _numbers(group, count)
                weights, grad = _local(parameter), _local(parameter.grad).contiguous()
                update(
                    weights,
                    grad,
                    _local(state["exp_avg"]),
                    _local(state["exp_avg_sq"]),
                    weights.new_zeros(()) if loss is None else loss,
                    weights.new_zeros(()) if norm is None else norm,
                    clip=largest,
                    **numbers[count],
                )

    def take_back(self) -> None:
        """The last step was not taken on the device: it does not count."""
        for count in self._counted:
            count.sub_(1)
        self._counted = []

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def build_optimizer(
    module: nn.Module, config: OptimConfig, device_type: str, warn: Callable[[str], None] | None = None
) -> torch.optim.AdamW:
    """AdamW over all trained parameters; where they are on a GPU, one kernel for clipping and step.

    Args:
        module: on its devices.
        config: settings.
        device_type: where the module computes; parameters may live in host memory all the same.
        warn: is told why the kernel cannot be used where it should be.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    flat = [parameter for parameter in trained if config.no_decay_on_norms_and_biases and parameter.ndim < 2]
    rest = [parameter for parameter in trained if parameter.ndim >= 2 or not config.no_decay_on_norms_and_biases]
    groups: list[dict[str, Any]] = [{"params": rest}] + ([{"params": flat, "weight_decay": 0.0}] if flat else [])
    if trained and all(_fits_kernel(_local(parameter.detach())) for parameter in trained):
        why = _kernel_failure(trained[0].device, trained[0].dtype)
        if not why:
            return ClippingAdamW(groups, config)
        if warn is not None:
            warn(f"clipping and AdamW in one kernel does not work here, torch's own are used (slower): {why}")
    gpu = device_type == "cuda"
    return torch.optim.AdamW(groups, **_adamw_settings(config), fused=gpu, foreach=None if gpu else False)


def _adamw_settings(config: OptimConfig) -> dict[str, Any]:
    return {
        "lr": config.lr,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }


def _numbers(group: dict[str, Any], count: float) -> dict[str, float]:
    """What the kernel takes of a group's settings at its ``count``-th step, from 1."""
    (beta1, beta2), rate = group["betas"], float(group["lr"])
    return {
        "decay": rate * group["weight_decay"],
        "beta1": beta1,
        "new1": 1.0 - beta1,
        "beta2": beta2,
        "new2": 1.0 - beta2,
        "rate": rate / (1.0 - beta1**count),
        "spread": 1.0 / math.sqrt(1.0 - beta2**count),
        "eps": group["eps"],
    }


def _fits_kernel(weights: Tensor) -> bool:
    return weights.is_cuda and weights.is_contiguous() and weights.dtype in KERNEL_DTYPES


def _kernel_failure(device: torch.device, dtype: torch.dtype) -> str:
    try:
        from sft_job.adamw_kernel import failure  # noqa: PLC0415 - Triton comes with torch for CUDA alone
    except ImportError as error:
        return str(error)
    return failure(device, dtype)


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
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            grad = _local(parameter.grad)
            by_dtype.setdefault(grad.dtype, []).append(grad)
    norms: list[Tensor] = []
    for dtype, grads in by_dtype.items():
        wide = torch.promote_types(dtype, torch.float32)
        norms.append(grads[0].new_zeros((), dtype=wide))  # all shards of this rank may be empty
        if filled := [grad for grad in grads if grad.numel()]:
            norms += torch._foreach_norm(filled, 2, dtype=wide)
    total = torch.stack(norms).square().sum()
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
