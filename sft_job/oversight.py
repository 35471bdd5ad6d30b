"""From the start of this node's ranks to the end of the last one: stop wishes, lost and frozen ranks. Torch-free."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from sft_job.contract import STACK_SIGNAL, STOP_SIGNALS
from sft_job.processes import reap
from sft_job.ranks import RankEnd, RankGroup, verdict
from sft_job.watchdog import Action, Watchdog

LOST_GRACE_SECONDS = 20.0
"""How long the other ranks may take to notice that one is gone before they are killed."""


class Listener:
    """What signals asked of the supervisor. Only the first stop signal counts; a second one is no worse."""

    def __init__(self) -> None:
        self.stop_signal = 0
        self._stacks = False

    def install(self) -> Listener:
        """Listen from here on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note_stop)
        signal.signal(STACK_SIGNAL, self._note_stacks)
        # A parent that blocked signals while it started this process would leave it deaf.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, STACK_SIGNAL))
        return self

    def stopped(self) -> bool:
        """Somebody asked for a stop."""
        return self.stop_signal != 0

    def take_stacks(self) -> bool:
        """Somebody asked for the ranks' stacks since the last look."""
        wanted, self._stacks = self._stacks, False
        return wanted

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = self.stop_signal or number

    def _note_stacks(self, number: int, frame: FrameType | None) -> None:
        self._stacks = True


def oversee(
    ranks: RankGroup,
    watchdog: Watchdog,
    listener: Listener,
    fenced: Callable[[], bool],
    show: Callable[[str], None],
) -> RankEnd:
    """Wait for the ranks to end; the end that explains the others.

    Args:
        ranks: just started.
        watchdog: says when they are stuck.
        listener: what signals ask for.
        fenced: true once another run has taken the run folder: the ranks are then ended without a save.
        show: takes a line for the user.
    """
    failed_at: float | None = None
    asked = False
    while not ranks.step():
        reap(ranks.pids | {os.getpid()})
        if fenced():
            ranks.kill()
            break
        if listener.stopped() and ranks.ask_to_stop():
            name = signal.Signals(listener.stop_signal).name
            show(f"{name}: the ranks finish their step, save and leave")
        now = time.monotonic()
        action = watchdog.look(now, ranks.seen())
        if failed_at is None and ranks.one_failed():
            failed_at = now
        if action is Action.ASK_FOR_STACKS or listener.take_stacks():
            ranks.ask_for_stacks()
        if failed_at is not None and not asked and now - failed_at > LOST_GRACE_SECONDS / 2:
            asked = True
            ranks.ask_for_stacks()
        late = failed_at is not None and now - failed_at > LOST_GRACE_SECONDS
        if late or action is Action.KILL:
            ranks.kill_stuck(watchdog.still_for(now))
            break  # nobody waits for one that even a kill does not end
    return verdict(ranks.ends())
