"""What is to run, as plain values; and the engine's command for it. Pure: the same plan gives the same line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.docker.settings import DockerSettings
from sft_job.contract import Env
from sft_job.jobfile.engine import Container, run_command
from sft_job.jobfile.mounts import absolute, parse_mount, planned_mounts
from sft_job.jobfile.schema import JobFile
from sft_job.jobfile.validate import seconds_of

_CACHES = "--tmpfs=/tmp:rw,exec,nosuid,nodev,mode=1777"
"""Compiled kernels are loaded from there, which the engine's own default (noexec) would forbid."""
_STACK_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class Plan:
    """One container of the job.

    Attributes:
        engine: docker or podman.
        name: of the container: the job's id.
        image: of the job.
        user: ``UID:GID``.
        config: absolute path of the YAML that the run gets.
        overrides: ``key=value`` on top of it.
        checkpoint_dir: ``CHECKPOINT_DIR``.
        mounts: ``source:target:ro|rw``.
        environment: variables with values.
        secrets: names of variables whose values are passed on.
        ranks: ``NPROC_PER_NODE``.
        gpu_count: 0 = none.
        gpus: ``all`` or ids; None = the first ones.
        cpus: None = all of the machine.
        memory_gib: None = all of the machine.
        shm_gib: size of ``/dev/shm``.
        network: None = the engine's own.
        grace_seconds: from the wish to stop to the end.
        preflight: before training, a container that only looks.
        args: more options.
    """

    engine: str
    name: str
    image: str
    user: str
    config: str
    checkpoint_dir: str
    overrides: list[str] = field(default_factory=list[str])
    mounts: list[str] = field(default_factory=list[str])
    environment: dict[str, str] = field(default_factory=dict[str, str])
    secrets: list[str] = field(default_factory=list[str])
    ranks: int = 1
    gpu_count: int = 0
    gpus: str | None = None
    cpus: int | None = None
    memory_gib: float | None = None
    shm_gib: float = 16.0
    network: str | None = None
    grace_seconds: int = 120
    preflight: bool = False
    args: list[str] = field(default_factory=list[str])

    @property
    def folder(self) -> str:
        """Where the copies of configs are."""
        return f"{self.checkpoint_dir}/docker"

    @property
    def variables(self) -> dict[str, str]:
        """What the job sees, but for secrets."""
        config = Path(self.config)
        found = {
            **self.environment,
            Env.CONFIG_PATH: str(config.parent),
            Env.CONFIG_NAME: config.name,
            Env.CHECKPOINT_DIR: self.checkpoint_dir,
            Env.NPROC_PER_NODE: str(self.ranks),
            Env.JOB_ID: self.name,
        }
        if self.gpu_count:
            found[Env.GPUS_PER_NODE] = str(self.gpu_count)
        return found


def make_plan(job: JobFile, docker: DockerSettings, cwd: Path, user: str, token: str) -> Plan:
    """The plan of a checked job file.

    Args:
        job: what every launcher reads.
        docker: the block.
        cwd: where relative paths begin.
        user: ``UID:GID`` of who submits.
        token: what tells this container from earlier ones of the same job.
    """
    resources = job.resources
    overrides = list(job.overrides)
    if resources.time is not None:  # before the user's own ones, which count for more
        overrides.insert(0, f"trainer.max_wall_seconds={seconds_of(resources.time)}")
    return Plan(
        engine=docker.engine,
        name=f"{job.name}-{token}",
        image=str(job.image),
        user=docker.user or user,
        config=absolute(job.config, cwd),
        checkpoint_dir=absolute(job.checkpoint_dir, cwd),
        overrides=overrides,
        mounts=[str(parse_mount(each)) for each in job.mounts],
        environment=dict(job.environment),
        secrets=list(job.secrets),
        ranks=job.ranks_per_node,
        gpu_count=resources.gpus_per_node,
        gpus=docker.gpus,
        cpus=resources.cpus_per_node,
        memory_gib=resources.memory_gib or None,
        shm_gib=resources.shm_gib,
        network=docker.network,
        grace_seconds=job.grace_seconds,
        preflight=job.preflight,
        args=list(docker.args),
    )


def command(plan: Plan, verb: str, *, wait: bool = False) -> list[str]:
    """The engine's command that runs ``sft-job VERB`` in a container.

    Args:
        plan: what is to run.
        verb: train or preflight.
        wait: stay until it ends, and leave no container; otherwise it runs on by itself and is kept for its log.
    """
    container = Container(
        engine=plan.engine,
        name=plan.name,
        image=plan.image,
        user=plan.user,
        mounts=planned_mounts(plan.config, plan.checkpoint_dir, plan.mounts),
        gpus=(plan.gpus or plan.gpu_count) if plan.gpu_count else None,
        shm_gib=plan.shm_gib,
        given=plan.variables,
        passed=plan.secrets,
    )
    own = ["--rm" if wait else "--detach", *_fences(plan), *_limits(plan)]
    return [*run_command(container, own, plan.args), verb, plan.config, *plan.overrides]


def _fences(plan: Plan) -> Sequence[str]:
    """What the job can do without."""
    keep_id = plan.engine == "podman" and not plan.user.startswith("0:")
    return [
        "--read-only",
        _CACHES,
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        *(["--userns=keep-id"] if keep_id else []),
        *([f"--network={plan.network}"] if plan.network else []),
    ]


def _limits(plan: Plan) -> Sequence[str]:
    limits = [f"--stop-timeout={plan.grace_seconds}", "--ulimit=core=0"]  # a core holds weights and secrets
    if plan.gpu_count:  # NVIDIA's advice: NCCL locks pages
        limits += ["--ulimit=memlock=-1", f"--ulimit=stack={_STACK_BYTES}"]
    if plan.engine == "podman":  # whose own limit counts threads too
        limits.append("--pids-limit=-1")
    if plan.cpus:
        limits.append(f"--cpus={plan.cpus}")
    if plan.memory_gib:
        total = plan.memory_gib + plan.shm_gib  # the engine counts /dev/shm, and Kubernetes adds it to its limit too
        limits += [f"--memory={total:g}g", f"--memory-swap={total:g}g"]
    return limits
