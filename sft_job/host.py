"""Host memory in which blocks' inputs wait (``model.recompute=offload``): how much that is, and whether it is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sft_job.config.schema import JobConfig
from sft_job.contract import ExitCode
from sft_job.errors import JobError
from sft_job.model.offload import host_bytes
from sft_job.model.recompute import Recompute

_GIB = 2**30
_HOST_SHARE = 0.95
"""Of the host memory that is left; the rest is for what else comes."""


@dataclass(frozen=True)
class HostNeed:
    """Host memory that blocks' inputs take when they wait there (``model.recompute=offload``).

    Attributes:
        input_bytes: of one block on one rank, at the longest micro-batch.
        blocks: whose inputs can be away: all but the last one's.
        ranks: of this node.
        tokens: of a rank at the longest micro-batch.
        element_bytes: of a number of the computation.
    """

    input_bytes: int
    blocks: int
    ranks: int
    tokens: int
    element_bytes: int

    @property
    def node_bytes(self) -> int:
        """Of all ranks of the node together."""
        return self.input_bytes * self.blocks * self.ranks

    def blocks_within(self, room: int | None) -> int:
        """Of how many blocks the host can take the inputs; None = nobody knows its room."""
        if room is None or not self.input_bytes:
            return self.blocks
        return min(self.blocks, int(_HOST_SHARE * room) // (self.input_bytes * self.ranks))

    def check(self, room: int | None) -> None:
        """See that they all fit.

        Raises:
            JobError: they do not (88).
        """
        if self.blocks_within(room) == self.blocks:
            return
        assert room is not None
        raise JobError(
            ExitCode.OUT_OF_MEMORY,
            f"model.recompute=offload: the inputs of {self.blocks} blocks at {self.tokens:,} tokens on each of "
            f"{self.ranks} ranks take {self.node_bytes / _GIB:.1f} GiB of host memory on this node, which has "
            f"{room / _GIB:.1f} GiB left\n    fix, any of:\n"
            "      more host memory (or a higher limit of the container)\n"
            "      ulysses_sequence_parallel_size above what it is, over more nodes\n"
            "      a lower data.max_length, or data.max_token_len_per_gpu where it is above the longest row\n"
            "      model.recompute=auto offloads as many blocks as fit",
        )


def host_need(config: JobConfig, hf_config: Any, compute: torch.dtype, tokens: int) -> HostNeed:
    """What the inputs of all blocks but the last would take on this node.

    Args:
        config: the run's settings.
        hf_config: the model's.
        compute: dtype of the computation.
        tokens: of the longest micro-batch, over all ranks of a Ulysses group.
    """
    text = hf_config.get_text_config()
    here = -(-tokens // config.ulysses_sequence_parallel_size)
    size = host_bytes(here * text.hidden_size * compute.itemsize)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return HostNeed(size, max(0, text.num_hidden_layers - 1), ranks, here, compute.itemsize)


def offload_text(plan: Sequence[Recompute], need: HostNeed, sent: int, stayed: int) -> str:
    """A line for the log: what waits in host memory; empty where nothing should.

    Args:
        plan: of the blocks.
        need: what an input takes.
        sent: inputs that went to host memory, in any number of forwards.
        stayed: inputs of blocks of the plan that could not go.
    """
    planned = plan.count(Recompute.OFFLOAD)
    if not planned or not sent + stayed:
        return ""
    moved = planned * sent // (sent + stayed)
    size = need.input_bytes * moved
    text = (
        f"offload: the inputs of {moved} of {len(plan)} blocks wait in host memory: {size / _GIB:.1f} GiB for each "
        f"rank, {size * need.ranks / _GIB:.1f} GiB on a node of {need.ranks}"
    )
    if moved < planned:
        text += f"; those of {planned - moved} more stay on the device, for they come by name or not in one piece"
    return text
