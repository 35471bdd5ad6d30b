"""What becomes of a job when its processes have ended: pure, so that every case is tested without a cluster."""

from __future__ import annotations

import enum
import json
import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_job.contract import ExitCode

_KILLED = 128
_STOPPING = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))
_TIMEOUTS_IN_VAIN = 3
_KNOWN = frozenset(int(code) for code in ExitCode)
SRUN_FAILED = 91
"""With which srun ends where it fails itself (``SLURM_EXIT_ERROR``); its default is that of a bug in a task."""
# The shell cannot run the command, or does not find it; srun does not know an option.
_NOBODY_RAN = (126, 127, 255)


class Cause(enum.StrEnum):
    """Why a job is queued again."""

    TIMEOUT = "timeout"
    """The time limit was near."""
    PREEMPTION = "preemption"
    """Somebody else needs the nodes."""
    LOSS = "loss"
    """A rank or a node was lost."""
    SCHEDULER = "scheduler"
    """Slurm did it by itself, or somebody with scontrol: a node failed, an operator, a preemption without a warning."""


@dataclass(frozen=True)
class Asked:
    """What was asked of the job.

    Attributes:
        warned_at: Unix time at which it was first asked to save and be queued again; None = it was not.
        stopped_at: of the first TERM, INT or HUP, which means: no requeue of our own.
        limit: it was asked because its time is over.
    """

    warned_at: float | None = None
    stopped_at: float | None = None
    limit: bool = False

    @property
    def any(self) -> bool:
        """Somebody asked for a stop."""
        return self.warned_at is not None or self.stopped_at is not None


