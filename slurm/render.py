"""From a checked job file to the text of the sbatch script: pure, through submitit's executor.

submitit offers no text without submitting. Its executor's hooks for plugins (``_make_submission_file_text``,
``_submitit_command_str``) are what this room uses beyond its public methods; everything else goes through
``update_parameters``.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from sft_job.contract import ExitCode
from sft_job.jobfile.schema import JobFile
from sft_job.jobfile.validate import seconds_of
from slurm.ends import SETTLED
from slurm.listener import WARNING
from slurm.plan import ONLY_PREFLIGHT, Plan
from slurm.requeue import SRUN_FAILED
from slurm.settings import LEAVE_SECONDS, SlurmSettings

_PREFLIGHT_TIME = "10"
# Python is deaf for a second while it starts, and one of these in that second would end it: what is ignored stays so
# until the task listens.
_STARTER = 'trap "" USR1 USR2; exec "$0" "$@"'

_OF_A_JOB = ("SBATCH_", "SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""By which every command of Slurm finds the controller, and is let in."""
_SIGNALS = "HUP INT QUIT USR1 USR2 PIPE ALRM TERM STKFLT XCPU XFSZ VTALRM PROF IO PWR"
"""All that would end the batch script while its srun lives, but KILL and errors of the script itself."""
_LOOK = (
    r'sft_job_look() { [ "$1" -eq 0 ] && return; '
    r'if [ "$1" -ge 128 ]; then printf "slurm: a signal ended this line (exit code %d): %s\n" "$1" "$2" >&2; '
    f"sft_job_end {int(ExitCode.STOPPED)}; fi; "
    r'printf "slurm: this line failed with exit code %d: %s\n'
    r'    fix: correct slurm.modules or slurm.setup in the job file\n" "$1" "$2" >&2; '
    f"exit {int(ExitCode.CONFIG)}; }}"
)


class Executor(SlurmExecutor):
    """submitit's executor, which can show its text, and needs no Slurm where it is only shown.

    Args:
        folder: of the script and the logs.
        python: the command that starts Python on the nodes.
        without: variables of this environment that sbatch, and the job, are not to see.
    """

    def __init__(self, folder: str, python: str, without: Iterable[str] = ()) -> None:
        super().__init__(folder, python=python)
        self._without = tuple(without)

    @classmethod
    def affinity(cls) -> int:
        """As if Slurm were there: who submits looks for sbatch."""
        return 2

    def text(self) -> str:
        """The sbatch script."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["env", *(f"--unset={name}" for name in self._without), "sbatch", str(submission_file_path)]


def left_out(environ: Mapping[str, str]) -> list[str]:
    """Variables that must not reach sbatch.

    sbatch takes ``SBATCH_*`` before what the script says, srun ``SLURM_*`` and ``SRUN_*``; a job that submits has those
    of its own, from which the new one would take its id and its restarts.
    """
    return sorted(name for name in environ if name.startswith(_OF_A_JOB) and name not in _OF_THE_CLUSTER)


def make_executor(job: JobFile, slurm: SlurmSettings, plan: Plan, without: Iterable[str] = ()) -> Executor:
    """The executor that renders this job, and submits it without these variables of the environment."""
    executor = Executor(plan.folder, shlex.join(["bash", "-c", _STARTER, plan.python, "-P"]), without)
    executor.update_parameters(**parameters(job, slurm, plan))
    return executor


def render(job: JobFile, slurm: SlurmSettings, plan: Plan) -> str:
    """The sbatch script's text."""
    return make_executor(job, slurm, plan).text()


