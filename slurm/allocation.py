"""What Slurm says of the allocation on this node."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

from submitit import JobEnvironment

_PORTS_FROM, _PORTS = 10_000, 20_000
_ASK_SECONDS = 30


@dataclass(frozen=True)
class Allocation:
    """Where this process stands in the job.

    Attributes:
        job_id: Slurm's id, the same when it is queued again: ``SFT_JOB_ID``.
        start: how often it was queued again before.
        node: this node's number in the job.
        hosts: names of all nodes; the first is that of node 0.
        end_time: Unix time at which Slurm ends this start; None = never, or unknown.
    """

    job_id: str
    start: int
    node: int
    hosts: tuple[str, ...]
    end_time: float | None

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        return len(self.hosts)

    @property
    def port(self) -> int:
        """A port below those that kernels hand out, another one for each job and each start of it."""
        return _PORTS_FROM + (int(self.job_id.partition("_")[0]) * 7 + self.start) % _PORTS


def read_allocation(environ: Mapping[str, str]) -> Allocation:
    """The allocation of this process, as its environment tells; where it ends, Slurm may have to be asked."""
    here = JobEnvironment()
    return Allocation(
        job_id=here.job_id,
        start=int(environ.get("SLURM_RESTART_COUNT") or 0),
        node=here.global_rank,
        hosts=tuple(here.hostnames),
        end_time=end_time_of(environ, here.raw_job_id),
    )


def end_time_of(environ: Mapping[str, str], job_id: str) -> float | None:
    """Unix time at which Slurm ends this start; None = never, or unknown."""
    given = environ.get("SLURM_JOB_END_TIME", "")  # since Slurm 23.02
    if given.isdecimal():
        return float(given)
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job_id}", "--format=%e"],
            capture_output=True,
            text=True,
            timeout=_ASK_SECONDS,
            check=True,
        )
        return time.mktime(time.strptime(asked.stdout.strip(), "%Y-%m-%dT%H:%M:%S"))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
