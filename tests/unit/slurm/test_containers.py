"""Commands that start the job on a node, in each kind of container."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from slurm.containers import Setting, job_command, job_environ, removal_command
from slurm.plan import Plan


def setting(environ: dict[str, str] | None = None, **more: Any) -> Setting:
    given = {"config": "/home/me/sft.yaml", "checkpoint_dir": "/lustre/runs/one", "image": "x.sif", **more}
    plan = Plan.of({"folder": "/f", "python": "python", "container": "docker", **given})
    return Setting(plan, environ or {}, "12", 1, "n4", "1:1")


@pytest.mark.parametrize(
    ("more", "mounts"),
    [
        (
            {"mounts": ["/lustre:/lustre:ro", "/data:/data:ro"]},
            ["/lustre:/lustre:ro", "/data:/data:ro", "/home/me:/home/me:ro", "/lustre/runs/one:/lustre/runs/one:rw"],
        ),
        ({"config": "/lustre/runs/one/sft.yaml"}, ["/lustre/runs/one:/lustre/runs/one:rw"]),
        ({"config": "/lustre/runs/one/sub/sft.yaml"}, ["/lustre/runs/one:/lustre/runs/one:rw"]),
        (
            {"config": "/lustre/runs/sft.yaml"},
            ["/lustre/runs:/lustre/runs:ro", "/lustre/runs/one:/lustre/runs/one:rw"],
        ),
        (
            {"mounts": ["/lustre/runs/one:/lustre/runs/one:ro", "/home/me/:/home/me/:rw"]},
            ["/home/me:/home/me:rw", "/lustre/runs/one:/lustre/runs/one:rw"],
        ),
        (
            {"mounts": ["/fast:/lustre/runs/one:rw"]},
            ["/home/me:/home/me:ro", "/fast:/lustre/runs/one:rw"],
        ),
    ],
)
def test_a_folder_comes_before_what_lies_in_it_and_no_place_twice(more: dict[str, Any], mounts: list[str]) -> None:
    assert [str(mount) for mount in setting(**more).mounts] == mounts


@pytest.mark.parametrize("container", ["pyxis", "apptainer", "docker", "podman"])
def test_the_node_s_own_paths_stay_out_and_the_job_file_s_come_in(container: str) -> None:
    own = {"LD_LIBRARY_PATH": "/opt/mine", "PYTHONPATH": "/code"}
    # As job_variables makes it: the job file's environment on top of the node's.
    environ = {"LD_PRELOAD": "/host.so", "VIRTUAL_ENV": "/venv", **own, "NCCL_DEBUG": "INFO"}
    found = setting(environ, container=container, environment=own)
    command, started = job_command(found, "train"), job_environ(found)
    assert not any("LD_PRELOAD" in each or "VIRTUAL_ENV" in each for each in (*command, *started))
    for name, value in own.items():
        assert {
            "pyxis": started.get(name) == value and name in "".join(command).partition("--container-env=")[2],
            "apptainer": started.get(f"APPTAINERENV_{name}") == value and name not in started,
        }.get(container, f"--env={name}={value}" in command and name not in started)


@pytest.mark.parametrize("container", ["docker", "podman"])
def test_a_later_start_finds_what_was_left_on_its_host(container: str) -> None:
    left = setting(container=container)
    later = dataclasses.replace(left, node=0)
    other = dataclasses.replace(left, host="n5")
    (name,) = [each.removeprefix("--name=") for each in job_command(left, "train") if each.startswith("--name=")]
    assert removal_command(later) == [container, "rm", "--force", name]
    assert removal_command(other) != removal_command(left)
    assert removal_command(dataclasses.replace(left, job_id="13")) != removal_command(left)
