"""When to stop so that the last checkpoint is saved in time: learned from the steps and saves so far. Torch-free."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

REASON = "deadline"
"""How the message of a run that a deadline ended begins."""
_SLACK_SECONDS = 5.0
_MARGIN = 1.5


class Deadline:
    """Whether there is still time for another step.

    A step is begun only if it, a save that may be due after it, and the last save fit before the deadline, each taken
    as long as the longest of the recent ones, half as much again, and a few seconds to leave. Before the first save its
    length is a guess.

    Args:
        at: when the run must be over, in seconds of ``clock``.
        clock: seconds, only ever going up.
        first_save: how long a save is taken to last before there was one.
    """

    def __init__(self, at: float, clock: Callable[[], float] = time.monotonic, first_save: float = 30.0) -> None:
        self._at = at
        self._clock = clock
        self._first_save = first_save
        self._steps: deque[float] = deque(maxlen=50)
        self._saves: deque[float] = deque(maxlen=5)
        self._reached = False

    def expect_save(self, seconds: float) -> None:
        """Before there was a save: how long one may last."""
        self._first_save = seconds

    def step_took(self, seconds: float) -> None:
        """One step is done."""
        self._steps.append(seconds)

    def save_took(self, seconds: float) -> None:
        """One checkpoint is saved."""
        self._saves.append(seconds)

    @property
    def needed(self) -> float:
        """Seconds that one more step and what must follow it may take."""
        step = max(self._steps, default=0.0)
        if not self._saves:
            return _MARGIN * step + self._first_save + _SLACK_SECONDS
        return _MARGIN * (step + 2 * max(self._saves)) + _SLACK_SECONDS

    @property
    def reached(self) -> bool:
        """It is time to stop; once true it stays so."""
        self._reached = self._reached or self._clock() + self.needed >= self._at
        return self._reached
