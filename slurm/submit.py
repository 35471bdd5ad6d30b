"""``sft-job submit slurm``: load, check, show, submit. Imports no torch: it runs on a login node."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError

from sft_job.contract import Env, ExitCode
from sft_job.errors import JobError, raise_problems
from sft_job.jobfile.load import LoadedJob, load_job
from sft_job.jobfile.mounts import planned_mounts
from sft_job.jobfile.run import Copy, Place, copy_for, look_from_here, with_folder_of
from sft_job.jobfile.schema import JobFile
from sft_job.jobfile.seen import Sight
from sft_job.submissions import remember
from slurm.allocation import Allocation
from slurm.containers import Setting, job_command, job_environ
from slurm.ends import Ends
from slurm.plan import FIRST_PREFLIGHT, NO_PREFLIGHT, ONLY_PREFLIGHT, Plan, make_plan
from slurm.render import left_out, log_path, make_executor, render
from slurm.requeue import joint_code
from slurm.settings import SlurmSettings, check_slurm
from slurm.task import job_variables, run_node

_POLL_SECONDS = 1.0
_GONE_SECONDS = 20.0
_LAST_WORD_SECONDS = 10.0
"""Between the last node's end and the last line of the log."""
Show = Callable[[str], None]


def submit_job(
    path: Path,
    overrides: Sequence[str],
    environ: Mapping[str, str],
    show: Show,
    *,
    dry_run: bool = False,
    preflight: bool = False,
) -> int:
    """Submit a job file to Slurm; the exit code of the command.

    Args:
        path: the job file.
        overrides: ``key=value`` on top of it, or on top of the run's config.
        environ: environment of the process.
        show: takes lines for the user.
        dry_run: only show what would be submitted.
        preflight: a job of the same shape that only looks whether its nodes are fit; waited for.

    Raises:
        JobError: what is wrong with the job file (2), or why it could not be submitted (2, 73).
    """
    loaded = load_job(path, overrides, "slurm", SlurmSettings, check_slurm)
    job, block = loaded.job, loaded.block
    plan = make_plan(job, block, Path.cwd(), sys.executable, ONLY_PREFLIGHT if preflight else None)
    plan, copy = _with_run(loaded, plan, environ, show)
    without = left_out(environ)
    if without:
        show(f"not passed on, because Slurm would take it before what the job file says: {', '.join(without)}")
    if dry_run:
        show(f"# sbatch script\n{render(job, block, plan)}\n{plan_text(job, plan)}")
        return ExitCode.DONE
    if shutil.which("sbatch") is None:
        raise JobError(ExitCode.CONFIG, "sbatch is not on PATH\n    fix: submit on a login node of the Slurm cluster")
    job_id = _submit(job, block, plan, copy, without)
    log = log_path(plan, job_id)
    show(f"submitted job {job_id} ({job.name}): {job.resources.nodes} node(s), {job.ranks_per_node} rank(s) on each")
    show(f"log: {log}")
    if preflight:
        show("it waits in the queue as any other job; Ctrl-C cancels it")
        try:
            return wait_for_preflight(plan, job_id, job.resources.nodes, show)
        except KeyboardInterrupt:
            show(_cancel(job_id))
            return ExitCode.STOPPED
    run, logs = Path(plan.checkpoint_dir) / "sft", [log_path(plan, job_id, "*")]
    for line in remember("slurm", job_id, run, environ=environ, logs=logs, ask=f"squeue -j {job_id}"):
        show(line)
    show(f"stop it: scancel {job_id} (it saves, where that fits into the cluster's KillWait)")
    show(f"save and queue again: scancel --signal=USR2 {job_id}")
    return ExitCode.DONE


def plan_text(job: JobFile, plan: Plan) -> str:
    """What happens on each node, for people."""
    variables = _variables(job, plan, {})
    if plan.master_port is None and Env.MASTER_PORT in variables:
        variables[Env.MASTER_PORT] = "(from the job's id)"
    setting = Setting(plan, variables, "JOBID", 0, "NODE0", "UID:GID")
    verbs = {NO_PREFLIGHT: ["train"], FIRST_PREFLIGHT: ["preflight", "train"], ONLY_PREFLIGHT: ["preflight"]}
    commands = [job_command(setting, verb, plan.config, *plan.overrides) for verb in verbs[plan.preflight]]
    limits = ", ".join(
        f"{name} {'(no limit)' if most is None else f'({most} times)'}" for name, most in plan.retries.items()
    )
    lines = ["# plan", "on node 0 (others differ in NODE_RANK) there runs, with these variables:"]
    lines += [f"    {shlex.join(command)}" for command in commands]
    lines += [f"    {name}={value}" for name, value in sorted(job_environ(setting).items())]
    lines += [f"    {name}: from the environment in which you submit" for name in plan.secrets]
    lines += [
        f"run folder: {plan.checkpoint_dir}/sft",
        f"log of node 0: {log_path(plan, 'JOBID')}",
        f"queued again after: {limits}",
        f"without a new checkpoint: {'no limit' if plan.fruitless is None else f'{plan.fruitless} starts in a row'}",
    ]
    return "\n".join(lines) + "\n"


