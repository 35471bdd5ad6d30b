"""Questions and requests to Slurm's controller, from a node of the job."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sft_job.jobfile.validate import seconds_of

_ANSWER_SECONDS = 60
_PAUSES = (5, 15, 30, 60)
_GOING_ON = frozenset(("RUNNING", "SUSPENDED", "CONFIGURING", "RESIZING", "STOPPED", "SIGNALING"))
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S"


@dataclass(frozen=True)
class JobState:
    """What the controller says of a job.

    Attributes:
        state: such as RUNNING or COMPLETING.
        restarts: how often it was queued again.
        preempted: it has to make room for another job.
        timed_out: Slurm has ended it at its time limit.
    """

    state: str
    restarts: int
    preempted: bool = False
    timed_out: bool = False

    @property
    def ended(self) -> bool:
        """Slurm has ended it, or somebody through Slurm: only its processes are still there.

        The word for it is COMPLETING as long as they are, whatever ended it: scancel, the time limit, a preemption.
        """
        return self.state not in _GOING_ON


def job_state(job_id: str) -> JobState | None:
    """The job as the controller sees it; None where it does not answer."""
    try:
        asked = _scontrol("show", "job", "--oneliner", job_id)
    except (OSError, subprocess.TimeoutExpired):
        return None
    state, restarts = re.search(r"\bJobState=(\w+)", asked.stdout), re.search(r"\bRestarts=(\d+)", asked.stdout)
    if asked.returncode != 0 or not state or not restarts:
        return None
    times: dict[str, str] = dict(re.findall(r"\b(PreemptTime|StartTime|EndTime|TimeLimit)=(\d\S+)", asked.stdout))
    # An earlier start may have been preempted, too.
    preempted = "StartTime" in times and times.get("PreemptTime", "") >= times["StartTime"]
    timed_out = state[1] not in _GOING_ON and state[1] != "CANCELLED" and _reached_its_limit(times)
    return JobState(state[1], int(restarts[1]), preempted, timed_out)


def _reached_its_limit(times: dict[str, str]) -> bool:
    """Whether a job that was ended had run as long as it might; all by the controller's clock."""
    limit = seconds_of(times.get("TimeLimit", ""))
    if limit is None:
        return False
    try:
        began, end = (time.mktime(time.strptime(times[name], _TIME_FORMAT)) for name in ("StartTime", "EndTime"))
    except (KeyError, ValueError, OverflowError):
        return False
    return end - began >= limit


def queue_again(job_id: str, start: int, tell: Callable[[str], None], pauses: Sequence[float] = _PAUSES) -> bool:
    """Queue a job again, once; Slurm then ends what is left of it on every node.

    A node that was cut off may come here long after Slurm has started the job elsewhere: nothing is asked for then, nor
    as long as Slurm does not say which start it knows. A job that was ended through Slurm stays so, unless its time
    limit did it: a requeue would undo a scancel as long as processes of the job live.

    Args:
        job_id: Slurm's id.
        start: the start that ended.
        tell: takes lines for the log.
        pauses: seconds to wait after each try that failed.

    Returns:
        Whether this call did it.
    """
    asked = False
    for pause in pauses:
        known = job_state(job_id)
        if known is not None and known.restarts != start:
            if not asked:  # else it was ours, which Slurm did though we heard no answer
                tell(f"Slurm has queued job {job_id} again already")
            return asked
        if known is not None and known.ended and not known.timed_out:
            tell(f"job {job_id} was cancelled: not queued again")
            return False
        # Without an answer it may run elsewhere by now, and a requeue would end that start.
        said = f"scontrol show job {job_id}: no answer"
        if known is not None:
            said, asked = _requeue(job_id, start, ended=known.ended), True
        if not said:
            return True
        tell(said)
        time.sleep(pause)
    tell(f"the job is not queued again; do it by hand: scontrol requeue {job_id}")
    return False


def _requeue(job_id: str, start: int, *, ended: bool) -> str:
    """Ask for it; what Slurm said where it did not do it, else ''.

    Of a job that runs it is asked only as long as it does: somebody may end it between our look and our request. Slurm
    then does nothing, and says nothing.
    """
    word = f"scontrol requeue {job_id}"
    try:
        done = _scontrol("requeue", *(() if ended else ("Incomplete",)), job_id)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{word}: {error}"
    if done.returncode != 0:
        return f"{word}: {done.stderr.strip()}"
    after = job_state(job_id)
    return f"{word}: nothing was done" if after is not None and after.restarts == start else ""


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["scontrol", *arguments], capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False
    )