@dataclass(frozen=True)
class Restart:
    """One time that the job was queued again.

    Attributes:
        start: the start that ended so.
        cause: why.
        code: its exit code; None where nobody saw it.
        step: of the newest checkpoint at its end; None where there was none.
    """

    start: int
    cause: str
    code: int | None
    step: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job.

    Attributes:
        code: exit code of every node's task.
        cause: why it is queued again; None where it is not, or where only Slurm knows.
        why: one line for the log.
        by_slurm: Slurm has queued it again by itself.
        late: and it runs again already.
    """

    code: int
    cause: Cause | None
    why: str
    by_slurm: bool = False
    late: bool = False


def code_of(returned: int, asked: Asked) -> int:
    """The exit code by the contract, of a process that Python or a container runtime reports on.

    A signal that came before the job listened ends it: nothing was begun, so that is a stop as any other.
    """
    number = -returned if returned < 0 else returned - _KILLED
    if returned < 0 or (returned > _KILLED and returned not in _KNOWN):
        return int(ExitCode.STOPPED if asked.any and number in _STOPPING else ExitCode.LOST)
    return returned


def code_of_step(returned: int) -> int:
    """The exit code by the contract, of an srun whose task on node 0 left no word.

    It is the highest one of a task, or srun's own where the step could not be started or went to pieces.
    """
    final = returned in _KNOWN or returned in _NOBODY_RAN
    return returned if final else int(ExitCode.LOST)


def joint_code(ends: Mapping[int, int]) -> int:
    """One code for all nodes.

    Node 0's own where it says what happened; else what another node says: node 0 only notices that one is gone.
    """
    first = ends.get(0)
    vague = (ExitCode.LOST, ExitCode.STOPPED)
    if first is not None and first not in vague:
        return first
    stated = [code for _, code in sorted(ends.items()) if code not in (*vague, ExitCode.DONE)]
    if stated:
        return stated[0]
    return int(ExitCode.LOST if ExitCode.LOST in ends.values() or not ends else max(ends.values()))


def judge(
    code: int,
    asked: Asked,
    *,
    over: bool,
    preempted: bool,
    step: int | None,
    restarts: tuple[Restart, ...],
    retries: Mapping[str, int | None],
    fruitless: int | None = None,
) -> Verdict:
    """Whether the job is to be queued again.

    Args:
        code: of all nodes together.
        asked: what node 0 was asked.
        over: the time limit has been reached.
        preempted: Slurm says that the job has to make room for another one.
        step: of the newest checkpoint; None where there is none.
        restarts: earlier ones.
        retries: how many of each cause; None or no entry = as many as it takes.
        fruitless: ends in a row, whatever their causes, that may leave the same checkpoint; None = any number.
    """
    if code == ExitCode.DONE:
        return Verdict(code, None, "done")
    if code not in (ExitCode.STOPPED, ExitCode.LOST):
        return Verdict(code, None, f"exit code {code} would be the same the next time: not queued again")
    if asked.stopped_at is not None and not over and not preempted:
        return Verdict(code, None, "ended from outside (scancel, scontrol requeue): Slurm decides")
    cause = Cause.LOSS
    if code == ExitCode.STOPPED:
        # Nobody asked: the job left by itself, because of its deadline.
        warned = asked.warned_at is not None and not asked.limit
        cause = Cause.PREEMPTION if warned or preempted else Cause.TIMEOUT
    count = sum(restart.cause == cause for restart in restarts)
    limit = retries.get(cause)
    if limit is not None and count >= limit:
        return Verdict(code, None, f"{cause} number {count + 1}, and retries allow {limit}: not queued again")
    in_vain = [*_in_vain(restarts, step), cause]
    if in_vain.count(Cause.TIMEOUT) >= _TIMEOUTS_IN_VAIN:
        why = f"{_TIMEOUTS_IN_VAIN} starts came to their time limit without a new checkpoint: not queued again"
        return Verdict(int(ExitCode.NO_PROGRESS), None, f"{why}\n    fix: a longer resources.time")
    if fruitless is not None and len(in_vain) >= fruitless:
        why = f"{len(in_vain)} starts in a row ended without a new checkpoint ({_counted(in_vain)}): not queued again"
        fix = "save more often (trainer.recovery_minutes or trainer.save_freq), or a larger retries.without_checkpoint"
        return Verdict(int(ExitCode.NO_PROGRESS), None, f"{why}\n    fix: {fix}")
    return Verdict(code, cause, f"{cause} number {count + 1}: queued again")


def _in_vain(restarts: tuple[Restart, ...], step: int | None) -> list[str]:
    """Causes of the last ends that left the checkpoint that is still the newest. The job's own breaker counts no stops.

    What Slurm did by itself left no step: it counts where it lies between others that count.
    """
    found: list[str] = []
    unknown: list[str] = []
    for restart in reversed(restarts):
        if restart.cause == Cause.SCHEDULER:
            unknown.append(restart.cause)
        elif restart.step == step:
            found += [*unknown, restart.cause]
            unknown = []
        else:
            return found
    return found + unknown if step is None else found


def _counted(causes: Sequence[str]) -> str:
    return ", ".join(f"{cause} {number}" for cause, number in sorted(Counter(map(str, causes)).items()))


def read_restarts(path: Path) -> tuple[Restart, ...]:
    """Earlier restarts of a job; none where there is no such file, or it cannot be read."""
    try:
        records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["restarts"]
        return tuple(Restart(int(each["start"]), str(each["cause"]), each["code"], each["step"]) for each in records)
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def with_unseen(restarts: tuple[Restart, ...], start: int) -> tuple[Restart, ...]:
    """The restarts before ``start``; those that this job did not ask for were Slurm's."""
    known = {restart.start: restart for restart in restarts}
    return tuple(known.get(each, Restart(each, Cause.SCHEDULER, None)) for each in range(start))


def counts_of(restarts: tuple[Restart, ...]) -> dict[str, int]:
    """Cause -> how often, each counted by itself."""
    return dict(Counter(str(restart.cause) for restart in restarts))


def write_restarts(path: Path, restarts: tuple[Restart, ...]) -> None:
    """Write them down, all or nothing.

    Raises:
        OSError: they cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"counts": counts_of(restarts), "restarts": [asdict(each) for each in restarts]}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
