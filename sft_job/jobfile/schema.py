"""What ``job.yaml`` says to every launcher. A launcher's own settings stand in a block of its name."""

from __future__ import annotations

from dataclasses import dataclass, field

LAUNCHERS = ("docker", "slurm", "kubernetes")
"""Blocks that a job file may hold; each launcher reads its own one."""


@dataclass
class Resources:
    """What the job gets, node by node."""

    nodes: int = 1
    """Nodes of the run."""
    gpus_per_node: int = 1
    """GPUs on each; 0 = ranks on CPUs."""
    ranks_per_node: int | None = None
    """Ranks on each node (``NPROC_PER_NODE``); null = one for each GPU, or one without any."""
    cpus_per_node: int | None = None
    """CPU cores on each node; null = what the launcher gives by itself."""
    memory_gib: float | None = None
    """Host memory on each node in GiB; 0 = all of it; null = what the launcher gives by itself.

    A container gets ``shm_gib`` besides, for its ``/dev/shm`` counts as memory; so do files in its ``/tmp``, where that
    lies in memory.
    """
    shm_gib: float = 16.0
    """Size of ``/dev/shm`` in a container that has one of its own, in GiB; it counts as memory."""
    time: str | None = None
    """Time limit of one start: minutes, ``HH:MM:SS`` or ``DAYS-HH:MM:SS``; null = what the launcher gives by itself."""


@dataclass
class Retries:
    """How often the launcher starts the job again after each kind of end; the job's own breaker (86) holds besides."""

    timeouts: int | None = None
    """After a time limit; null = as often as it takes."""
    preemptions: int | None = None
    """After it had to make room for others; null = as often as it takes."""
    losses: int | None = 10
    """After a rank or node was lost (exit code 137); null = as often as it takes."""
    without_checkpoint: int | None = 20
    """Starts in a row, whatever ended them, that may leave no new checkpoint; null = as many as it takes.

    Many, because a preemption may come before a start could make a step.
    """


@dataclass
class JobFile:
    """One job: what runs, where its files are, and what it gets."""

    name: str = "sft"
    """Name of the job in the launcher's lists: letters, digits, ``.``, ``_`` and ``-``."""
    config: str = ""
    """The run's YAML file on this machine. A relative path begins at the folder in which you submit."""
    overrides: list[str] = field(default_factory=list[str])
    """Settings of the run on top of it, each ``key=value``."""
    image: str | None = None
    """Container image with sft_job in it; null = no container."""
    checkpoint_dir: str = ""
    """Folder for the run's files (``CHECKPOINT_DIR``; the run folder is ``sft`` in it), seen by every node."""
    mounts: list[str] = field(default_factory=list[str])
    """What the container sees besides: ``/path`` or ``/path:/path/in/container``, with ``:rw`` to write there."""
    environment: dict[str, str] = field(default_factory=dict[str, str])
    """Environment variables of the job; no secrets."""
    secrets: list[str] = field(default_factory=list[str])
    """Names of variables with secrets; the values come from the environment in which you submit, and into no file."""
    resources: Resources = field(default_factory=Resources)
    """What the job gets."""
    grace_seconds: int = 120
    """From the wish to stop to the end of the job: the rest of a step, a save, and a few seconds to leave."""
    retries: Retries = field(default_factory=Retries)
    """How often it is started again."""
    preflight: bool = False
    """Before each start: look whether nodes, devices, network and folders are fit (``sft-job preflight``)."""

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node."""
        return self.resources.ranks_per_node or self.resources.gpus_per_node or 1
