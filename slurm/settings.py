"""The ``slurm`` block of ``job.yaml``, and its rules."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sft_job.errors import Problem
from sft_job.jobfile.schema import JobFile
from sft_job.jobfile.validate import Checks, check_assignments, check_literals, seconds_of, text_problems

RUNTIMES = ("none", "pyxis", "apptainer", "docker", "podman")
"""What starts the job on a node."""
LEAVE_SECONDS = 15
"""Between the end of the job's own grace and that of Slurm: to agree between the nodes and to queue again."""
KILL_SECONDS = 10
"""So long before Slurm's end a job that has not left is killed: Slurm would end us with it, and queue nothing again."""
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+:@,=*-]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_MODULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]*")
_INTERFACE = re.compile(r"[=^]?[A-Za-z0-9][A-Za-z0-9._,:-]*")
# Options of sbatch that other settings stand for, or that would undo how the job is started and queued again.
_OWN_OPTIONS = {
    "job-name": "name",
    "nodes": "resources.nodes",
    "time": "resources.time",
    "mem": "resources.memory_gib",
    "cpus-per-task": "resources.cpus_per_node",
    "gpus-per-node": "resources.gpus_per_node",
    "gres": "slurm.gres",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "constraint": "slurm.constraint",
    "nodelist": "slurm.nodelist",
    "exclude": "slurm.exclude",
    "exclusive": "slurm.exclusive",
    "dependency": "slurm.dependency",
    "signal": "grace_seconds",
    "output": "slurm.folder",
    "error": "slurm.folder",
}
_FORBIDDEN = (
    "array",
    "export-file",
    "help",
    "hold",
    "ignore-pbs",
    "no-kill",
    "no-requeue",
    "ntasks",
    "ntasks-per-core",
    "ntasks-per-gpu",
    "ntasks-per-node",
    "ntasks-per-socket",
    "open-mode",
    "parsable",
    "quiet",
    "requeue",
    "test-only",
    "usage",
    "version",
    "wait",
    "wrap",
)

# Whole names of options that begin as one above does.
_NO_ABBREVIATIONS = ("export", "gpus")
# Options of srun that the script sets itself, or that would start other processes than one on each node.
_SRUN_FORBIDDEN = (
    "container-image",
    "cpus-per-task",
    "error",
    "help",
    "input",
    "jobid",
    "kill-on-bad-exit",
    "multi-prog",
    "nodes",
    "no-kill",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "pty",
    "relative",
    "test-only",
    "time",
    "unbuffered",
    "usage",
    "version",
    "wait",
)


@dataclass
class SlurmSettings:
    """How Slurm gets the job and what starts it on a node."""

    partition: str | None = None
    """Partition, or several with commas; null = the cluster's default."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have: ``a100&ib``."""
    nodelist: str | None = None
    """Nodes that must be among those of the job."""
    exclude: str | None = None
    """Nodes that must not be."""
    gres: str | None = None
    """Generic resources of each node, in place of ``--gpus-per-node``: ``gpu:4,nvme:1``."""
    gpu_type: str | None = None
    """Type of the GPUs: ``a100`` makes ``--gpus-per-node=a100:N``."""
    exclusive: str | None = None
    """``true`` = nobody else on the nodes; or ``user``, ``mcs``, ``topo``."""
    dependency: str | None = None
    """Jobs to wait for: ``afterok:123``, ``singleton``."""
    sbatch: dict[str, str] = field(default_factory=dict[str, str])
    """Any other option of sbatch without its dashes (``{reservation: spring}``); ``true`` for one without a value."""
    srun_args: list[str] = field(default_factory=list[str])
    """More long options of the srun that starts one process on each node."""
    modules: list[str] = field(default_factory=list[str])
    """Environment modules to load before."""
    setup: list[str] = field(default_factory=list[str])
    """Shell lines, each a whole command, that the first node runs before; their variables reach every node."""
    network_interface: str | None = None
    """Network interface of the ranks: ``NCCL_SOCKET_IFNAME`` and ``GLOO_SOCKET_IFNAME``."""
    master_port: int | None = None
    """Port at which the ranks meet; null = one derived from the job's id."""
    python: str | None = None
    """Python on the nodes, outside of any container, that has sft_job and submitit; null = the one that submits."""
    container: str = "none"
    """What starts the job on a node: none (``python`` itself), pyxis, apptainer, docker or podman."""
    container_args: list[str] = field(default_factory=list[str])
    """More options of the container runtime."""
    folder: str | None = None
    """Folder of sbatch scripts and logs, seen by every node; null = ``slurm`` in ``checkpoint_dir``."""


