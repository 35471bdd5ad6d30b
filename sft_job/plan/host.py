"""Host memory of a node: what a run needs of it, what it gives up where that is short, and what it ends by."""

from __future__ import annotations

from dataclasses import replace

from sft_job.plan.activations import ATTENTION, FULL, NONE, OFFLOAD
from sft_job.plan.footprint import STATE_COPY, Footprint, Micro, footprint
from sft_job.plan.setup import Setup
from sft_job.plan.shape import Shape

_SHARE = 0.95
"""Share of the host memory that a run may take; with less to spare it sends no inputs there."""


def spared(memory: Footprint, room: float | None) -> Footprint:
    """Without the state's copy for checkpoints where the host has no room for it: a run then saves without one.

    Args:
        memory: of the run.
        room: bytes of a node; None = unknown.
    """
    if room is None or memory.host_bytes <= _SHARE * room or STATE_COPY not in memory.host:
        return memory
    return replace(memory, host={name: size for name, size in memory.host.items() if name != STATE_COPY})


def within(shape: Shape, setup: Setup, micro: Micro, last: Footprint) -> Footprint:
    """What ``auto`` falls back to where the host has room for the inputs of some blocks alone, or of none.

    Args:
        shape: of the model.
        setup: of the run.
        micro: the largest micro-batch.
        last: what it falls back to where there is room enough.
    """
    room = setup.ranks.host
    if holds(last, room):
        return spared(last, room)
    moved, layers = last.levels.count(OFFLOAD), len(last.levels)
    while moved > 0:
        moved -= 1
        found = footprint(shape, setup, micro, (OFFLOAD,) * moved + (FULL,) * (layers - moved))
        if holds(found, room):
            break
    else:
        return spared(last, room)
    if not moved and setup.ranks.world > 1 and layers > 1:
        # What several ranks measure first must fit.
        found = footprint(shape, setup, micro, (FULL,) * (layers - 2) + (ATTENTION, NONE))
    return spared(found, room)


def holds(memory: Footprint, room: float | None, margin: float = 0.0) -> bool:
    """Whether a node has the memory, as far as that is known.

    Args:
        memory: of the run.
        room: bytes of a node; None = unknown.
        margin: share of it that must stay free, besides what the run leaves.
    """
    return room is None or spared(memory, room).host_bytes <= min(_SHARE, 1 - margin) * room
