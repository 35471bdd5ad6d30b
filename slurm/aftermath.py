"""What node 0 makes of the end of a start: judge it, write down why, queue the job again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sft_job.contract import ExitCode, RunFolder, step_of
from sft_job.streams import say
from sft_job.submissions import note_judgement, note_requeue
from slurm.controller import job_state, queue_again
from slurm.plan import ONLY_PREFLIGHT, Plan
from slurm.requeue import (
    Asked,
    Restart,
    Verdict,
    counts_of,
    judge,
    read_restarts,
    with_unseen,
    write_restarts,
)


class Aftermath:
    """The end of one start of a job.

    Args:
        plan: what was to happen.
        job_id: Slurm's id.
        start: how often the job was queued again before.
        tell: takes lines for the log.
    """

    def __init__(self, plan: Plan, job_id: str, start: int, tell: Callable[[str], None]) -> None:
        self._plan = plan
        self._job_id = job_id
        self._start = start
        self._tell = tell
        self._run = RunFolder(Path(plan.checkpoint_dir) / "sft")
        self._file = Path(plan.folder) / f"{job_id}_restarts.json"

    def judge(self, code: int, asked: Asked, *, over: bool) -> Verdict:
        """What becomes of the job.

        Args:
            code: of all nodes together.
            asked: what the task was asked.
            over: the time limit has been reached.
        """
        if self._plan.preflight == ONLY_PREFLIGHT:
            return Verdict(code, None, "preflight passed" if code == ExitCode.DONE else "preflight failed")
        preempted = False
        if asked.stopped_at is not None:
            state = job_state(self._job_id)
            # One that leaves early is not queued by Slurm.
            preempted = state is not None and state.preempted and state.state != "CANCELLED"
            # srun ends what is left of a step of which it misses a node; nobody has asked for the end of the job.
            if (
                code == ExitCode.LOST
                and state is not None
                and (state.state, state.restarts) == ("RUNNING", self._start)
            ):
                asked = replace(asked, stopped_at=None)
        return judge(
            code,
            asked,
            over=over,
            preempted=preempted,
            step=self._step(),
            restarts=self._restarts(),
            retries=self._plan.retries,
            fruitless=self._plan.fruitless,
        )

    def act(self, verdict: Verdict) -> None:
        """Do what it says, and leave a word for people."""
        self._tell(verdict.why)
        if verdict.cause is not None:
            self._queue_again(verdict)
        # A job that was refused because another one holds the run folder has nothing to say there.
        elif self._plan.preflight != ONLY_PREFLIGHT and verdict.code != ExitCode.CANNOT_CREATE:
            self._note(verdict.why, self._restarts())

    def _queue_again(self, verdict: Verdict) -> None:
        """Write down why, and queue the job again."""
        before = self._restarts()
        after = (*before, Restart(self._start, str(verdict.cause), verdict.code, self._step()))
        self._write(after)
        self._note(verdict.why, after)
        if queue_again(self._job_id, self._start, self._tell):
            note_requeue(self._run, "slurm", self._job_id)
        else:
            self._write(before)
            self._note(f"{verdict.why}; but it was not (see the log of node 0)", before)

    def _step(self) -> int | None:
        """Of the newest checkpoint."""
        try:
            return step_of(Path(self._run.latest.read_text(encoding="utf-8").strip()))
        except (OSError, UnicodeDecodeError):
            return None

    def _restarts(self) -> tuple[Restart, ...]:
        return with_unseen(read_restarts(self._file), self._start)

    def _note(self, why: str, restarts: tuple[Restart, ...]) -> None:
        """For who looks at the run folder: there nobody knows Slurm."""
        note_judgement(self._run, "slurm", self._job_id, self._start, why, counts_of(restarts))

    def _write(self, restarts: tuple[Restart, ...]) -> None:
        try:
            write_restarts(self._file, restarts)
        except OSError as error:
            say(f"slurm: {self._file} cannot be written ({error}): restarts are not counted\n")
