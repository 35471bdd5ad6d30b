"""What starts the job on a node: the node's Python, or a container runtime. One entry for each; commands are lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sft_job.contract import Env
from sft_job.jobfile.engine import OF_THE_HOST, Container, run_command
from sft_job.jobfile.mounts import Mount, planned_mounts
from slurm.plan import Plan

# What a job's libraries read besides what the job file names.
_PASSED_PREFIXES = ("WANDB_", "HF_", "NCCL_", "GLOO_", "TORCH_", "TRITON_", "OMP_", "SFT_JOB_")


@dataclass(frozen=True)
class Setting:
    """Where a job is started.

    Attributes:
        plan: the job's plan.
        environ: of the job: all variables that it is to see.
        job_id: Slurm's id.
        node: this node's number in the job.
        host: its name in Slurm.
        user: ``UID:GID`` of the job.
    """

    plan: Plan
    environ: Mapping[str, str]
    job_id: str
    node: int
    host: str
    user: str

    @property
    def mounts(self) -> list[Mount]:
        """What the container sees."""
        return planned_mounts(self.plan.config, self.plan.checkpoint_dir, self.plan.mounts)

    @property
    def passed(self) -> list[str]:
        """Names of the variables that go into a container that does not see all of them."""
        named = {
            Env.CONFIG_PATH,
            Env.CONFIG_NAME,
            Env.CHECKPOINT_DIR,
            Env.NPROC_PER_NODE,
            Env.NNODES,
            Env.NODE_RANK,
            Env.MASTER_ADDR,
            Env.MASTER_PORT,
            *self.plan.environment,
        }
        known = [name for name in self.environ if name in named or name.startswith(_PASSED_PREFIXES)]
        return sorted({*known, *self.plan.secrets} - ({*OF_THE_HOST} - self.kept.keys()))

    @property
    def kept(self) -> dict[str, str]:
        """Of the variables that a container does not get from its node: those that the job file sets."""
        return {name: value for name, value in self.plan.environment.items() if name in OF_THE_HOST}

    @property
    def name(self) -> str:
        """Name of a container that outlives its client.

        By host: a later start of the job on this one may count it as another node.
        """
        return f"sft-job-{self.job_id}-{self.host}"


def job_command(setting: Setting, verb: str, *arguments: str) -> list[str]:
    """The command that runs ``sft-job VERB`` on this node."""
    runtime = RUNTIMES[setting.plan.container]
    return [*runtime.start(setting), *runtime.inner(setting.plan), verb, *arguments]


def job_environ(setting: Setting) -> dict[str, str]:
    """The environment from which that command starts."""
    if setting.plan.container == "none":
        return dict(setting.environ)
    plain = {name: value for name, value in setting.environ.items() if name not in OF_THE_HOST}
    if setting.plan.container == "pyxis":
        return plain | setting.kept
    if setting.plan.container == "apptainer":  # which takes LD_* from no other name, and sets them itself
        return plain | {f"APPTAINERENV_{name}": value for name, value in setting.kept.items()}
    return plain


def removal_command(setting: Setting) -> list[str] | None:
    """What removes a container that a start of this job left behind on this node; None where none can be left."""
    runtime = setting.plan.container
    return [runtime, "rm", "--force", setting.name] if runtime in ("docker", "podman") else None


def _no_container(setting: Setting) -> list[str]:
    return []


def _pyxis(setting: Setting) -> list[str]:
    plan = setting.plan
    cpus = [f"--cpus-per-task={plan.cpus_per_node}"] if plan.cpus_per_node else []
    return [
        "srun",
        f"--jobid={setting.job_id}",
        "--overlap",  # beside the step of the process that starts it, on the same cores and devices
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        f"--nodelist={setting.host}",
        *cpus,
        "--mem=0",
        "--export=ALL",
        "--kill-on-bad-exit=0",
        f"--container-image={plan.image}",
        f"--container-mounts={','.join(map(str, setting.mounts))}",
        "--no-container-mount-home",
        f"--container-env={','.join(setting.passed)}",
        *plan.container_args,
    ]


def _apptainer(setting: Setting) -> list[str]:
    plan = setting.plan
    binds = [f"--bind={mount}" for mount in setting.mounts]
    gpus = ["--nv"] if plan.gpus_per_node else []
    return ["apptainer", "exec", *gpus, "--no-home", *binds, *plan.container_args, str(plan.image)]


def _docker(setting: Setting) -> list[str]:
    return _engine("docker", setting)


def _podman(setting: Setting) -> list[str]:
    return _engine("podman", setting, "--userns=keep-id")


def _engine(name: str, setting: Setting, *more: str) -> list[str]:
    plan = setting.plan
    devices = setting.environ.get("SLURM_STEP_GPUS") or setting.environ.get("SLURM_JOB_GPUS") or "all"
    container = Container(
        engine=name,
        name=setting.name,
        image=str(plan.image),
        user=setting.user,
        mounts=setting.mounts,
        gpus=devices if plan.gpus_per_node else None,
        shm_gib=plan.shm_gib,
        given=setting.kept,
        passed=setting.passed,
    )
    # Without an entry point: what it does to a command, only its image knows.
    own = ["--rm", "--init", "--network=host", "--ulimit=memlock=-1", "--entrypoint=", *more]
    return run_command(container, own, plan.container_args)


@dataclass(frozen=True)
class Runtime:
    """One way to start the job on a node.

    Attributes:
        start: what stands before the job's own command.
        inner: the job's own command, without its verb.
    """

    start: Callable[[Setting], list[str]]
    inner: Callable[[Plan], list[str]]


def _own_python(plan: Plan) -> list[str]:
    # -P: a folder of yours that is called slurm, or a json.py, is not taken for a package.
    return [plan.python, "-P", "-m", "sft_job.cli"]


def _in_image(plan: Plan) -> list[str]:
    return ["sft-job"]


RUNTIMES: Mapping[str, Runtime] = {
    "none": Runtime(_no_container, _own_python),
    "pyxis": Runtime(_pyxis, _in_image),
    "apptainer": Runtime(_apptainer, _in_image),
    "docker": Runtime(_docker, _in_image),
    "podman": Runtime(_podman, _in_image),
}
