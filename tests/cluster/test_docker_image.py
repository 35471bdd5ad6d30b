"""The image as a real engine builds and runs it: a root that is read-only, no network, no rights, any user."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sft_job import __version__
from tests.chaos.oracle import differences
from tests.cluster.conftest import evidence_of
from tests.cluster.docker_engine import (
    BASE_IMAGE,
    CANARY,
    HARD,
    USER,
    DockerRun,
    Engine,
    Make,
    files_with,
    pace_overrides,
)
from tests.cluster.slurm_cluster import REPOSITORY, SEED_YAML, STEPS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()


def inside(engine: Engine, image: str, script: str) -> subprocess.CompletedProcess[str]:
    return engine.run("--rm", *HARD, "--entrypoint=bash", image, "-euc", script)


def test_what_is_in_it(engine: Engine, image: str) -> None:
    config = json.loads(engine("image", "inspect", "--format", "{{json .Config}}", image))
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.revision"].removesuffix("-dirty") == commit()
    assert labels["org.opencontainers.image.base.name"] == BASE_IMAGE
    assert labels["org.opencontainers.image.created"]
    assert config["Entrypoint"] == ["/usr/bin/tini", "--", "sft-job"]
    assert (config["Cmd"], config["User"]) == (["train"], "10001:0")
    assert "Healthcheck" not in config
    # What Triton needs while it runs is there, what compiles CUDA is not; nobody has a name, and everything has a home.
    script = """
        ! command -v nvcc
        echo '#include <Python.h>' > /tmp/x.c
        gcc -c -o /tmp/x.o -I"$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')" /tmp/x.c
        python -c 'import getpass, os, tempfile; print(getpass.getuser(), os.environ["HOME"], tempfile.gettempdir())'
        ! touch /x
        ! touch /opt/sft-job/x
        echo 'raise SystemExit("the folder one stands in shadows a module")' > /tmp/json.py; cd /tmp; sft-job --version
    """
    done = inside(engine, image, script)
    assert done.returncode == 0, done.stderr
    user, version = done.stdout.splitlines()
    assert user == "sft-job /tmp /tmp"
    assert version == f"sft-job {__version__} (commit {labels['org.opencontainers.image.revision']})"


def test_locked_packages_are_those_that_are_imported(engine: Engine, image: str) -> None:
    lines = (REPOSITORY / "requirements" / "image.txt").read_text().splitlines()
    locked = dict(line.rstrip(" \\").split("==") for line in lines if "==" in line and ";" not in line)
    code = f"from importlib.metadata import version\nfor name in {sorted(locked)}: print(version(name))"
    done = inside(engine, image, f"python -c {shlex.quote(code)}")
    assert done.stdout.split() == [locked[name] for name in sorted(locked)]


def test_no_secret_of_the_build_is_in_a_layer(engine: Engine, image: str) -> None:
    assert CANARY not in engine("history", "--no-trunc", image)
    assert CANARY not in engine("image", "inspect", image)
    base = len(engine.layers(BASE_IMAGE))
    own = engine.layers(image)[:-base]
    assert own
    assert any((layer / "opt" / "sft-job" / "packages").is_dir() for layer in own)
    assert files_with(CANARY, *own) == []


def test_it_trains(whole: DockerRun, shared: Path) -> None:
    outcome = whole.outcome()
    revision = whole.engine(
        "image", "inspect", "--format", '{{index .Config.Labels "org.opencontainers.image.revision"}}', whole.image
    )
    assert (outcome["code"], outcome["step"]) == (0, STEPS)
    assert (outcome["version"], outcome["commit"]) == (__version__, revision)
    owner = tuple(map(int, USER.split(":")))
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in whole.run.rglob("*")} == {owner}
    # The secret stood in a setting.
    assert files_with(CANARY, whole.root, shared / "whole.log") == []
    assert files_with("<secret WANDB_API_KEY>", whole.root)


def test_the_demo(docker_run: Make) -> None:
    """As a new user tries the image, at the hardest place: two ranks, shown what was learned."""
    run = docker_run("demo")
    done = run.engine.run("--rm", *HARD, f"--volume={run.root}:/out", run.image, "demo", "/out/demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((run.root / "demo").rglob("huggingface/model.safetensors"))
    owner = tuple(map(int, USER.split(":")))
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in (run.root / "demo").rglob("*")} == {owner}


def test_docker_stop_saves_and_the_next_one_goes_on(docker_run: Make, whole: DockerRun) -> None:
    run = docker_run("run")
    first = run.start(pace=0.2)
    run.wait_step(11, first)
    assert run.stop(first) == 143
    assert "SIGTERM: the ranks finish their step, save and leave" in run.log(first)
    stopped = run.outcome()
    assert (stopped["reason"], stopped["step"]) == ("stopped", run.step())
    assert 11 <= run.step() < STEPS
    second = run.start(pace=0)
    assert run.exit_code(second) == 0, run.log(second)
    assert differences(evidence_of(whole.root), evidence_of(run.root), exact=True, ledger=False) == []
    assert run.outcome()["weights_sha256"] == whole.outcome()["weights_sha256"]
    assert CANARY not in run.log(first) + run.log(second)


def test_a_volume_of_root_and_a_full_one(docker_run: Make, engine: Engine) -> None:
    run = docker_run("run")
    os.chown(run.root, 0, 0)
    run.root.chmod(0o755)
    done = run.train()
    assert done.returncode == 73, done.stdout + done.stderr
    shown = done.stdout + done.stderr
    assert "/out" in shown
    assert "fix: " in shown
    assert "12345" in shown
    assert "Traceback" not in shown
    assert list(run.root.iterdir()) == []
    options = ["type=tmpfs", "device=tmpfs", f"o=size=300k,uid={USER.partition(':')[0]}"]
    volume = engine("volume", "create", *(f"--opt={option}" for option in options))
    try:
        done = run.train(volume)
        shown = done.stdout + done.stderr
        assert done.returncode == 73, shown
        assert "fix: " in shown
        assert "Traceback" not in shown
    finally:
        engine("volume", "rm", volume)


def submit(run: DockerRun, *arguments: str) -> str:
    """The real command; the container's name."""
    job = {
        "name": "mine",
        "image": run.image,
        "config": str(run.inputs / SEED_YAML.name),
        "checkpoint_dir": str(run.root),
        "overrides": pace_overrides(run.inputs, secret=False),
        "environment": {"PYTHONPATH": str(run.inputs / "code"), "OMP_NUM_THREADS": "1", "TEST_PACE": "0.2"},
        "secrets": ["WANDB_API_KEY"],
        "grace_seconds": 60,
        "resources": {"gpus_per_node": 0, "ranks_per_node": 2, "shm_gib": 0.0625},
        "docker": {"network": "none"},
    }
    path = run.root.parent / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    done = command(run, "submit", "docker", str(path), *arguments)
    assert done.returncode == 0, done.stderr
    assert CANARY not in done.stdout
    name = next(
        line.split()[2].rstrip(":") for line in done.stdout.splitlines() if line.startswith("started container")
    )
    run.names.append(name)
    return name


