"""Recomputes as little as a GPU's memory allows: measured at the longest batch, chosen, and proved by going through it.

Recomputation costs up to a third of a step's time, so what fits is kept: attention first, which gives most for its
bytes, then whole blocks, the last ones first, because the backward frees them first.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from sft_job.metrics.meters import GIB
from sft_job.model.blocks import Blocks, offload_plan
from sft_job.model.recompute import Recompute

_MARGIN = 0.05
"""Share of the memory that is left free: pieces that do not fit, kernels' workspaces, other lengths."""
_TRIES = 4
_TIGHT = 0.2
"""Share of the memory from which what ``offload`` spares makes it the first plan to try."""


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


class DeviceMemory(Protocol):
    """A device's memory, in bytes, as one process sees it."""

    def usable(self) -> int:
        """What this process holds and what nobody does."""
        ...

    def allocated(self) -> int:
        """What tensors take now."""
        ...

    def peak(self) -> int:
        """The most that they took since ``reset_peak``."""
        ...

    def reset_peak(self) -> None:
        """Begin to look for the peak anew."""
        ...

    def retries(self) -> int:
        """How often memory had to be given back and asked for anew, since the process began."""
        ...

    def release(self) -> None:
        """Give back what no tensor takes."""
        ...


class CudaMemory:
    """That of a GPU, through torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def usable(self) -> int:
        """What this process holds and what nobody does."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device)

    def allocated(self) -> int:
        """What tensors take now."""
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """The most that they took since ``reset_peak``."""
        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        """Begin to look for the peak anew."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def retries(self) -> int:
        """How often memory had to be given back and asked for anew, since the process began."""
        return torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0)

    def release(self) -> None:
        """Give back what no tensor takes."""
        gc.collect()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Attempt:
    """How a plan is tried.

    Attributes:
        rehearse: goes through the longest batch; a collective call.
        recover: puts the model back after a rehearsal that ran out of memory; False where that cannot be done.
        memory: of the device.
        device: on which the ranks exchange numbers.
        host_blocks: how many blocks' inputs the host has room for; asked when it comes to that (a collective call).
        spared: bytes of device memory that full recomputation needs above ``offload``, by counting.
        keeps_all: by the plan (``sft_job.plan``) everything can surely be kept.
    """

    rehearse: Callable[[], None]
    recover: Callable[[], bool]
    memory: DeviceMemory
    device: torch.device
    host_blocks: Callable[[], int] = lambda: 0
    spared: int = 0
    keeps_all: bool = False


def fit_recompute(blocks: Blocks, attempt: Attempt) -> str:
    """Set the blocks' plan by the memory that is there (a collective call).

    Args:
        blocks: of the model.
        attempt: how a plan is tried.

    Returns:
        A line for the log, empty where there is nothing to choose.

    Raises:
        torch.OutOfMemoryError: the batch does not fit even with everything recomputed, or a plan did not fit on one of
            several ranks.
    """
    count, memory = len(blocks.plan), attempt.memory
    everything = [Recompute.FULL] * count
    if count < 2:
        attempt.rehearse()
        return ""
    if (found := _everything_kept(blocks, attempt)) is not None:
        return found
    if (text := _offloaded_first(blocks, attempt)) is not None:
        return text
    blocks.set_plan(probe_plan(count))
    if not _went_through(attempt):  # compiles; what that takes is no measure of a step
        blocks.set_plan(everything)
        return _everything(blocks, attempt)
    memory.reset_peak()
    with blocks.watched(memory.allocated) as kept:
        attempt.rehearse()
    first = kept[:count]  # of the first micro-batch
    peak, limit = memory.peak(), memory.usable()
    for tried in range(1, _TRIES + 1):
        room = Room(count, int(limit * (1 - tried * _MARGIN)), peak, first[0], first[count - 2], first[count - 1])
        blocks.set_plan(_agreed(least_recompute(room), attempt.device))
        if blocks.plan == tuple(everything):
            break
        memory.release()
        if _fits(attempt):
            return plan_text(blocks.plan, memory.peak(), limit)
    blocks.set_plan(everything)
    return _everything(blocks, attempt)


def _everything_kept(blocks: Blocks, attempt: Attempt) -> str | None:
    """Where the plan is sure: two rehearsals and one kind of block to compile, instead of three of each."""
    nothing, memory = [Recompute.NONE] * len(blocks.plan), attempt.memory
    sure = nothing if attempt.keeps_all else [Recompute.FULL] * len(nothing)
    if _agreed(sure, attempt.device) != nothing:
        return None
    blocks.set_plan(nothing)
    if not _went_through(attempt):  # compiles; what that takes is no measure of a step
        return None
    limit = memory.usable()
    if not _fits(attempt):
        return None
    above = _most(memory.peak() - int(limit * (1 - _MARGIN)), attempt.device)
    return None if above > 0 else plan_text(blocks.plan, memory.peak(), limit)


def _everything(blocks: Blocks, attempt: Attempt) -> str:
    """What is left when nothing can be kept: it fits, perhaps with inputs in host memory, or the run ends here."""
    attempt.memory.release()
    attempt.memory.reset_peak()
    moved = attempt.host_blocks()
    if not moved:
        attempt.rehearse()
    elif not _went_through(attempt):
        blocks.set_plan(offload_plan(len(blocks.plan), moved))
        attempt.memory.release()
        attempt.memory.reset_peak()
        attempt.rehearse()
    return plan_text(blocks.plan, attempt.memory.peak(), attempt.memory.usable())


def _offloaded_first(blocks: Blocks, attempt: Attempt) -> str | None:
    """Where inputs are a good part of the memory, the plan that needs least is the first one that is tried.

    Because several ranks cannot go on after one of them ran out of memory.

    Returns:
        A line for the log where inputs stay in host memory; None where the memory allows more, on every rank.
    """
    memory, count = attempt.memory, len(blocks.plan)
    if _most(attempt.spared - int(_TIGHT * memory.usable()), attempt.device) < 0:
        return None
    moved = attempt.host_blocks()
    if not moved:
        return None
    blocks.set_plan(offload_plan(count, moved))
    attempt.rehearse()  # compiles
    memory.release()
    memory.reset_peak()
    attempt.rehearse()
    lacking = memory.peak() + attempt.spared - int(memory.usable() * (1 - 2 * _MARGIN))
    if _most(lacking, attempt.device) <= 0:
        if blocks.store is not None:
            blocks.store.clear()
        memory.release()
        return None
    return plan_text(blocks.plan, memory.peak(), memory.usable())


def _most(value: int, device: torch.device) -> int:
    """The largest value that a rank has."""
    worst = torch.tensor(value, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return int(worst.item())


def _went_through(attempt: Attempt) -> bool:
    try:
        attempt.rehearse()
    except torch.OutOfMemoryError:
        # The other ranks of several are in a collective by now.
        if dist.get_world_size() > 1 or not attempt.recover():
            raise
        return False
    return True


def _fits(attempt: Attempt) -> bool:
    """Whether the batch fits, without torch having had to give memory back and ask anew: that would halve the speed."""
    memory = attempt.memory
    memory.reset_peak()
    before = memory.retries()
    if not _went_through(attempt):
        return False
    return _most(memory.retries() - before, attempt.device) == 0


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


_TEXTS = {
    Recompute.NONE: "nothing",
    Recompute.ATTENTION: "all but attention",
    Recompute.FULL: "all",
    Recompute.OFFLOAD: "all, with inputs in host memory",
}
