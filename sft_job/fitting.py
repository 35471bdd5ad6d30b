"""Recomputes as little as a GPU's memory allows: measured at the longest batch, chosen, and proved by going through it.

Recomputation costs up to a third of a step's time, so what fits is kept: attention first, which gives most for its
bytes, then whole blocks, the last ones first, because the backward frees them first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from sft_job.metrics.meters import GIB
from sft_job.model.blocks import Blocks
from sft_job.model.recompute import Recompute

_MARGIN = 0.05
"""Share of the memory that is left free: pieces that do not fit, kernels' workspaces, other lengths."""
_TRIES = 4


@dataclass(frozen=True)
class Room:
    """What was measured at the longest batch with everything recomputed but the last two blocks.

    Attributes:
        blocks: how many there are.
        limit: bytes of device memory that the run may use.
        peak: most that was in use.
        full: bytes that a block keeps when it is recomputed wholly.
        attention: when all but attention is.
        none: when nothing is.
    """

    blocks: int
    limit: int
    peak: int
    full: int
    attention: int
    none: int


def probe_plan(blocks: int) -> list[Recompute]:
    """Every kind at least once, and as little memory as that allows."""
    return [Recompute.FULL] * (blocks - 2) + [Recompute.ATTENTION, Recompute.NONE]


def least_recompute(room: Room) -> list[Recompute]:
    """The plan that keeps most of what fits."""
    more_attention, more_none = room.attention - room.full, room.none - room.full
    left = room.limit - (room.peak - more_attention - more_none)
    if left < room.blocks * more_attention:
        kept = max(0, left // more_attention) if more_attention > 0 else 0
        return [Recompute.FULL] * (room.blocks - kept) + [Recompute.ATTENTION] * kept
    left -= room.blocks * more_attention
    step = room.none - room.attention
    free = min(room.blocks, left // step) if step > 0 else room.blocks
    return [Recompute.ATTENTION] * (room.blocks - free) + [Recompute.NONE] * free


def fit_recompute(blocks: Blocks, rehearse: Callable[[], None], device: torch.device) -> str:
    """Set the blocks' plan by the memory that is there (a collective call).

    Args:
        blocks: of the model.
        rehearse: goes through the longest batch.
        device: a GPU.

    Returns:
        A line for the log.

    Raises:
        torch.OutOfMemoryError: the batch does not fit even with everything recomputed.
    """
    count = len(blocks.plan)
    if count < 2:
        rehearse()
        return ""
    blocks.set_plan(probe_plan(count))
    rehearse()  # compiles; what that takes is no measure of a step
    torch.cuda.reset_peak_memory_stats(device)
    with blocks.watched(device) as kept:
        rehearse()
    first = kept[:count]  # of the first micro-batch
    peak = torch.cuda.max_memory_allocated(device)
    limit = _usable(device)
    margin = _MARGIN
    for _ in range(_TRIES):
        room = Room(count, int(limit * (1 - margin)), peak, first[0], first[count - 2], first[count - 1])
        blocks.set_plan(_agreed(least_recompute(room), device))
        torch.cuda.empty_cache()
        if blocks.plan == tuple([Recompute.FULL] * count) or _goes_through(rehearse, device):
            break
        margin += _MARGIN
    else:
        blocks.set_plan([Recompute.FULL] * count)
    return plan_text(blocks.plan, torch.cuda.max_memory_allocated(device), limit)


def _usable(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def _goes_through(rehearse: Callable[[], None], device: torch.device) -> bool:
    """Whether the batch fits, without torch having had to give memory back and ask anew: that would halve the speed."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    try:
        rehearse()
    except torch.OutOfMemoryError:
        if dist.get_world_size() > 1:
            raise  # the other ranks are in a collective by now
        return False
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0) - before
    worst = torch.tensor(retries, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item() == 0


def _agreed(plan: list[Recompute], device: torch.device) -> list[Recompute]:
    """The plan of the rank that has least room: ranks of a Ulysses group recompute their exchanges together."""
    kept = torch.tensor([plan.count(Recompute.NONE), len(plan) - plan.count(Recompute.FULL)], device=device)
    dist.all_reduce(kept, op=dist.ReduceOp.MIN)
    none, at_least_attention = kept.tolist()
    full = len(plan) - at_least_attention
    return [Recompute.FULL] * full + [Recompute.ATTENTION] * (at_least_attention - none) + [Recompute.NONE] * none


def plan_text(plan: tuple[Recompute, ...], peak: int, limit: int) -> str:
    """A line for the log."""
    kinds = [f"{plan.count(kind)} {text}" for kind, text in _TEXTS.items() if kind in plan]
    return f"recomputation of {len(plan)} blocks: {', '.join(kinds)}; peak {peak / GIB:.1f} of {limit / GIB:.1f} GiB"


_TEXTS = {Recompute.NONE: "nothing", Recompute.ATTENTION: "all but attention", Recompute.FULL: "all"}
