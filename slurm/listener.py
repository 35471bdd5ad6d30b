"""Signals to the task on a node: what they ask of the job, and the child that they are passed on to."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from dataclasses import replace
from types import FrameType

from sft_job.contract import STOP_SIGNALS
from slurm.requeue import Asked

WISH = signal.SIGUSR2
"""Asks the job to save and leave. An srun that starts a container passes it on; TERM would end the container."""
WARNING = signal.SIGURG
"""By which Slurm warns of a time limit or a preemption.

Slurm sends it to every process of the job, up to a minute early. Processes that know nothing of it ignore it, by its
default: so the task alone decides whether and when the job saves. With USR2, submitit's choice, the ranks would stop at
once.
"""


class Listener:
    """What signals asked of this process, and the child that they are passed on to."""

    def __init__(self) -> None:
        self.asked = Asked()
        self._warned = False
        self._child: subprocess.Popen[bytes] | None = None

    def install(self) -> None:
        """Listen from here on, in place of submitit, which would end this process and leave the job behind."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        signal.signal(WARNING, self._note_warning)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, WARNING))

    def passes_to(self, child: subprocess.Popen[bytes] | None) -> None:
        """From now on signals are passed on to this process; one that came before is so now."""
        self._child = child
        if child is not None and self.asked.any:
            self._pass()

    def take_warning(self) -> bool:
        """Slurm warned since the last look."""
        warned, self._warned = self._warned, False
        return warned

    def ask_to_save(self, *, limit: bool) -> None:
        """Ask the job to save and leave, to be queued again; a second time is no worse."""
        if not self.asked.any:
            self.asked = Asked(time.time(), None, limit)
            self._pass()

    def _note_warning(self, number: int, frame: FrameType | None) -> None:
        self._warned = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        now, asked = time.time(), self.asked
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            self.asked = replace(asked, warned_at=asked.warned_at or now)
        else:
            self.asked = replace(asked, stopped_at=asked.stopped_at or now)
        self._pass()

    def _pass(self) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(WISH)
