"""The batch script's last word: ``python -m slurm.last FOLDER CODE``, where node 0's task did not live to judge.

srun kills what is left of a step when a node of it is missing, and the task that would queue the job again with it; or
it could not start the step at all. The script around it lives on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from sft_job.contract import ExitCode
from sft_job.streams import say
from slurm.aftermath import Aftermath
from slurm.allocation import end_time_of
from slurm.ends import Ends
from slurm.plan import Plan
from slurm.requeue import code_of_step, joint_code
from slurm.settings import LEAVE_SECONDS

_NEAR_SECONDS = 60.0
"""Before the time limit, besides the grace: a job may leave so early because another step would not fit."""


def last_word(folder: Path, returned: int, environ: Mapping[str, str]) -> int:
    """Queue the job again where nobody else did; its exit code.

    Args:
        folder: of scripts and logs.
        returned: by srun.
        environ: of the batch script.
    """
    job_id, start = environ["SLURM_JOB_ID"], int(environ.get("SLURM_RESTART_COUNT") or 0)

    def tell(text: str) -> None:
        say(f"slurm: start {start} of job {job_id}, batch script: {text}\n")

    try:
        plan = Plan.of(DelayedSubmission.load(folder / f"{job_id}_submitted.pkl").args[0])
    except Exception as error:  # a pickle may raise anything
        tell(f"{folder}/{job_id}_submitted.pkl cannot be read ({error}): the end of this start is not judged")
        return int(ExitCode.BUG)
    ends = Ends(folder, job_id, start)
    known = ends.all()
    tell(f"srun ended with {returned}, and the task of node 0 did not live to say what becomes of the job")
    # Of node 0 there may be no word: its task was killed while its ranks ran, or never began.
    code = joint_code(known if 0 in known else {**known, 0: code_of_step(returned)})
    end = end_time_of(environ, job_id)
    near = end is not None and time.time() >= end - plan.grace_seconds - LEAVE_SECONDS - _NEAR_SECONDS
    after = Aftermath(plan, job_id, start, tell)
    verdict = after.judge(code, None, over=near)
    after.act(verdict)
    ends.settle(verdict.code)
    return verdict.code


if __name__ == "__main__":
    sys.exit(last_word(Path(sys.argv[1]), int(sys.argv[2]), os.environ))
