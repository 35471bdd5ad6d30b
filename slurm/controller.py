"""Questions and requests to Slurm's controller, from a node of the job."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_ANSWER_SECONDS = 60
_PAUSES = (5, 15, 30, 60)


@dataclass(frozen=True)
class JobState:
    """What the controller says of a job.

    Attributes:
        state: such as RUNNING or CANCELLED.
        restarts: how often it was queued again.
        preempted: it has to make room for another job.
    """

    state: str
    restarts: int
    preempted: bool = False


def job_state(job_id: str) -> JobState | None:
    """The job as the controller sees it; None where it does not answer."""
    try:
        asked = _scontrol("show", "job", "--oneliner", job_id)
    except (OSError, subprocess.TimeoutExpired):
        return None
    state, restarts = re.search(r"\bJobState=(\w+)", asked.stdout), re.search(r"\bRestarts=(\d+)", asked.stdout)
    if asked.returncode != 0 or not state or not restarts:
        return None
    times: dict[str, str] = dict(re.findall(r"\b(PreemptTime|StartTime)=(\d\S+)", asked.stdout))
    # An earlier start may have been preempted, too.
    preempted = "StartTime" in times and times.get("PreemptTime", "") >= times["StartTime"]
    return JobState(state[1], int(restarts[1]), preempted)


def queue_again(job_id: str, start: int, tell: Callable[[str], None], pauses: Sequence[float] = _PAUSES) -> bool:
    """Queue a job again, once; Slurm then ends what is left of it on every node.

    A node that was cut off may come here long after Slurm has started the job elsewhere: nothing is asked for then, nor
    as long as Slurm does not say which start it knows.

    Args:
        job_id: Slurm's id.
        start: the start that ended.
        tell: takes lines for the log.
        pauses: seconds to wait after each try that failed.

    Returns:
        Whether this call did it.
    """
    for pause in pauses:
        known = job_state(job_id)
        if known is not None and known.restarts != start:
            tell(f"Slurm has queued job {job_id} again already")
            return False
        if known is not None and known.state == "CANCELLED":
            tell(f"job {job_id} was cancelled: not queued again")
            return False
        # Without an answer it may run elsewhere by now, and a requeue would end that start.
        said = _requeue(job_id) if known is not None else f"scontrol show job {job_id}: no answer"
        if not said:
            return True
        tell(said)
        time.sleep(pause)
    tell(f"the job is not queued again; do it by hand: scontrol requeue {job_id}")
    return False


def _requeue(job_id: str) -> str:
    """Ask for it; what Slurm said where it did not do it, else ''."""
    try:
        done = _scontrol("requeue", job_id)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scontrol requeue {job_id}: {error}"
    return "" if done.returncode == 0 else f"scontrol requeue {job_id}: {done.stderr.strip()}"


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["scontrol", *arguments], capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False
    )
