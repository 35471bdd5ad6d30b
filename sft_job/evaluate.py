"""Validation: the mean loss of a supervised token over every row of a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from sft_job.data.batches import BatchLoader
from sft_job.pulse import Pulse
from sft_job.runtime import StopWish, agree


@dataclass(frozen=True)
class EvaluationRows:
    """One set's rows.

    Attributes:
        loader: this rank's share of every row, each once.
        batches: how many there are.
    """

    loader: BatchLoader
    batches: int


@dataclass(frozen=True)
class ValidationLoss:
    """Mean losses of a supervised token.

    Attributes:
        loss: over all rows of all sets.
        by_name: over the rows of each named set.
    """

    loss: float
    by_name: Mapping[str, float]


@torch.no_grad()
def validation_loss(
    module: nn.Module, sets: Mapping[str, EvaluationRows], device: torch.device, stop: StopWish, pulse: Pulse
) -> ValidationLoss | None:
    """Token-weighted mean loss over all rows (a collective call); None where some rank was asked to stop in between.

    Args:
        module: its forward gives the loss sum of a packed batch; left in training mode.
        sets: this rank's share of every row of every set, by name; one without a name is an empty text.
        device: where the module computes.
        stop: this rank's wish to stop.
        pulse: this rank's signs of life.
    """
    totals = torch.zeros(len(sets), device=device, dtype=torch.float64)
    targets = [0] * len(sets)
    module.eval()
    whole = all(_add_up(module, rows, at, totals, targets, stop, pulse) for at, rows in enumerate(sets.values()))
    module.train()
    if not whole:
        return None
    dist.all_reduce(totals)
    sums = dict(zip(sets, zip(totals.tolist(), targets, strict=True), strict=True))
    by_name = {name: total / count for name, (total, count) in sums.items() if name}
    return ValidationLoss(sum(total for total, _ in sums.values()) / sum(targets), by_name)


def _add_up(
    module: nn.Module,
    rows: EvaluationRows,
    at: int,
    totals: torch.Tensor,
    targets: list[int],
    stop: StopWish,
    pulse: Pulse,
) -> bool:
    """Add one set's losses; False where a stop cut it short, on every rank alike."""
    with contextlib.closing(rows.loader.steps(0, rows.batches)) as steps:
        for batch in steps:
            targets[at] += batch.num_targets
            for micro in batch.micro_batches:
                pulse.beat()
                totals[at] += module(micro.to(totals.device))
            if agree(stop.wished, totals.device):
                return False
    return True
