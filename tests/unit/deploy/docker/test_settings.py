"""Rules of the ``docker`` block."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.docker.settings import DockerSettings, check_docker
from sft_job.errors import ProblemsError
from sft_job.jobfile.load import load_job

BASE = ["config=a.yaml", "checkpoint_dir=/runs", "image=x:1"]


def said(tmp_path: Path, *overrides: str) -> str:
    path = tmp_path / "job.yaml"
    path.write_text("name: mine\n")
    with pytest.raises(ProblemsError) as error:
        load_job(path, [*BASE, *overrides], "docker", DockerSettings, check_docker)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("docker.engine=nerdctl", "docker.engine = 'nerdctl'\n    must be one of docker, podman"),
        ("image=null", "must name the image"),
        ("resources.nodes=2", "one container runs on one machine"),
        ("docker.gpus=0;1", "must be all, or ids of GPUs with commas"),
        ('docker.gpus="0,1"', "names 2 GPUs, and resources.gpus_per_node is 1"),
        ("docker.user=me", "must be UID:GID"),
        ("docker.user=0", "must be UID:GID"),
        ("docker.network=a b", "must be a network's name"),
        ("docker.network=--privileged", "begins with a dash"),
        ('docker.args=["evil/image"]', "must be one long option of run, with its value"),
        ('docker.args=["--"]', "must be one long option of run, with its value"),
        ('docker.args=["-v=/:/host"]', "must be one long option of run, with its value"),
        ('docker.args=["--env=A=b"]', "has a setting of its own\n    fix: set environment"),
        ('docker.args=["--rm"]', "would undo how the job is started, stopped and found again"),
        ('docker.args=["--label=MY_TOKEN=c0ffeec0ffeec0ffee"]', "looks like a secret"),
        ('docker.args=["--label=a\\nb"]', "holds the control character U+000A"),
        ('environment={A: "x\\ny"}', "holds the control character U+000A"),
        ("environment.SFT_JOB_ID=1", "the launcher sets this variable itself"),
        ('overrides=["--entrypoint=sh"]', "begins with a dash"),
        ("secrets=[PATH]", "is set by the image"),
        ("secrets=[LD_PRELOAD]", "is set by the image"),
        ("image=--privileged", "begins with a dash"),
        ('mounts=["/a:/b:exec"]', "must be /path or /path:/path/in/container"),
    ],
)
def test_refused(tmp_path: Path, override: str, words: str) -> None:
    assert words in said(tmp_path, override)


def test_everything_at_once(tmp_path: Path) -> None:
    assert said(tmp_path, "docker.engine=x", "docker.user=y", "resources.nodes=3").startswith("3 problems:")
    assert "docker.tty\n    unknown key" in said(tmp_path, "docker.tty=true")


def test_gpus_need_a_count(tmp_path: Path) -> None:
    assert "resources.gpus_per_node is 0" in said(tmp_path, "docker.gpus=all", "resources.gpus_per_node=0")
