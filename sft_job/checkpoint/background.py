"""One piece of work on a thread beside the training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")
_TELL_EVERY_SECONDS = 30.0


class Background(Generic[_T]):
    """Runs a piece of work on a thread of its own, from now on.

    Args:
        work: what to do; it must not touch what the training thread works with.
    """

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work = work
        self._value: list[_T] = []
        self._error: Exception | None = None
        self.ended = 0.0
        """When the work was over, by the monotonic clock."""
        self._thread = threading.Thread(target=self._run, name="checkpoint-save", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value.append(self._work())
        except Exception as error:  # the training thread's to judge
            self._error = error
        self.ended = time.monotonic()

    @property
    def finished(self) -> bool:
        """The work is done, or has failed."""
        return not self._thread.is_alive()

    def result(self, tell: Callable[[float], None]) -> _T:
        """Wait for the end; what the work gave.

        Args:
            tell: called with the seconds waited, every half a minute.

        Raises:
            Exception: what the work raised.
        """
        began = time.monotonic()
        while not self.finished:
            self._thread.join(_TELL_EVERY_SECONDS)
            if not self.finished:
                tell(time.monotonic() - began)
        if self._error is not None:
            raise self._error
        return self._value[0]

    def wait(self, seconds: float) -> bool:
        """Wait at most so long; whether the work has ended."""
        self._thread.join(seconds)
        return self.finished