def _variables(job: JobFile, plan: Plan, environ: Mapping[str, str]) -> dict[str, str]:
    """What the job will see on node 0, as far as that is known before there are nodes."""
    hosts = tuple(f"NODE{node}" for node in range(job.resources.nodes))
    here = Allocation("JOBID", 0, 0, hosts, None)
    return job_variables(dataclasses.replace(plan, master_port=plan.master_port or 1), here, environ)


def _with_run(
    loaded: LoadedJob[SlurmSettings], plan: Plan, environ: Mapping[str, str], show: Show
) -> tuple[Plan, Copy]:
    """Look at everything that can be looked at here; the plan with a copy of the run's config in place of the file.

    Raises:
        ProblemsError: what is wrong.
    """
    config, container = Path(plan.config), plan.container != "none"
    place = Place(
        "slurm", "nodes", config, plan.overrides, _variables(loaded.job, plan, environ), gpu_count=plan.gpus_per_node
    )
    if container:
        named = {"config": plan.config, "checkpoint_dir": plan.checkpoint_dir, "slurm.folder": plan.folder}
        # A cluster's runtimes bring mounts and a working folder of their own.
        sight = Sight(planned_mounts(plan.config, plan.checkpoint_dir, plan.mounts), closed=False)
        place = dataclasses.replace(place, mounted=named, sight=sight)
    problems, notes = look_from_here(loaded, place, environ)
    for line in notes:
        show(line)
    raise_problems(problems)
    copy = copy_for(config, Path(plan.folder))
    mounts = with_folder_of(config, plan.checkpoint_dir, plan.mounts) if container else plan.mounts
    return dataclasses.replace(plan, config=str(copy.path), mounts=mounts), copy


def _submit(job: JobFile, block: SlurmSettings, plan: Plan, copy: Copy, without: Sequence[str]) -> str:
    folder = Path(plan.folder)
    try:
        Path(plan.checkpoint_dir).mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:  # it was there; scripts and logs are the owner's alone
            folder.chmod(0o700)
        copy.write()
    except OSError as error:
        raise JobError(
            ExitCode.CANNOT_CREATE,
            f"{folder} cannot be made, or made yours alone: {error}\n    fix: another checkpoint_dir or slurm.folder",
        ) from error
    try:
        return make_executor(job, block, plan, without).submit(run_node, plan.values()).job_id
    except FailedJobError as error:
        said = [line for line in str(error).splitlines() if line.startswith("sbatch:")] or str(error).splitlines()[-1:]
        lines = "".join(f"\n    {line}" for line in said)
        raise JobError(ExitCode.CONFIG, f"sbatch did not take the job:{lines}") from error
    except (OSError, FailedSubmissionError) as error:
        raise JobError(ExitCode.CANNOT_CREATE, f"the job could not be submitted: {error}") from error


def wait_for_preflight(plan: Plan, job_id: str, nodes: int, show: Show) -> int:
    """Show what the preflight says, as it says it; its exit code.

    Raises:
        JobError: the job ended without a word (137).
    """
    ends, log, shown = Ends(Path(plan.folder), job_id, 0), log_path(plan, job_id), 0
    gone_at: float | None = None
    ended_at: float | None = None
    while True:
        time.sleep(_POLL_SECONDS)
        found, queued = ends.all(), _is_queued(job_id)
        if log.exists():
            text = log.read_bytes()[shown:]
            whole = text[: text.rfind(b"\n") + 1]
            shown += len(whole)
            if whole:
                show(whole.decode("utf-8", errors="replace").rstrip("\n"))
        if len(found) == nodes:
            # Node 0 still has to say what it makes of the ends, and Slurm to carry that into the log.
            ended_at = ended_at or time.monotonic()
            if not queued or time.monotonic() - ended_at > _LAST_WORD_SECONDS:
                return joint_code(found)
        if queued:
            gone_at = None
        elif gone_at is None:
            gone_at = time.monotonic()
        if gone_at is not None and time.monotonic() - gone_at > _GONE_SECONDS:
            raise JobError(ExitCode.LOST, f"job {job_id} ended without a word from every node\n    log: {log}")


def _is_queued(job_id: str) -> bool:
    """Whether the job may still come to its end; a controller that does not answer says nothing of it."""
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--states=PENDING,CONFIGURING,RUNNING,COMPLETING,SUSPENDED"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return True
    if asked.returncode != 0:
        return "Invalid job id" not in asked.stderr
    return bool(asked.stdout.strip())


def _cancel(job_id: str) -> str:
    """Cancel the job; a line for the user."""
    try:
        done = subprocess.run(["scancel", job_id], capture_output=True, text=True, timeout=60, check=False)
        said = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    return (
        f"job {job_id} is not cancelled ({said})\n    fix: scancel {job_id}" if said else f"job {job_id} is cancelled"
    )
