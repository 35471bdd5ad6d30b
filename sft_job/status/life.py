"""Whether somebody holds the run folder and lives: by its process on this host, by its beat from any other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from sft_job.contract import RunFolder
from sft_job.lock import BEAT_SECONDS, Holder, current_holder, lives_here

WATCH_SECONDS = 2 * BEAT_SECONDS + 2
"""Two beats and a slow file server: a holder that is still for so long is called silent, no more than that."""
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Life:
    """What the lock tells.

    Attributes:
        holder: None where nobody holds the folder.
        alive: it gave a sign of life, or its process is there.
        gone: its process ended on this host without giving the folder back.
        watched: seconds for which it was still, where only its beat can tell.
    """

    holder: Holder | None = None
    alive: bool = False
    gone: bool = False
    watched: float = 0.0


def look(
    run: RunFolder,
    seconds: float = WATCH_SECONDS,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Life:
    """Look at the lock until its holder beats, at most ``seconds``; clocks of two hosts are never compared."""
    first = current_holder(run)
    if first is None:
        return Life()
    here = lives_here(first)
    if here is not None:
        return Life(first, alive=here, gone=not here)
    began = clock()
    while clock() - began < seconds:
        sleep(_POLL_SECONDS)
        now = current_holder(run)
        if now is None:
            return Life()
        if now != first:
            return Life(now, alive=True)
    return Life(first, watched=clock() - began)
