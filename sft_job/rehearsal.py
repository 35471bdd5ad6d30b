"""A step at the longest batch before the first one, so that a run that does not fit ends before it has cost anything.

It leaves no trace: weights, optimizer, random numbers and data position are as before.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from sft_job.config.schema import JobConfig
from sft_job.data.batches import BatchLoader, PackedBatch
from sft_job.data.heaviest import accumulates, heaviest_rows
from sft_job.data.mixture import Rows
from sft_job.data.packing import pack_settings


def longest_batches(config: JobConfig, rows: Rows, loader: BatchLoader, *, accumulates: bool) -> list[PackedBatch]:
    """The largest micro-batch of the run, twice where gradients accumulate; none without a rehearsal."""
    if not config.trainer.rehearsal:
        return []
    settings, size = pack_settings(config), config.data.train_batch_size
    lengths = rows.lengths[np.arange(rows.num_rows)]
    batch = loader.pack(heaviest_rows(lengths, settings, size))
    return [batch] * (1 + accumulates)


def longest_tokens(config: JobConfig, rows: Rows) -> int:
    """Tokens of about the largest micro-batch of the run, over all ranks of a Ulysses group."""
    lengths = rows.lengths[np.arange(rows.num_rows)]
    return int(lengths[heaviest_rows(lengths, pack_settings(config), config.data.train_batch_size)].sum(dtype=np.int64))


def step_accumulates(config: JobConfig, rows: Rows, dp_size: int) -> bool:
    """Whether a step of the run can have more than one micro-batch."""
    lengths = rows.lengths[np.arange(rows.num_rows)]
    return accumulates(lengths, pack_settings(config), config.data.train_batch_size, dp_size)


def rehearse(
    accumulate: Callable[[list[PackedBatch], int], Tensor],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[PackedBatch],
) -> None:
    """Forward and backward over a batch, with room taken for optimizer states that do not exist yet.

    A collective call; every rank brings as many micro-batches.

    Args:
        accumulate: the trainer's: adds up gradients of micro-batches.
        module: the trained module; its gradients are None before and after.
        optimizer: its optimizer.
        micro_batches: what to go through.

    Raises:
        torch.OutOfMemoryError: the run would not fit.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    devices = sorted({parameter.device.index or 0 for parameter in trained if parameter.device.type == "cuda"})
    # AdamW makes its two moments in the first step, of the parameters' size and dtype.
    moments = [] if optimizer.state else [torch.empty_like(parameter) for parameter in trained for _ in range(2)]
    with torch.random.fork_rng(devices=devices):
        accumulate(micro_batches, 1 + sum(len(batch.target_rows) for batch in micro_batches))
    del moments
    optimizer.zero_grad()