def parameters(job: JobFile, slurm: SlurmSettings, plan: Plan) -> dict[str, Any]:
    """Parameters of submitit's executor: one process on each node, which starts the job there."""
    resources = job.resources
    cpus, time = resources.cpus_per_node, _time(job, plan)
    # Since Slurm 22.05 srun does not take this from sbatch. One node's end must not end the others: they may be saving.
    srun = [f"--cpus-per-task={cpus}"] if cpus else []
    srun += ["--kill-on-bad-exit=0", "--wait=0", *slurm.srun_args]
    found: dict[str, Any] = {
        "job_name": job.name,
        "time": None
        if time is None
        else math.ceil((seconds_of(time) or 60) / 60),  # None takes submitit's default away
        "nodes": resources.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        "mem": None if resources.memory_gib is None else _memory(resources.memory_gib),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "nodelist": slurm.nodelist,
        "exclude": slurm.exclude,
        "exclusive": True if slurm.exclusive == "true" else slurm.exclusive,
        "dependency": slurm.dependency,
        "stderr_to_stdout": True,
        "srun_args": srun,
        "setup": [
            *_ends(plan),
            *_setup([f"module load {' '.join(slurm.modules)}"] * bool(slurm.modules) + slurm.setup),
            f"export SLURM_EXIT_ERROR={SRUN_FAILED}",
        ],
        "teardown": ['sft_job_end "$?"'],
        "wckey": None,
        "additional_parameters": _more(job, slurm, plan),
    }
    if slurm.gres is not None:
        found["gres"] = slurm.gres
    elif resources.gpus_per_node:
        count = resources.gpus_per_node
        found["gpus_per_node"] = f"{slurm.gpu_type}:{count}" if slurm.gpu_type else count
    return found


def _ends(plan: Plan) -> list[str]:
    """What the batch script does when srun has ended: the task has judged the end, or did not live to do so.

    Plain lines, and no trap on EXIT: that one is the set-up lines'.
    """
    settled = f"{shlex.quote(plan.folder)}/${{SLURM_JOB_ID}}_ends/${{SLURM_RESTART_COUNT:-0}}/{SETTLED}"
    ask = shlex.join([plan.python, "-P", "-m", "slurm.last", plan.folder])
    return [
        "sft_job_end() {",
        f'  local code="$1" settled={settled}',
        # While Slurm queues the job again it sends TERM; what is ignored stays so in Python.
        f'  [ "$code" -eq 0 ] || [ -s "$settled" ] || ( trap "" {_SIGNALS}; exec {ask} "$code" )',
        '  if [ -s "$settled" ]; then code=$(<"$settled")',
        '  elif [ "$code" -ne 0 ]; then echo "slurm: nobody could judge how this start ended" >&2; fi',
        '  exit "$code"',
        "}",
        f"trap : {_SIGNALS}  # srun has them too; what it leaves is looked at when it has ended",
    ]


def _setup(lines: Sequence[str]) -> list[str]:
    """The lines, each followed by a look at its exit code: after one that fails, nothing would be as it should be."""
    checked = [text for line in lines for text in (line, f'sft_job_look "$?" {shlex.quote(line)}')]
    again = ["set +e", f"trap : {_SIGNALS}"]  # whatever the lines have set
    return [_LOOK, *checked, *again] if checked else []


def _time(job: JobFile, plan: Plan) -> str | None:
    return _PREFLIGHT_TIME if plan.preflight == ONLY_PREFLIGHT else job.resources.time


def _more(job: JobFile, slurm: SlurmSettings, plan: Plan) -> dict[str, Any]:
    """Options for which submitit has no parameter, or one that is not fine enough."""
    time = _time(job, plan)
    # A preflight alone has nothing to save; without an option of our own submitit would ask for its signal.
    early = 1 if plan.preflight == ONLY_PREFLIGHT else job.grace_seconds + LEAVE_SECONDS
    return {
        # Also where SUBMITIT_PREEMPT_SIGNAL is set: the text depends on the job file alone.
        "signal": f"{WARNING.name.removeprefix('SIG')}@{early}",
        **({} if time is None else {"time": time}),
        "no-requeue" if plan.preflight == ONLY_PREFLIGHT else "requeue": True,
        **{name: True if value == "true" else value for name, value in slurm.sbatch.items()},
    }


def _memory(gib: float) -> str:
    return "0" if gib == 0 else f"{math.ceil(gib * 1024)}M"


def log_path(plan: Plan, job_id: str, node: int | str = 0) -> Path:
    """The log of one node's task; submitit names it."""
    return Path(plan.folder) / f"{job_id}_{node}_log.out"
