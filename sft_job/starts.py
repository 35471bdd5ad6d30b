"""The breaker: a job that is started again and again and comes no further ends with 86. Torch-free.

``logs/starts.json`` holds the step at which the last start began and, since a start last moved it, what became of
those that did not, and of those to which not all nodes came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_job.contract import ExitCode, RunFolder
from sft_job.deadline import REASON as DEADLINE
from sft_job.errors import JobError, shorten

_REMEMBERED = 100
_MESSAGE = 200
# Ends that say nothing about a start that cannot come further: people have to act on them anyway, or nothing was tried.
_NOT_COUNTED = frozenset(
    code.reason for code in (ExitCode.DONE, ExitCode.CONFIG, ExitCode.DATA, ExitCode.MODEL, ExitCode.NO_PROGRESS)
)


@dataclass(frozen=True)
class FailedStart:
    """One start that made no new step: how it ended, and the first line of its message."""

    cause: str
    message: str


@dataclass(frozen=True)
class Starts:
    """Starts in a row without a new step.

    Attributes:
        step: where the last of them began.
        failed: what became of each.
    """

    step: int
    failed: tuple[FailedStart, ...] = ()
    settled: bool = False
    """``outcome.json`` tells of no start that is to be counted: it was over before anything was started."""
    gathering: bool = False
    """The last start waits for its nodes; where it ends so, it has tried nothing and is not counted."""
    incomplete: tuple[FailedStart, ...] = ()
    """Starts among them that ended before all nodes had come."""

    def then(self, step: int, last: Mapping[str, Any] | None) -> Starts:
        """The same when one more start begins.

        A stop signal does not count: a queue may preempt a job many times before its first step. Nor does a start to
        which not all nodes came. A deadline does: it will be as short the next time.

        Args:
            step: where it begins.
            last: ``outcome.json`` of the start before it; None where there is none.
        """
        if step > self.step or last is None:
            return Starts(step)
        if self.settled:
            return Starts(step, self.failed, incomplete=self.incomplete)
        cause, message = str(last.get("reason")), str(last.get("message", ""))
        if cause == RUNNING:
            cause, message = ExitCode.LOST.reason, "it wrote nothing at its end"
        stopped = cause == ExitCode.STOPPED.reason and not message.startswith(DEADLINE)
        if stopped or cause in _NOT_COUNTED:
            return Starts(step, self.failed, incomplete=self.incomplete)
        this = FailedStart(cause, shorten(message.partition("\n")[0], _MESSAGE))
        if self.gathering:
            return Starts(step, self.failed, incomplete=(*self.incomplete, this)[-_REMEMBERED:])
        return Starts(step, (*self.failed, this)[-_REMEMBERED:], incomplete=self.incomplete)

    def refuse(self, limit: int, run: RunFolder) -> None:
        """End the run where too many starts came no further.

        Args:
            limit: ``trainer.max_starts_without_progress``; 0 = never.
            run: the run folder.

        Raises:
            JobError: 86.
        """
        if not 0 < limit <= len(self.failed):
            return
        first = len(self.failed) - limit
        causes = [f"\n      {start.cause}: {start.message}".rstrip(": ") for start in self.failed[first:]]
        raise JobError(
            ExitCode.NO_PROGRESS,
            f"the last {limit} starts made no new step; the run stands at step {self.step}. They ended so, the oldest "
            f"first:{''.join(causes)}\n    fix: remove the cause (logs: {run.logs}), then delete {run.starts}, or set "
            "trainer.max_starts_without_progress higher (0 = no limit)",
        )

    def to_json(self) -> str:
        """The text of ``starts.json``."""
        return json.dumps(asdict(self), indent=1) + "\n"


RUNNING = "running"
"""The reason in ``outcome.json`` while a run runs."""


def read_starts(path: Path) -> Starts | None:
    """What ``starts.json`` says; None where there is none, or it cannot be read."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        settled, gathering = bool(fields.get("settled", False)), bool(fields.get("gathering", False))
        incomplete = _told(fields.get("incomplete", ()))
        return Starts(int(fields["step"]), _told(fields["failed"]), settled, gathering, incomplete)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _told(starts: Sequence[Mapping[str, str]]) -> tuple[FailedStart, ...]:
    return tuple(FailedStart(start["cause"], start["message"]) for start in starts)


def begin_start(run: RunFolder, step: int, last: Mapping[str, Any] | None) -> Starts:
    """What to keep in ``starts.json`` for a start that begins at ``step``; a deleted file begins a new count."""
    before = read_starts(run.starts)
    return Starts(step) if before is None else before.then(step, last)
