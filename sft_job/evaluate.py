"""Validation: the mean loss of a supervised token over every row of a data set."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import nn

from sft_job.data.batches import BatchLoader
from sft_job.pulse import Pulse
from sft_job.runtime import StopWish, agree


@torch.no_grad()
def validation_loss(
    module: nn.Module, loader: BatchLoader, batches: int, device: torch.device, stop: StopWish, pulse: Pulse
) -> float | None:
    """Token-weighted mean loss over all rows (a collective call); None where some rank was asked to stop in between.

    Args:
        module: its forward gives the loss sum of a packed batch; left in training mode.
        loader: this rank's share of every row, each once.
        batches: how many there are.
        device: where the module computes.
        stop: this rank's wish to stop.
        pulse: this rank's signs of life.
    """
    total = torch.zeros((), device=device, dtype=torch.float64)
    targets = 0
    module.eval()
    with contextlib.closing(loader.steps(0, batches)) as steps:
        for batch in steps:
            targets += batch.num_targets
            for micro in batch.micro_batches:
                pulse.beat()
                total += module(micro.to(device))
            if agree(stop.wished, device):
                targets = 0
                break
    module.train()
    if targets == 0:
        return None
    dist.all_reduce(total)
    return total.item() / targets
