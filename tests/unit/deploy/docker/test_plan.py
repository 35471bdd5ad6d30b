"""The engine's command: the whole text, and what must hold for any job."""

from __future__ import annotations

import shlex
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.docker import plan as room
from deploy.docker.plan import command, make_plan
from deploy.docker.settings import DockerSettings, check_docker
from deploy.docker.submit import plan_text
from sft_job.jobfile.load import load_job
from sft_job.jobfile.schema import JobFile

GOLDEN = Path(__file__).parents[3] / "golden" / "docker"
EXAMPLE = Path(room.__file__).with_name("job.yaml")
CASES = {
    "gpus": [],
    "cpu": ["resources.gpus_per_node=0", "resources.ranks_per_node=2", "docker.network=none", "docker.user=12345:0"],
    "everything": [
        "name=mine",
        "image=registry.example.com/team/sft-job@sha256:0123abcd",
        "checkpoint_dir=~/runs",
        "mounts=[/data/sets, /data/models:/models, /scratch:/scratch:rw]",
        "environment={WANDB_PROJECT: a b, PYTHONPATH: /extra, NCCL_DEBUG: $(touch x)}",
        "secrets=[WANDB_API_KEY, HF_TOKEN]",
        "resources={gpus_per_node: 2, cpus_per_node: 16, memory_gib: 200, shm_gib: 0.5, time: 12:00:00}",
        "docker.gpus='2,3'",
        "grace_seconds=300",
        "preflight=true",
        'docker.args=["--ipc=host", "--cap-add=IPC_LOCK"]',
        "optim.lr=2e-5",
    ],
    "podman": ["docker.engine=podman", "resources.gpus_per_node=2", "mounts=[/data]"],
    "podman-root": ["docker.engine=podman", "resources.gpus_per_node=2", "docker.gpus=all", "docker.user=0:0"],
}


def text(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    monkeypatch.setenv("HOME", "/home/me")
    loaded = load_job(EXAMPLE, overrides, "docker", DockerSettings, check_docker)
    return plan_text(make_plan(loaded.job, loaded.block, Path("/home/me"), "1000:1001", "0123abcd")) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To make them anew: delete a file, run this test, look at what it wrote."""
    found, path = text(monkeypatch, *CASES[name]), GOLDEN / f"{name}.txt"
    if not path.exists():
        path.write_text(found)
        pytest.fail(f"{path} was missing and is written: look at it")
    assert found == path.read_text()


@pytest.mark.parametrize("name", CASES)
def test_it_gets_no_more_than_it_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = next(each for each in text(monkeypatch, *CASES[name]).splitlines() if "--detach" in each)
    words = shlex.split(line)
    assert {"--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--ulimit=core=0"} <= {*words}
    assert "--privileged" not in words
    writable = [each for each in words if each.startswith("--volume=") and not each.endswith(":ro")]
    known = ("runs/sft:rw", "/runs:rw", "/scratch:rw")
    assert writable
    assert all(each.endswith(known) for each in writable)


def test_secrets_are_named_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee" * 6)
    found = text(monkeypatch, "secrets=[WANDB_API_KEY]")
    assert "--env=WANDB_API_KEY " in found
    assert "c0ffee" not in found


def test_the_line_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    before = text(monkeypatch)
    for name in ("NPROC_PER_NODE", "CHECKPOINT_DIR", "WANDB_PROJECT", "PYTHONPATH"):
        monkeypatch.setenv(name, "/else")
    assert text(monkeypatch) == before


def test_the_user_s_own_limit_of_time_counts_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    line = text(monkeypatch, "resources.time=60", "trainer.max_wall_seconds=99")
    assert "train /home/me/sft_trainer.yaml trainer.max_wall_seconds=3600 trainer.max_wall_seconds=99\n" in line


WORDS = st.text(st.sampled_from(string.ascii_letters + string.digits + " $`;|&'\"\\()<>*~#!"), min_size=1, max_size=20)


@given(override=WORDS, value=WORDS)
def test_values_reach_no_shell(override: str, value: str) -> None:
    """What a user writes is one word of the command, also when a shell reads the line that was shown."""
    job = JobFile("x", "/c/a.yaml", [f"trainer.note={override}"], "i", "/c", environment={"A": value})
    words = command(make_plan(job, DockerSettings(), Path("/"), "1:1", "t"), "train")
    assert shlex.split(shlex.join(words)) == words
    assert words[-3:] == ["train", "/c/a.yaml", f"trainer.note={override}"]
    assert f"--env=A={value}" in words
    assert words.index("i") == len(words) - 4