def check_slurm(job: JobFile, slurm: SlurmSettings) -> list[Problem]:
    """Everything that is wrong with the block, alone and with the rest of the job file."""
    dashes = frozenset({"slurm.srun_args", "slurm.container_args", "slurm.sbatch"})  # --nice=-5
    problems = text_problems(slurm, "slurm", dashes)
    check = Checks(problems)
    for name in ("partition", "account", "qos", "nodelist", "exclude", "gres", "gpu_type", "dependency"):
        value = getattr(slurm, name)
        brackets = value.replace("[", "").replace("]", "") if value and name in ("nodelist", "exclude") else value
        plain = value is None or _WORD.fullmatch(brackets.replace("?", ",") if name == "dependency" else brackets)
        check(plain, f"slurm.{name}", "must be letters, digits and . _ / + : @ , = * -", value=value)
    known = (None, "true", "user", "mcs", "topo")
    word = (slurm.exclusive or "").lower()
    fix = {"false": "leave it out, or write null", "no": "leave it out, or write null"}.get(
        word, f"write {word if word in known else 'true'}"
    )
    check(slurm.exclusive in known, "slurm.exclusive", "must be true, user, mcs or topo", fix, slurm.exclusive)
    for name, value in slurm.sbatch.items():
        _check_option(check, name)
        check_assignments(check, f"slurm.sbatch.{name}", value)
    for name in ("srun_args", "container_args"):
        for at, each in enumerate(getattr(slurm, name)):
            check(each, f"slurm.{name}[{at}]", "must not be empty")
            check_assignments(check, f"slurm.{name}[{at}]", each)
            check_literals(check, f"slurm.{name}[{at}]", each)
    export = slurm.sbatch.get("export", "ALL")
    rule = "takes the secrets, PATH and the rest of your environment from the job"
    check("ALL" in export.split(","), "slurm.sbatch.export", rule, "leave it out, or begin it with ALL,", export)
    for at, each in enumerate(slurm.srun_args):
        _check_srun(check, f"slurm.srun_args[{at}]", each, slurm.srun_args[at - 1] if at else "")
    for at, each in enumerate(slurm.modules):
        check(_MODULE.fullmatch(each), f"slurm.modules[{at}]", "must be a module's name", value=each)
    for at, line in enumerate(slurm.setup):
        rule = "sbatch would read it as an option"
        check(not line.lstrip().startswith("#SBATCH"), f"slurm.setup[{at}]", rule, "write it below slurm.sbatch", line)
        rule = "must be a whole command: its exit code is looked at"
        check(not line.endswith("\\"), f"slurm.setup[{at}]", rule, "put the lines that belong together into one", line)
        check_assignments(check, f"slurm.setup[{at}]", line)
        check_literals(check, f"slurm.setup[{at}]", line)
    interface = slurm.network_interface
    rule = "must be the name of an interface, or a list of names"
    check(interface is None or _INTERFACE.fullmatch(interface), "slurm.network_interface", rule, value=interface)
    port = slurm.master_port
    check(port is None or 1024 <= port <= 65535, "slurm.master_port", "must be from 1024 to 65535", value=port)
    check("%" not in (slurm.folder or ""), "slurm.folder", "must hold no %", value=slurm.folder)
    seconds = seconds_of(job.resources.time or "")
    rule = (
        f"is not longer than grace_seconds and {LEAVE_SECONDS} s to leave: every start would end before its first step"
    )
    fix = "a longer time, or smaller grace_seconds"
    short = seconds is not None and job.grace_seconds <= seconds <= job.grace_seconds + LEAVE_SECONDS
    check(not short, "resources.time", rule, fix, job.resources.time)
    _check_gpus(job, slurm, check)
    _check_container(job, slurm, check)
    return problems


