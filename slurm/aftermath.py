"""What node 0 makes of the end of a start: judge it, write down why, queue the job again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sft_job.contract import ExitCode, RunFolder, step_of
from sft_job.streams import say
from sft_job.submissions import note_judgement, note_requeue
from slurm.controller import JobState, job_state, queue_again
from slurm.plan import ONLY_PREFLIGHT, Plan
from slurm.requeue import (
    Asked,
    Cause,
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

    def judge(self, code: int, asked: Asked | None, *, over: bool, missing: bool = False) -> Verdict:
        """What becomes of the job.

        Args:
            code: of all nodes together.
            asked: what the task was asked; None where it did not live to tell.
            over: the time limit has been reached; where the task did not live to tell, is near.
            missing: a node gave no word of its end.
        """
        if self._plan.preflight == ONLY_PREFLIGHT:
            return Verdict(code, None, "preflight passed" if code == ExitCode.DONE else "preflight failed")
        preempted = False
        state = job_state(self._job_id) if code in (ExitCode.STOPPED, ExitCode.LOST) else None
        if state is not None:
            if state.restarts != self._start:
                return self._by_slurm(code, state)
            if state.ended and not state.timed_out:
                why = "Slurm has ended the job (scancel, or a preemption that cancels): not queued again"
                return Verdict(code, None, why)
            preempted, over = state.preempted and not state.ended, over or state.timed_out
            # srun ends what is left of a step of which it misses a node; nobody has asked for the end of the job.
            lost = (code == ExitCode.LOST or missing) and not (state.ended or preempted or over)
            if asked is not None and asked.stopped_at is not None and lost:
                code, asked = int(ExitCode.LOST), replace(asked, stopped_at=None)
        if asked is None and code == ExitCode.STOPPED and not (preempted or over):
            code = int(ExitCode.LOST)  # the ranks of node 0 were stopped, and nobody knows by whom
        return judge(
            code,
            asked or Asked(),
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
        if verdict.late:
            return  # a later start has the word
        if verdict.by_slurm:
            after = self._restarts() if verdict.cause is None else self._remember(verdict)
            self._note(verdict.why, after)
            note_requeue(self._run, "slurm", self._job_id)
        elif verdict.cause is not None:
            self._queue_again(verdict)
        # A job that was refused because another one holds the run folder has nothing to say there.
        elif self._plan.preflight != ONLY_PREFLIGHT and verdict.code != ExitCode.CANNOT_CREATE:
            self._note(verdict.why, self._restarts())

    def _by_slurm(self, code: int, state: JobState) -> Verdict:
        """Slurm did not wait for us: without a grace a preempted job is queued again as it gets its TERM."""
        if state.restarts != self._start + 1 or state.state != "COMPLETING":
            return Verdict(code, None, "Slurm has started the job again meanwhile: nothing to do", late=True)
        if state.preempted:
            return Verdict(code, Cause.PREEMPTION, "preempted: Slurm has queued the job again itself", by_slurm=True)
        return Verdict(code, None, "ended from outside: Slurm has queued the job again itself", by_slurm=True)

    def _queue_again(self, verdict: Verdict) -> None:
        """Queue the job again, and write down why."""
        if queue_again(self._job_id, self._start, self._tell):
            self._note(verdict.why, self._remember(verdict))
            note_requeue(self._run, "slurm", self._job_id)
        else:
            self._note(f"{verdict.why}; but it was not (see the log of node 0)", self._restarts())

    def _remember(self, verdict: Verdict) -> tuple[Restart, ...]:
        """Add this end to the restarts; what stands there stays, of this start and of later ones, too."""
        known = read_restarts(self._file)
        own = Restart(self._start, str(verdict.cause), verdict.code, self._step())
        later = sorted((each for each in known if each.start >= self._start), key=lambda each: each.start)
        if not any(each.start == self._start for each in later):
            later.insert(0, own)
        after = (*with_unseen(known, self._start), *later)
        try:
            write_restarts(self._file, after)
        except OSError as error:
            say(f"slurm: {self._file} cannot be written ({error}): restarts are not counted\n")
        return after

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
