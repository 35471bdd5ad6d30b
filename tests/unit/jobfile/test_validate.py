from __future__ import annotations

from typing import Any

import pytest

from sft_job.jobfile.mounts import Mount, parse_mount
from sft_job.jobfile.schema import JobFile, Resources, Retries
from sft_job.jobfile.validate import OURS, secret_problems, validate


def job(**more: Any) -> JobFile:
    return JobFile(**{"config": "sft.yaml", "checkpoint_dir": "/runs/one", **more})


def subjects(found: JobFile) -> list[str]:
    return [problem.subject for problem in validate(found)]


def test_a_good_one() -> None:
    good = job(
        mounts=["/data:/in:ro"],
        environment={"A_B": "c d", "XLA_FLAGS": "--xla_dump"},
        secrets=["WANDB_API_KEY"],
        overrides=["a.b=c=d", "data.prompt_key=questions", "data.train_files.a.prompt_key=questions"],
    )
    assert subjects(good) == []


@pytest.mark.parametrize(
    ("more", "subject"),
    [
        ({"name": "a\nb"}, "name"),
        ({"name": "$(x)"}, "name"),
        ({"name": "-x"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"config": ""}, "config"),
        ({"config": "a\x00b"}, "config"),
        ({"checkpoint_dir": "--wrap"}, "checkpoint_dir"),
        ({"checkpoint_dir": "/runs/%j"}, "checkpoint_dir"),
        ({"image": "a b"}, "image"),
        ({"image": "--privileged"}, "image"),
        ({"mounts": ["/a:b"]}, "mounts[0]"),
        ({"mounts": ["/a,/b"]}, "mounts[0]"),
        ({"mounts": ["/a:/b:/c"]}, "mounts[0]"),
        ({"mounts": ["/a/../etc"]}, "mounts[0]"),
        ({"overrides": ["x"]}, "overrides[0]"),
        ({"overrides": ["a=b", "--config=x"]}, "overrides[1]"),
        ({"overrides": ["a=b\u2028c"]}, "overrides[0]"),
        ({"environment": {"A-B": "x"}}, "environment.A-B"),
        ({"environment": {"NNODES": "2"}}, "environment.NNODES"),
        ({"environment": {"PET_NNODES": "2"}}, "environment.PET_NNODES"),
        ({"environment": {"PET_RDZV_ENDPOINT": "x"}}, "environment.PET_RDZV_ENDPOINT"),
        ({"environment": {"SFT_JOB_LOCK": "x"}}, "environment.SFT_JOB_LOCK"),
        ({"environment": {"SFT_JOB_SUPERVISOR": "1"}}, "environment.SFT_JOB_SUPERVISOR"),
        ({"environment": {"SFT_JOB_STORE_FD": "7"}}, "environment.SFT_JOB_STORE_FD"),
        ({"environment": {"SFT_JOB_DEADLINE": "9"}}, "environment.SFT_JOB_DEADLINE"),
        ({"environment": {"SFT_JOB_COMMIT": "x"}}, "environment.SFT_JOB_COMMIT"),
        ({"environment": {"A": "x\ry"}}, "environment.A"),
        ({"environment": {"WANDB_API_KEY": "0123456789abcdef"}}, "environment.WANDB_API_KEY"),
        ({"environment": {"PLAIN": "hf_abcdefghijklmnopqrstuvwxyz"}}, "environment.PLAIN"),
        ({"overrides": ["trainer.note='MY_TOKEN=0123456789'"]}, "overrides[0]"),
        ({"overrides": ["trainer.wandb_api_key=0123456789abcdef"]}, "overrides[0]"),
        ({"secrets": ["A B"]}, "secrets[0]"),
        ({"resources": Resources(nodes=0)}, "resources.nodes"),
        ({"resources": Resources(gpus_per_node=2, ranks_per_node=3)}, "resources.ranks_per_node"),
        ({"resources": Resources(memory_gib=float("nan"))}, "resources.memory_gib"),
        ({"resources": Resources(memory_gib=float("inf"))}, "resources.memory_gib"),
        ({"resources": Resources(memory_gib=2e6)}, "resources.memory_gib"),
        ({"resources": Resources(shm_gib=1e14)}, "resources.shm_gib"),
        ({"resources": Resources(nodes=10**6)}, "resources.nodes"),
        ({"resources": Resources(cpus_per_node=10**9)}, "resources.cpus_per_node"),
        ({"resources": Resources(time="99999-0")}, "resources.time"),
        ({"grace_seconds": 2**31}, "grace_seconds"),
        ({"resources": Resources(time="soon")}, "resources.time"),
        ({"resources": Resources(time="1"), "grace_seconds": 90}, "resources.time"),
        ({"resources": Resources(time="2"), "grace_seconds": 120}, "resources.time"),
        ({"grace_seconds": 0}, "grace_seconds"),
        ({"retries": Retries(losses=-1)}, "retries.losses"),
        ({"retries": Retries(without_checkpoint=0)}, "retries.without_checkpoint"),
    ],
)
def test_what_is_refused(more: dict[str, Any], subject: str) -> None:
    assert subject in subjects(job(**more))


def test_what_the_image_says_reaches_a_job_from_a_shell() -> None:
    """Launchers take ``OURS`` out of what they hand on; the image's commit stays."""
    assert "SFT_JOB_LOCK" in OURS
    assert "SFT_JOB_COMMIT" not in OURS


def test_a_secret_is_not_shown() -> None:
    (problem,) = validate(job(environment={"MY_TOKEN": "canary-of-the-hub"}))
    assert "canary" not in problem.text()
    assert "secrets: [MY_TOKEN]" in problem.fix


def test_a_secret_of_this_environment_in_any_text() -> None:
    environ = {"WANDB_API_KEY": "c0ffee" * 5, "HOME": "/home/me"}
    found = job(name="x", overrides=["a=1", f"trainer.note={environ['WANDB_API_KEY']}"], environment={"H": "/home/me"})
    (problem,) = secret_problems(found, "", environ)
    assert problem.subject == "overrides[1]"
    assert "c0ffee" not in problem.text()


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/a", Mount("/a", "/a")),
        ("/a:/b", Mount("/a", "/b")),
        ("/a:rw", Mount("/a", "/a", True)),
        ("/a:/b:rw", Mount("/a", "/b", True)),
        ("/a b:/b:ro", Mount("/a b", "/b")),
    ],
)
def test_mounts(text: str, mount: Mount) -> None:
    assert parse_mount(text) == mount
    assert parse_mount(str(mount)) == mount
