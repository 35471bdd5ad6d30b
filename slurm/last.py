"""The batch script's last word: ``python -m slurm.last FOLDER``, where srun ended node 0's task before it could judge.

srun kills what is left of a step when a node of it is missing, and the task that would queue the job again with it. The
script around it lives on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from sft_job.contract import ExitCode
from sft_job.streams import say
from slurm.aftermath import Aftermath
from slurm.ends import Ends
from slurm.plan import Plan
from slurm.requeue import Asked, joint_code


def last_word(folder: Path, environ: Mapping[str, str]) -> int:
    """Queue the job again where nobody else did; its exit code.

    Args:
        folder: of scripts and logs.
        environ: of the batch script.
    """
    job_id, start = environ["SLURM_JOB_ID"], int(environ.get("SLURM_RESTART_COUNT") or 0)
    plan = Plan.of(DelayedSubmission.load(folder / f"{job_id}_submitted.pkl").args[0])
    ends = Ends(folder, job_id, start)

    def tell(text: str) -> None:
        say(f"slurm: start {start} of job {job_id}, batch script: {text}\n")

    known = ends.all()
    # Of node 0 there may be no word: its task was killed while its ranks ran.
    code = joint_code(known if 0 in known else {**known, 0: int(ExitCode.LOST)})
    tell("srun ended the task of node 0 before it could say what becomes of the job")
    after = Aftermath(plan, job_id, start, tell)
    verdict = after.judge(code, Asked(), over=False)
    after.act(verdict)
    ends.settle(verdict.code)
    return verdict.code


if __name__ == "__main__":
    sys.exit(last_word(Path(sys.argv[1]), os.environ))
