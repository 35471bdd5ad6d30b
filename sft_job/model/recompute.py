"""Recomputation: keep only a decoder block's input in the forward and compute the rest again in the backward."""

from __future__ import annotations

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Wrap every block of the list in place; parameter names in state dicts stay as they were.

    Wrap before sharding, so that a block's weights are gathered once for its recomputation and its backward.
    """
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