def _check_option(check: Checks, name: str) -> None:
    subject = f"slurm.sbatch.{name}"
    check(_OPTION.fullmatch(name), subject, "must be a long option of sbatch without its dashes", value=name)
    if name in _NO_ABBREVIATIONS:
        return
    own = next((option for option in _OWN_OPTIONS if _means(name, option)), None)
    undone = next((option for option in _FORBIDDEN if _means(name, option)), None)
    if undone and own != name:
        rule = "would undo how the job is started and queued again"
        check(False, subject, rule if undone == name else f"is read as {undone}, which {rule}", "remove it")
    elif own:
        rule = "has a setting of its own"
        check(False, subject, rule if own == name else f"is read as {own}, which {rule}", f"set {_OWN_OPTIONS[own]}")


def _means(name: str, option: str) -> bool:
    """Slurm takes an option's beginning for the option."""
    return name != "" and option.startswith(name)


def _check_srun(check: Checks, subject: str, text: str, before: str) -> None:
    short = text.startswith("-") and not text.startswith("--")
    check(not short, subject, "must be a long option, or the value of one", "write its long name", text)
    value = before.startswith("--") and "=" not in before
    rule = "no option before it takes it as its value: srun would start it in place of the job"
    check(text.startswith("-") or value, subject, rule, "write --option=value", text)
    option, _, exported = text.partition("=")
    rule = "takes the secrets, PATH and the rest of your environment from the job"
    exports = option == "--export" and "ALL" not in exported.split(",")
    check(not exports, subject, rule, "leave it out, or write --export=ALL,...", text)
    name = text.removeprefix("--").partition("=")[0]
    undone = next((option for option in _SRUN_FORBIDDEN if text.startswith("--") and _means(name, option)), None)
    rule = f"{undone} is set by the script, or would undo how the job is started"
    check(undone is None and text != "--", subject, rule, "remove it", text)


def _check_gpus(job: JobFile, slurm: SlurmSettings, check: Checks) -> None:
    both = slurm.gres is not None and slurm.gpu_type is not None
    check(not both, "slurm.gpu_type", "slurm.gres names the GPUs too", "keep one of the two", slurm.gpu_type)
    if slurm.gres is not None:
        asked, gpus = _gpus_in(slurm.gres), job.resources.gpus_per_node
        rule = f"asks for {asked} GPUs on each node, and resources.gpus_per_node is {gpus}"
        fix = f"resources.gpus_per_node: {asked}, or another number here" if asked else f"add gpu:{gpus}"
        check(asked is None or asked == gpus, "slurm.gres", rule, fix, slurm.gres)
    if slurm.gpu_type is not None:
        rule = "resources.gpus_per_node is 0"
        check(job.resources.gpus_per_node, "slurm.gpu_type", rule, "say how many", slurm.gpu_type)


def _gpus_in(gres: str) -> int | None:
    """Whole GPUs that it asks for: ``gpu``, ``gpu:2``, ``gpu:a100:4``, ``gres/gpu=8``; None where it asks for parts."""
    count = 0
    for each in gres.split(","):
        name, *more = re.split("[:=]", each.removeprefix("gres/").removeprefix("gres:"))
        if name in ("shard", "mps"):
            return None
        if name == "gpu":
            count += int(more[-1]) if more and more[-1].isdecimal() else 1
    return count


def _check_container(job: JobFile, slurm: SlurmSettings, check: Checks) -> None:
    name, image = slurm.container, job.image
    check(name in RUNTIMES, "slurm.container", f"must be one of {', '.join(RUNTIMES)}", value=name)
    if name == "none":
        fix = f"set slurm.container to one of {', '.join(RUNTIMES[1:])}, or leave the image out"
        check(image is None, "image", "slurm.container is none: nothing would start the image", fix, image)
        check(not job.mounts, "mounts", "there is no container", "remove them: the job sees what its node sees")
        check(not slurm.container_args, "slurm.container_args", "there is no container", "remove them")
    elif name in RUNTIMES:
        check(image, "image", f"slurm.container is {name}, and no image is named", "name one, or container: none")
