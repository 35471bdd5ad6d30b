"""The ``docker`` block of ``job.yaml``, and its rules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from sft_job.errors import Problem
from sft_job.jobfile.engine import ENGINES
from sft_job.jobfile.schema import JobFile
from sft_job.jobfile.validate import Checks, check_assignments, text_problems

_GPUS = re.compile(r"all|[A-Za-z0-9-]+(,[A-Za-z0-9-]+)*")
_USER = re.compile(r"[0-9]+:[0-9]+")
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*")
_OPTION = re.compile(r"--[a-z][a-z0-9-]*(=.*)?")
# Options that other settings stand for, or that would undo how the job is started, stopped and found again.
_OWN_OPTIONS = {
    "name": "name",
    "env": "environment",
    "volume": "mounts",
    "gpus": "docker.gpus",
    "user": "docker.user",
    "network": "docker.network",
    "net": "docker.network",
    "shm-size": "resources.shm_gib",
    "cpus": "resources.cpus_per_node",
    "memory": "resources.memory_gib",
    "stop-timeout": "grace_seconds",
}
_OF_THE_IMAGE = re.compile(r"PATH|HOME|USER|LOGNAME|SHELL|PWD|TMPDIR|VIRTUAL_ENV|CONDA_.*|DOCKER_.*|LD_.*|PYTHON.*")
"""Variables that may not be passed on from this machine."""
_OPENINGS = ("image-volume", "mount", "read-only", "rootfs", "tmpfs", "volumes-from", "workdir")
"""Options with which the container sees or writes more than the job file's mounts say."""
_FORBIDDEN = ("detach", "entrypoint", "env-file", "help", "interactive", "restart", "rm", "stop-signal", "tty")


@dataclass
class DockerSettings:
    """How a container engine of this machine gets the job."""

    engine: str = "docker"
    """The command: docker or podman."""
    gpus: str | None = None
    """Which GPUs: ``all``, or their ids with commas (``2,3``); null = the first ``resources.gpus_per_node``."""
    user: str | None = None
    """``UID:GID`` of the job; null = yours, so that the files are yours."""
    network: str | None = None
    """Network of the container; ``none`` where nothing is to be reached; null = the engine's own."""
    args: list[str] = field(default_factory=list[str])
    """More options of ``run``, each ``--option`` or ``--option=value``; they count for more than those of this job."""


def check_docker(job: JobFile, docker: DockerSettings) -> list[Problem]:
    """Everything that is wrong with the block, alone and with the rest of the job file."""
    problems = text_problems(docker, "docker", frozenset({"docker.args"}))
    check = Checks(problems)
    check(docker.engine in ENGINES, "docker.engine", f"must be one of {', '.join(ENGINES)}", value=docker.engine)
    check(job.image, "image", "must name the image", "image: NAME:TAG, as `make image` made it")
    rule, fix = "one container runs on one machine", "resources.nodes=1; several nodes: submit slurm or kubernetes"
    check(job.resources.nodes == 1, "resources.nodes", rule, fix, job.resources.nodes)
    gpus, count = docker.gpus, job.resources.gpus_per_node
    good = gpus is None or _GPUS.fullmatch(gpus)
    check(good, "docker.gpus", "must be all, or ids of GPUs with commas", value=gpus)
    if gpus is not None and good:
        check(count, "docker.gpus", "resources.gpus_per_node is 0", "say how many", gpus)
        named = len(gpus.split(","))
        rule, fix = f"names {named} GPUs, and resources.gpus_per_node is {count}", f"resources.gpus_per_node={named}"
        check(gpus == "all" or not count or named == count, "docker.gpus", rule, fix, gpus)
    check(docker.user is None or _USER.fullmatch(docker.user), "docker.user", "must be UID:GID", value=docker.user)
    good = docker.network is None or _NETWORK.fullmatch(docker.network)
    check(good, "docker.network", "must be a network's name", value=docker.network)
    for at, name in enumerate(job.secrets):
        rule, fix = "is set by the image, and this machine's value would not fit there", "take it out of the list"
        check(not _OF_THE_IMAGE.fullmatch(name), f"secrets[{at}]", rule, fix, name)
    for at, each in enumerate(docker.args):
        _check_option(check, f"docker.args[{at}]", each)
    return problems


def opens(args: Sequence[str]) -> bool:
    """Whether the user's own options let the container see or write more than the mounts, or begin elsewhere."""
    return any(each.removeprefix("--").partition("=")[0] in _OPENINGS for each in args)


def _check_option(check: Checks, subject: str, text: str) -> None:
    """What is no option with its value would be taken for the image."""
    fix = "write --option, or --option=value as one text"
    check(_OPTION.fullmatch(text), subject, "must be one long option of run, with its value", fix, text)
    name = text.removeprefix("--").partition("=")[0]
    own = _OWN_OPTIONS.get(name)
    check(own is None, subject, "has a setting of its own", f"set {own}", text)
    rule = "would undo how the job is started, stopped and found again"
    check(name not in _FORBIDDEN, subject, rule, "remove it", text)
    check_assignments(check, subject, text)
