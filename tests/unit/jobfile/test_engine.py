"""What every launcher says to docker and podman."""

from __future__ import annotations

import pytest

from sft_job.jobfile.engine import Container, gpu_options, run_command
from sft_job.jobfile.mounts import Mount, planned_mounts


@pytest.mark.parametrize(
    ("engine", "gpus", "options"),
    [
        ("docker", None, []),
        ("docker", 0, []),
        ("docker", 2, ["--gpus", "2"]),
        ("docker", "all", ["--gpus", "all"]),
        ("docker", "3,GPU-0a", ["--gpus", '"device=3,GPU-0a"']),
        ("podman", None, []),
        ("podman", 2, ["--device=nvidia.com/gpu=0", "--device=nvidia.com/gpu=1"]),
        ("podman", "all", ["--device=nvidia.com/gpu=all"]),
        ("podman", "3,5", ["--device=nvidia.com/gpu=3", "--device=nvidia.com/gpu=5"]),
    ],
)
def test_gpus(engine: str, gpus: str | int | None, options: list[str]) -> None:
    assert gpu_options(engine, gpus) == options


def test_the_user_s_options_come_last_and_the_image_behind_them() -> None:
    container = Container(
        "docker", "n", "i", "1:2", [Mount("/a", "/b")], shm_gib=0.5, given={"A": "x"}, passed=["S", "A", "B"]
    )
    assert run_command(container, ["--init"], ["--mine"]) == [
        *("docker", "run", "--name=n", "--shm-size=0.5g", "--user=1:2", "--init", "--volume=/a:/b:ro"),
        *("--env=A=x", "--env=B", "--env=S", "--mine", "i"),
    ]


def test_a_checkpoint_folder_stays_writable_and_the_config_visible() -> None:
    found = planned_mounts("/home/me/run/sft.yaml", "/home/me/run/out", ["/home/me/run/out:/home/me/run/out:ro"])
    assert list(map(str, found)) == ["/home/me/run:/home/me/run:ro", "/home/me/run/out:/home/me/run/out:rw"]
