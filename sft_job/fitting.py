"""Recomputes as little as a GPU's memory allows: measured at the longest batch, chosen, and proved by going through it.

Recomputation costs up to a third of a step's time, so what fits is kept: attention first, which gives most for its
bytes, then whole blocks, the last ones first, because the backward frees them first.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Protocol

import torch
import torch.distributed as dist

from sft_job.config.shares import LARGE_INPUTS
from sft_job.metrics.meters import GIB
from sft_job.model.blocks import Blocks, offload_plan
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
class Guess:
    """What is known before anything was measured.

    Attributes:
        keeps_all: everything can surely be kept.
        spared: bytes of device memory that full recomputation needs above ``offload``.
        measuring: the same of the plan that measures (``probe_plan``).
    """

    keeps_all: bool = False
    spared: int = 0
    measuring: int = 0


@dataclass(frozen=True)
class Attempt:
    """How a plan is tried.

    Attributes:
        rehearse: goes through the longest batch; a collective call.
        recover: puts the model back after a rehearsal that ran out of memory.
        recovers: that can be done (``config.shares.recovers``); else a rehearsal that runs out ends the run.
        memory: of the device.
        device: on which the ranks exchange numbers.
        host_blocks: for how many blocks' inputs the host gave memory; asked when it comes to that (a collective call).
        guess: what is known before.
    """

    rehearse: Callable[[], None]
    recover: Callable[[], bool]
    recovers: bool
    memory: DeviceMemory
    device: torch.device
    host_blocks: Callable[[], int] = lambda: 0
    guess: Guess = field(default_factory=Guess)


class Trial(Enum):
    """A plan, or a way to find one."""

    EVERYTHING = "everything kept, where that is sure: two rehearsals, and one kind of block to compile"
    LEAST = "inputs in host memory, to see whether more would fit without running out of memory"
    MEASURED = "what fits by a measurement of blocks of every kind"
    FULL = "everything recomputed"
    OFFLOAD = "inputs in host memory, because nothing else fits"


def trials(*, sure: bool, large: bool) -> list[Trial]:
    """What is tried, in order; the first that fits is taken.

    Args:
        sure: everything can be kept, by what is known before.
        large: what ``offload`` spares is a good part of the memory.
    """
    first = [trial for trial, wanted in ((Trial.EVERYTHING, sure), (Trial.LEAST, large)) if wanted]
    return [*first, Trial.MEASURED, Trial.FULL, Trial.OFFLOAD]


def fit_recompute(blocks: Blocks, attempt: Attempt) -> str:
    """Set the blocks' plan by the memory that is there (a collective call).

    Args:
        blocks: of the model.
        attempt: how a plan is tried.

    Returns:
        A line for the log, empty where there is nothing to choose.

    Raises:
        torch.OutOfMemoryError: the batch does not fit even with everything recomputed and in host memory what may be
            there, or a plan did not fit and the run cannot recover from that.
    """
    if len(blocks.plan) < 2:
        attempt.rehearse()
        return ""
    guess, memory = attempt.guess, attempt.memory
    # Each rank's memory is another; a trial is made by all or by none.
    sure = _most(int(not guess.keeps_all), attempt.device) == 0
    large = _most(guess.spared - int(LARGE_INPUTS * memory.usable()), attempt.device) >= 0
    for trial in trials(sure=sure and attempt.recovers, large=large):
        if _TRIALS[trial](blocks, attempt):
            break
    return plan_text(blocks.plan, memory.peak(), memory.usable())


def _everything_kept(blocks: Blocks, attempt: Attempt) -> bool:
    memory = attempt.memory
    blocks.set_plan([Recompute.NONE] * len(blocks.plan))
    if not _went_through(attempt):  # compiles; what that takes is no measure of a step
        return False
    limit = memory.usable()
    if not _fits(attempt):
        return False
    return _most(memory.peak() - int(limit * (1 - _MARGIN)), attempt.device) <= 0


def _least(blocks: Blocks, attempt: Attempt) -> bool:
    """The plan that needs least, twice; False where the memory allows more, on every rank, or the host has no room."""
    memory, guess = attempt.memory, attempt.guess
    moved = attempt.host_blocks()
    if not moved:
        return False
    blocks.set_plan(offload_plan(len(blocks.plan), moved))
    attempt.rehearse()  # compiles
    memory.release()
    memory.reset_peak()
    attempt.rehearse()
    # One that recovers may try what just fits; of the others the next plan must fit, and by a larger margin.
    more, margin = (guess.spared, _MARGIN) if attempt.recovers else (max(guess.spared, guess.measuring), 2 * _MARGIN)
    if _most(memory.peak() + more - int(memory.usable() * (1 - margin)), attempt.device) > 0:
        return True
    _clear_host(blocks)
    memory.release()
    return False


def _measured(blocks: Blocks, attempt: Attempt) -> bool:
    """Measure blocks of every kind, then go through what fits by that, each time with a larger margin."""
    count, memory = len(blocks.plan), attempt.memory
    blocks.set_plan(probe_plan(count))
    if not _went_through(attempt):  # compiles
        return False
    memory.reset_peak()
    with blocks.watched(memory.allocated) as kept:
        attempt.rehearse()
    first = kept[:count]  # of the first micro-batch
    peak, limit = memory.peak(), memory.usable()
    for tried in range(1, _TRIES + 1):
        room = Room(count, int(limit * (1 - tried * _MARGIN)), peak, first[0], first[count - 2], first[count - 1])
        plan = _agreed(least_recompute(room), attempt.device)
        if plan == [Recompute.FULL] * count:
            return False
        blocks.set_plan(plan)
        memory.release()
        if _fits(attempt):
            return True
    return False


def _full(blocks: Blocks, attempt: Attempt) -> bool:
    blocks.set_plan([Recompute.FULL] * len(blocks.plan))
    attempt.memory.release()
    attempt.memory.reset_peak()
    return _went_through(attempt)


def _offloaded(blocks: Blocks, attempt: Attempt) -> bool:
    """The last resort: it fits, or the run ends here."""
    attempt.memory.release()
    moved = attempt.host_blocks()
    blocks.set_plan(offload_plan(len(blocks.plan), moved))
    attempt.memory.reset_peak()
    attempt.rehearse()
    return True


_TRIALS: Mapping[Trial, Callable[[Blocks, Attempt], bool]] = MappingProxyType(
    {
        Trial.EVERYTHING: _everything_kept,
        Trial.LEAST: _least,
        Trial.MEASURED: _measured,
        Trial.FULL: _full,
        Trial.OFFLOAD: _offloaded,
    }
)


def _clear_host(blocks: Blocks) -> None:
    if blocks.store is not None:
        blocks.store.clear()


def _most(value: int, device: torch.device) -> int:
    """The largest value that a rank has."""
    worst = torch.tensor(value, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return int(worst.item())


def _went_through(attempt: Attempt) -> bool:
    try:
        attempt.rehearse()
    except torch.OutOfMemoryError:
        if not attempt.recovers or not attempt.recover():
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
