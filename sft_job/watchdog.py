"""Decides from the ranks' signs of life whether they are stuck. Pure: it is given the time and what was seen."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from sft_job.pulse import TRAINING, Beat

SLOW_ALLOWANCE_SECONDS = 1800.0
"""Longer than ``timeout_seconds`` by this may pass without a sign of life while ranks load, save or validate."""
_ASK_AT = 0.8
_LATER_SECONDS = 5.0
# Less than this is a line in a log, an answer to the request for stacks, or a heartbeat, and no work on a disk.
_MOVED_BYTES = 2**20
_MOVED_SECONDS = 60.0


class Action(enum.Enum):
    """What to do about the ranks now."""

    NOTHING = enum.auto()
    ASK_FOR_STACKS = enum.auto()
    KILL = enum.auto()


@dataclass(frozen=True)
class Seen:
    """One rank as seen from outside.

    Attributes:
        beat: its last sign of life.
        moved: bytes that the process has read and written so far; they show that a slow disk is at work.
    """

    beat: Beat
    moved: int = 0


class Watchdog:
    """Watches one start of this node's ranks.

    Ranks step together, so one that is stuck soon holds up all: what counts is the time in which none moved. Stacks
    are asked for before a collective's own timeout would end the ranks; the kill comes after it, for ranks that it
    does not reach. Outside training a rank may be busy without a sign of its own: 1 MiB that a rank reads or writes
    within a minute counts there, and the limit is higher.

    Args:
        timeout: ``trainer.timeout_seconds``.
        allowance: added to it in all phases but training.
        now: the present time.
    """

    def __init__(self, timeout: float, now: float, allowance: float = SLOW_ALLOWANCE_SECONDS) -> None:
        self._timeout = timeout
        self._allowance = allowance
        self._beats: dict[int, Beat] = {}
        self._moved: dict[int, int] = {}
        self._moved_at = now
        self._since = now
        self._asked = False

    def look(self, now: float, ranks: Mapping[int, Seen]) -> Action:
        """What to do, given how the living ranks look now."""
        slow = any(seen.beat.phase != TRAINING for seen in ranks.values())
        # A rank that has ended and is looked at no more is not a sign of life.
        beaten = any(self._beats.get(rank) != seen.beat for rank, seen in ranks.items())
        if beaten or (slow and self._much_moved(ranks)):
            self._since, self._asked = now, False
            self._take_bytes(now, ranks)
        elif now - self._moved_at >= _MOVED_SECONDS:
            self._take_bytes(now, ranks)
        self._beats = {rank: seen.beat for rank, seen in ranks.items()}
        limit = self._timeout + (self._allowance if slow else 0.0)
        if now - self._since >= limit + _LATER_SECONDS:
            return Action.KILL
        if not self._asked and now - self._since >= _ASK_AT * limit:
            self._asked = True
            self._take_bytes(now, ranks)  # what healthy ranks write from here on are their stacks
            return Action.ASK_FOR_STACKS
        return Action.NOTHING

    def _much_moved(self, ranks: Mapping[int, Seen]) -> bool:
        return any(seen.moved - self._moved.get(rank, seen.moved) >= _MOVED_BYTES for rank, seen in ranks.items())

    def _take_bytes(self, now: float, ranks: Mapping[int, Seen]) -> None:
        """Count bytes from here on."""
        self._moved, self._moved_at = {rank: seen.moved for rank, seen in ranks.items()}, now

    def still_for(self, now: float) -> float:
        """Seconds since a rank last moved."""
        return now - self._since
