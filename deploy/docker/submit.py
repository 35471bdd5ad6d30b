"""``sft-job submit docker``: load, check, show, start. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deploy.docker.plan import Plan, command, make_plan
from deploy.docker.settings import DockerSettings, check_docker, opens
from sft_job.contract import ExitCode
from sft_job.errors import JobError, Problem, raise_problems
from sft_job.jobfile.load import LoadedJob, load_job
from sft_job.jobfile.mounts import check_target, parse_mount, planned_mounts
from sft_job.jobfile.run import Copy, Place, copy_for, look_from_here, with_folder_of
from sft_job.jobfile.seen import Sight
from sft_job.submissions import remember

_START_SECONDS = 3600
"""An image that is not here yet is pulled first."""
Show = Callable[[str], None]


def submit_job(
    path: Path, overrides: Sequence[str], environ: Mapping[str, str], show: Show, *, dry_run: bool = False
) -> int:
    """Start a job file in a container of this machine; the exit code of the command.

    Args:
        path: the job file.
        overrides: ``key=value`` on top of it, or on top of the run's config.
        environ: environment of the process.
        show: takes lines for the user.
        dry_run: only show what would be started.

    Raises:
        JobError: what is wrong with the job file (2), or why it could not be started (2, 73).
    """
    loaded = load_job(path, overrides, "docker", DockerSettings, check_docker)
    user = f"{os.getuid()}:{os.getgid()}"
    plan = make_plan(loaded.job, loaded.block, Path.cwd(), user, secrets.token_hex(4))
    plan, copy = _with_run(loaded, plan, environ, show)
    if dry_run:
        show(plan_text(plan))
        return ExitCode.DONE
    if shutil.which(plan.engine, path=environ.get("PATH")) is None:
        fix = "install it, or set docker.engine=podman" if plan.engine == "docker" else "install it"
        raise JobError(ExitCode.CONFIG, f"{plan.engine} is not on PATH\n    fix: {fix}")
    _make_folders(plan, copy)
    if plan.preflight:
        code = subprocess.run(command(plan, "preflight", wait=True), env=dict(environ), check=False).returncode
        if code != 0:
            return code
    _start(plan, environ, show)
    _tell(plan, environ, show)
    return ExitCode.DONE


def plan_text(plan: Plan) -> str:
    """The commands as a shell takes them, and what they mean, for people."""
    lines = ["# before training"] * plan.preflight
    lines += [shlex.join(command(plan, "preflight", wait=True))] * plan.preflight
    lines += ["# training", shlex.join(command(plan, "train")), "", "# plan"]
    lines += [f"{name}: from the environment in which you submit" for name in plan.secrets]
    lines += [
        f"run folder: {plan.checkpoint_dir}/sft",
        f"copy of the config, made when it is submitted: {plan.config}",
        f"log: {plan.engine} logs --follow {plan.name}",
        f"stopped by {plan.engine} stop {plan.name}: saves, and leaves with 143 within {plan.grace_seconds} s",
        "started again: by submitting again; it goes on where it stood",
    ]
    return "\n".join(lines)


def _with_run(
    loaded: LoadedJob[DockerSettings], plan: Plan, environ: Mapping[str, str], show: Show
) -> tuple[Plan, Copy]:
    """Look at everything that can be looked at here; the plan with a copy of the run's config in place of the file.

    Raises:
        JobError: what is wrong.
    """
    config = Path(plan.config)
    place = Place(
        "docker",
        "container",
        config,
        plan.overrides,
        plan.variables,
        gpu_count=plan.gpu_count,
        mounted={"config": plan.config, "checkpoint_dir": plan.checkpoint_dir},
        sight=Sight(planned_mounts(plan.config, plan.checkpoint_dir, plan.mounts), closed=not opens(plan.args)),
    )
    problems, notes = look_from_here(loaded, place, environ)
    for line in notes:
        show(line)
    for at, each in enumerate(plan.mounts):
        source = parse_mount(each).source
        if not Path(source).exists():  # the engine would make a folder there, of root's
            rule, fix = "there is no such file or folder on this machine", "correct the path, or make the folder"
            at_line = loaded.origin(f"mounts[{at}]")
            problems.append(Problem(ExitCode.CONFIG, f"mounts[{at}]", rule, fix, source, at_line))
    problems += _targets(loaded, plan)
    raise_problems(problems)
    copy = copy_for(config, Path(plan.folder))
    mounts = with_folder_of(config, plan.checkpoint_dir, plan.mounts)
    return dataclasses.replace(plan, config=str(copy.path), mounts=mounts), copy


def _targets(loaded: LoadedJob[DockerSettings], plan: Plan) -> list[Problem]:
    """Mounts that would hide what the container needs."""
    targets = {"config": (str(Path(plan.config).parent), plan.config)}
    targets["checkpoint_dir"] = (plan.checkpoint_dir, plan.checkpoint_dir)
    targets |= {f"mounts[{at}]": (parse_mount(each).target, each) for at, each in enumerate(plan.mounts)}
    problems: list[Problem] = []
    for subject, (target, value) in targets.items():
        try:
            check_target(target)
        except ValueError as error:
            fix = "another target: /path:/path/in/container" if subject.startswith("mounts") else "another folder"
            problems.append(Problem(ExitCode.CONFIG, subject, str(error), fix, value, loaded.origin(subject)))
    return problems


def _make_folders(plan: Plan, copy: Copy) -> None:
    """The checkpoint folder as yours, before the engine makes it as root's; and the copy of the config in it."""
    try:
        Path(plan.checkpoint_dir).mkdir(parents=True, exist_ok=True)
        copy.write()
        if plan.user != f"{os.getuid()}:{os.getgid()}":  # another user is to read it
            for each in (copy.path.parent, copy.path.parent.parent, Path(plan.folder)):
                each.chmod(0o755)
            copy.path.chmod(0o644)
    except OSError as error:
        raise JobError(
            ExitCode.CANNOT_CREATE, f"{plan.folder} cannot be made: {error}\n    fix: another checkpoint_dir"
        ) from error


