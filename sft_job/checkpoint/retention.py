"""Which checkpoints a newer one makes superfluous: one rule for the run folder and for the second place. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """What retention asks of a checkpoint.

    Attributes:
        kept: made by ``save_freq`` or at the end; otherwise for recovery or at a stop.
        resumable: a run can go on from it.
    """

    kept: bool
    resumable: bool


def superfluous(held: Mapping[int, Held], keep: int | None) -> list[int]:
    """Steps whose checkpoints may go, in order.

    The newest one stays, and so do the newest ``keep`` of those that are kept. Where the newest one cannot be gone on
    from, the newest one that can be stays too.

    Args:
        held: by step, the newest one known to be whole.
        keep: how many of the kept ones stay; None = all.
    """
    if not held:
        return []
    newest = max(held)
    older = sorted(step for step, each in held.items() if each.kept and step != newest)
    room = len(older) if keep is None else max(0, keep - held[newest].kept)
    stays = {newest, *older[max(0, len(older) - room) :]}
    stays.add(max((step for step, each in held.items() if each.resumable), default=newest))
    return sorted(held.keys() - stays)
