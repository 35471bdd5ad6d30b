"""``docker run`` and ``podman run``: the part of the line that is the same whoever starts the container."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sft_job.jobfile.mounts import Mount

ENGINES = ("docker", "podman")

OF_THE_HOST = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD")
"""Of the host's own Python: in a container these would point at files that are not there, or at other versions.

On the engine's command line they stand with their values, for without one they would act on its own client.
"""


@dataclass(frozen=True)
class Container:
    """One container of the job.

    Attributes:
        engine: one of ``ENGINES``.
        name: of the container.
        image: of the job.
        user: ``UID:GID``.
        mounts: what it sees.
        gpus: None, ``all``, a number of GPUs, or their ids with commas.
        shm_gib: size of ``/dev/shm``.
        given: variables with their values.
        passed: variables whose values come from the environment of the engine's client, and stand in no command line.
    """

    engine: str
    name: str
    image: str
    user: str
    mounts: Sequence[Mount]
    gpus: str | int | None = None
    shm_gib: float = 16.0
    given: Mapping[str, str] = field(default_factory=dict[str, str])
    passed: Sequence[str] = ()


def run_command(container: Container, options: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    """The command that starts a container; what runs in it comes behind.

    Args:
        container: what is started.
        options: the caller's.
        more: the user's, which count for more.
    """
    variables = {**dict.fromkeys(container.passed), **container.given}
    return [
        container.engine,
        "run",
        f"--name={container.name}",
        f"--shm-size={container.shm_gib:g}g",
        f"--user={container.user}",
        *options,
        *gpu_options(container.engine, container.gpus),
        *(f"--volume={mount}" for mount in container.mounts),
        *(
            f"--env={name}" if value is None else f"--env={name}={value}"
            for name, value in sorted(variables.items(), key=lambda each: each[0])
        ),
        *more,
        container.image,
    ]


def gpu_options(engine: str, gpus: str | int | None) -> list[str]:
    """What gives GPUs to a container.

    Args:
        engine: one of ``ENGINES``.
        gpus: None, ``all``, how many, or their ids with commas.
    """
    if not gpus:
        return []
    if engine == "podman":
        names = [str(each) for each in range(gpus)] if isinstance(gpus, int) else gpus.split(",")
        return [f"--device=nvidia.com/gpu={each}" for each in names]
    # Quotes within: docker reads the value as CSV.
    return ["--gpus", str(gpus) if isinstance(gpus, int) or gpus == "all" else f'"device={gpus}"']