def _start(plan: Plan, environ: Mapping[str, str], show: Show) -> None:
    """Start the container.

    Raises:
        JobError: the engine did not (2, or 73 where it could not be asked).
    """
    have = subprocess.run(
        [plan.engine, "image", "inspect", plan.image], env=dict(environ), capture_output=True, check=False
    )
    if have.returncode != 0:  # what the engine says of its progress is read where it fails
        show(f"{plan.image} is not on this machine: {plan.engine} pulls it first; a large image takes minutes")
    try:
        done = subprocess.run(
            command(plan, "train"),
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JobError(ExitCode.CANNOT_CREATE, f"{plan.engine} could not be asked: {error}") from error
    if done.returncode == 0:
        return
    # One that was made and could not be started would keep the name, and look like a job.
    subprocess.run(
        [plan.engine, "rm", "--force", "--volumes", plan.name], env=dict(environ), capture_output=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("See '")][-6:]
    lines = "".join(f"\n    {re.sub(r'[^ -~]', ' ', line)}" for line in said)
    raise JobError(ExitCode.CONFIG, f"{plan.engine} did not start the job:{lines}{_advice(done.stderr, plan)}")


def _advice(said: str, plan: Plan) -> str:
    """What to do about the errors that everybody meets once."""
    if "capabilities: [[gpu]]" in said:
        return "\n    fix: install the NVIDIA container toolkit; for ranks on the CPU set resources.gpus_per_node=0"
    if "onnect to the Docker daemon" in said or "permission denied" in said:
        return f"\n    fix: start the engine; `{plan.engine} info` must work for you"
    if "nable to find image" in said:
        return "\n    fix: build it here (make image), log in where it is kept, or correct image"
    return ""


def _tell(plan: Plan, environ: Mapping[str, str], show: Show) -> None:
    """What was started, and how to look after it; the job is known to ``sft-job status`` from now on."""
    run, ask = Path(plan.checkpoint_dir) / "sft", f"{plan.engine} ps --all --filter name={plan.name}"
    show(f"started container {plan.name}: {plan.ranks} rank(s)")
    show(f"log: {plan.engine} logs --follow {plan.name}")
    for line in remember("docker", plan.name, run, environ=environ, ask=ask):
        show(line)
    show(f"stop it: {plan.engine} stop {plan.name} (it saves first; submit it again and it goes on)")
    show(f"exit code: {plan.engine} wait {plan.name}; forget it: {plan.engine} rm --volumes {plan.name}")
