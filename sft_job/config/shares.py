"""What every GPU holds whole, what the GPUs share, and what may be tried: one rule each for run and plan."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

FROZEN_SHARE = 1 / 3
"""Share of a GPU's memory up to which frozen weights are held whole."""
GRADIENTS_SHARE = 1 / 4
"""Share of a GPU's memory up to which gradients are added up whole over a step's micro-batches."""
LARGE_INPUTS = 0.2
"""Share of a GPU's memory from which what ``offload`` spares makes it the first plan that is tried."""


def holds_frozen(setting: str | bool, size: float, memory: float | None, world: int) -> bool:
    """Whether every rank holds the frozen weights whole.

    Args:
        setting: ``model.fsdp_config.shard_frozen``.
        size: bytes of all of them.
        memory: bytes of a GPU; None where there is none.
        world: ranks of the run.
    """
    if world == 1:
        return True
    if setting != "auto":
        return not setting
    return memory is not None and size < memory * FROZEN_SHARE


def sums_shards(setting: str | bool, size: float, memory: float | None, shards: int) -> bool:
    """Whether gradients are added up over a step's micro-batches in each rank's shard alone.

    Every micro-batch is then reduced over the ranks, and no rank keeps the sum of all parameters' gradients.

    Args:
        setting: ``model.fsdp_config.shard_accumulated``.
        size: bytes of all trained parameters' gradients in the dtype in which they are reduced.
        memory: bytes of a GPU; None where there is none.
        shards: ranks that share one copy of the parameters.
    """
    if shards == 1:
        return False
    if setting != "auto":
        return bool(setting)
    return memory is not None and size > memory * GRADIENTS_SHARE


def recovers(world: int, *, managed: bool, resets: bool) -> bool:
    """Whether a run can go on after a rehearsal that ran out of device memory.

    Of several ranks the others are in a collective by then. Where it cannot, what is measured first must fit.

    Args:
        world: ranks of the run.
        managed: FSDP holds parameters; one rank may have none that it does.
        resets: this torch can reset FSDP.
    """
    return world == 1 and (resets or not managed)


def torch_resets() -> bool:
    """Whether the installed torch resets FSDP after a step that broke off (2.13 and later); if none is there: yes."""
    try:
        major, minor = version("torch").split(".")[:2]
    except PackageNotFoundError:
        return True
    return (int(major), int(minor)) >= (2, 13)
