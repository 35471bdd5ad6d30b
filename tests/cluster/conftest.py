"""A Slurm cluster for all workers of a test session, each with nodes of its own; a Docker engine for one worker."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.chaos.oracle import Evidence, gather
from tests.cluster.docker_engine import BASE_IMAGE, CANARY, DockerRun, Engine, NoEngineError
from tests.cluster.slurm_cluster import (
    GROUP_NODES,
    GROUPS,
    REPOSITORY,
    SEED_YAML,
    Cluster,
    NoClusterError,
    SlurmRun,
    run_alone,
    run_overrides,
)
from tests.tiny import save_model, write_rows

REQUIRED = "SFT_JOB_CLUSTER_REQUIRED"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all workers of this session share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def cluster(shared: Path, testrun_uid: str) -> Iterator[Cluster]:
    """A real Slurm; the worker that is done last ends it."""
    state = Path(f"/tmp/sft-slurm-{testrun_uid[:8]}")
    users = shared / "cluster-users"
    with FileLock(shared / "cluster.lock"):
        try:
            found = Cluster(state)
        except NoClusterError as reason:
            if os.environ.get(REQUIRED) == "1":
                pytest.fail(f"{REQUIRED}=1, and no Slurm starts: {reason}")
            pytest.skip(f"no Slurm starts here: {reason}")
        users.write_text(str(int(users.read_text()) + 1 if users.exists() else 1))
    yield found
    with FileLock(shared / "cluster.lock"):
        left = int(users.read_text()) - 1
        users.write_text(str(left))
        if left == 0:
            found.close()


@pytest.fixture(scope="session")
def inputs(shared: Path) -> Path:
    """A model with dropout, and rows."""
    folder = shared / "inputs"
    with FileLock(shared / "inputs.lock"):
        if not folder.exists():
            save_model(folder / "qwen3", "qwen3", attention_dropout=0.1)
            write_rows(folder / "train.parquet", 41)
            write_rows(folder / "val.parquet", 5, seed=1)
    return folder


@pytest.fixture(scope="session")
def undisturbed(shared: Path, inputs: Path) -> Callable[[int], Evidence]:
    """What the run leaves on one machine with so many ranks; each number is run once in a session."""

    def evidence(ranks: int) -> Evidence:
        root = shared / f"alone-{ranks}"
        with FileLock(shared / f"alone-{ranks}.lock"):
            if not root.exists():
                run_alone(root, ranks, run_overrides(inputs))
        return evidence_of(root)

    return evidence


def evidence_of(root: Path) -> Evidence:
    """What a run below this ``CHECKPOINT_DIR`` left, and the steps that its ranks have made."""
    return gather(root / "sft", root)


@pytest.fixture
def slurm_run(cluster: Cluster, inputs: Path, tmp_path: Path, worker_id: str) -> Iterator[Callable[..., SlurmRun]]:
    """``slurm_run(settings, overrides, environment)``: a job on this worker's nodes; cancelled at the end."""
    group = int(worker_id.removeprefix("gw")) % GROUPS if worker_id != "master" else 0
    nodes = [f"n{group * GROUP_NODES + number}" for number in range(1, GROUP_NODES + 1)]
    made: list[SlurmRun] = []

    def make(name: str = "run", **more: Any) -> SlurmRun:
        run = SlurmRun(cluster, inputs, tmp_path / name, nodes, **more)
        made.append(run)
        return run

    yield make
    for run in made:
        if run.job_id:
            cluster.ask("scancel", "--quiet", run.job_id)
            run.wait(
                "its nodes are free", lambda: not cluster.ask("squeue", "--noheader", f"--nodelist={nodes[0]}"), 60
            )
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A real Docker engine."""
    try:
        found = Engine()
    except NoEngineError as reason:
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED}=1, and no Docker engine starts: {reason}")
        pytest.skip(f"no Docker engine starts here: {reason}")
    yield found
    found.close()


@pytest.fixture(scope="session")
def image(engine: Engine, shared: Path) -> Iterator[str]:
    """The image, built on the local base; a secret was there while it was built."""
    name = "localhost/sft-job:test"
    pip_conf = shared / "pip.conf"
    own = engine("run", "--rm", "--network=none", BASE_IMAGE, "cat", "/etc/pip.conf")
    pip_conf.write_text(f"# {CANARY}\n{own}\n")
    engine.build(name, pip_conf)
    yield name
    engine("image", "rm", "--force", name)


@pytest.fixture(scope="session")
def readable(inputs: Path) -> Path:
    """Model and rows, the config and the pace, for any user."""
    shutil.copy(SEED_YAML, inputs)
    (inputs / "code").mkdir(exist_ok=True)
    shutil.copy(REPOSITORY / "tests" / "cluster" / "pace.py", inputs / "code")
    for path in (inputs, *inputs.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return inputs


@pytest.fixture
def docker_run(engine: Engine, image: str, readable: Path, tmp_path: Path) -> Iterator[Callable[[str], DockerRun]]:
    """``docker_run(name)``: a run folder of the container's user; its containers are removed at the end."""
    made: list[DockerRun] = []

    def make(name: str) -> DockerRun:
        run = DockerRun(engine, image, readable, tmp_path / name)
        made.append(run)
        run.make_root()
        return run

    yield make
    for run in made:
        run.remove()


@pytest.fixture(scope="session")
def whole(engine: Engine, image: str, readable: Path, shared: Path) -> DockerRun:
    """A run in one container to its end."""
    run = DockerRun(engine, image, readable, shared / "whole")
    run.make_root()
    done = run.train()
    (shared / "whole.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return run