def command(run: DockerRun, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {"WANDB_API_KEY": CANARY, "XDG_STATE_HOME": str(run.root.parent), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", "sft_job.cli", *words],
        env=run.engine.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_submitted_stopped_and_submitted_again(docker_run: Make, whole: DockerRun) -> None:
    run = docker_run("run")
    os.chown(run.root, os.getuid(), os.getgid())  # the job runs as who submits
    first = submit(run)
    run.wait_step(5, first)
    assert "running" in command(run, "status", first).stdout
    begin = time.monotonic()
    run.engine("stop", first)  # within the job file's grace, not the engine's ten seconds
    assert time.monotonic() - begin < 60
    assert run.exit_code(first) == 143
    assert "stopped" in command(run, "status", first).stdout
    second = submit(run, "environment.TEST_PACE=0")
    assert second != first
    assert run.exit_code(second) == 0, run.log(second)
    assert "done" in command(run, "status", second).stdout
    assert run.outcome()["weights_sha256"] == whole.outcome()["weights_sha256"]
    assert files_with(CANARY, run.root) == []
    assert CANARY not in run.log(first) + run.log(second)
    host = json.loads(run.engine("inspect", "--format", "{{json .HostConfig}}", second))
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["NetworkMode"]) == (True, ["ALL"], "none")
