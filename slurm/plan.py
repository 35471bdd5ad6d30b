"""What is to happen on each node, as plain values: they travel with the job, and any Python reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sft_job.jobfile.mounts import parse_mount
from sft_job.jobfile.schema import JobFile
from slurm.settings import SlurmSettings

NO_PREFLIGHT, FIRST_PREFLIGHT, ONLY_PREFLIGHT = "no", "first", "only"
"""Values of ``Plan.preflight``: none; before training; and nothing else."""


@dataclass(frozen=True)
class Plan:
    """What the process on each node needs to know.

    Attributes:
        folder: of scripts and logs.
        config: the run's YAML file.
        overrides: ``key=value`` on top of it.
        checkpoint_dir: ``CHECKPOINT_DIR``.
        ranks_per_node: ``NPROC_PER_NODE``.
        gpus_per_node: 0 = none.
        cpus_per_node: None = what Slurm gave.
        shm_gib: of a container that has a ``/dev/shm`` of its own.
        environment: variables of the job.
        secrets: names of variables that hold secrets.
        interface: network interface of the ranks.
        master_port: None = derived from the job's id.
        python: the Python on the nodes.
        container: what starts the job on a node.
        image: the container's image.
        mounts: ``source:target:ro|rw``.
        container_args: more options of the container runtime.
        grace_seconds: from the wish to stop to the end.
        retries: how often to queue again after each kind of end; None = as often as it takes.
        fruitless: ends in a row that may leave the same checkpoint; None = any number.
        preflight: one of ``NO_PREFLIGHT``, ``FIRST_PREFLIGHT``, ``ONLY_PREFLIGHT``.
    """

    folder: str
    config: str
    checkpoint_dir: str
    python: str
    overrides: list[str] = field(default_factory=list[str])
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_node: int | None = None
    shm_gib: float = 16.0
    environment: dict[str, str] = field(default_factory=dict[str, str])
    secrets: list[str] = field(default_factory=list[str])
    interface: str | None = None
    master_port: int | None = None
    container: str = "none"
    image: str | None = None
    mounts: list[str] = field(default_factory=list[str])
    container_args: list[str] = field(default_factory=list[str])
    grace_seconds: int = 120
    retries: dict[str, int | None] = field(default_factory=dict[str, "int | None"])
    fruitless: int | None = None
    preflight: str = NO_PREFLIGHT

    def values(self) -> dict[str, Any]:
        """As nested lists and dictionaries."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Plan:
        """From ``values()``."""
        return cls(**values)


def make_plan(job: JobFile, slurm: SlurmSettings, cwd: Path, python: str, preflight: str | None = None) -> Plan:
    """The plan of a checked job file.

    Args:
        job: what every launcher reads.
        slurm: the block.
        cwd: where relative paths begin.
        python: the Python that submits.
        preflight: in place of what the job file says.
    """
    checkpoints = _absolute(job.checkpoint_dir, cwd)
    return Plan(
        folder=_absolute(slurm.folder, cwd) if slurm.folder else f"{checkpoints}/slurm",
        config=_absolute(job.config, cwd),
        checkpoint_dir=checkpoints,
        python=_home(slurm.python or python),
        overrides=list(job.overrides),
        ranks_per_node=job.ranks_per_node,
        gpus_per_node=job.resources.gpus_per_node,
        cpus_per_node=job.resources.cpus_per_node,
        shm_gib=job.resources.shm_gib,
        environment=dict(job.environment),
        secrets=list(job.secrets),
        interface=slurm.network_interface,
        master_port=slurm.master_port,
        container=slurm.container,
        image=job.image and _home(job.image),
        mounts=[str(parse_mount(each)) for each in job.mounts],
        container_args=list(slurm.container_args),
        grace_seconds=job.grace_seconds,
        retries={
            "timeout": job.retries.timeouts,
            "preemption": job.retries.preemptions,
            "loss": job.retries.losses,
        },
        fruitless=job.retries.without_checkpoint,
        preflight=preflight or (FIRST_PREFLIGHT if job.preflight else NO_PREFLIGHT),
    )


def _absolute(path: str, cwd: Path) -> str:
    return os.path.normpath(cwd / _home(path))


def _home(path: str) -> str:
    """The path with ``~`` written out; nothing else of it changes, for an image may be no path."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # nobody of that name
        return path
