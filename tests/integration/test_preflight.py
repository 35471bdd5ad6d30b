"""`sft-job preflight` and the start of `train` on two nodes, which are two supervisors on this host."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.conftest import Job, end
from tests.ranks import free_port

pytestmark = pytest.mark.slow


class Nodes:
    """Two nodes as a launcher starts them."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.port = str(free_port())
        self.started: list[subprocess.Popen[str]] = []

    def start(self, node: int, *overrides: str, verb: str = "preflight", **more: str) -> subprocess.Popen[str]:
        place = {"NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
        process = subprocess.Popen(
            self.job.command(*overrides, verb=verb),
            env=self.job.variables(**{**place, **more}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def ends(self) -> list[tuple[int, str, str]]:
        """Exit code, standard output and standard error of each."""
        said = [process.communicate(timeout=120) for process in self.started]
        return [(process.returncode, *texts) for process, texts in zip(self.started, said, strict=True)]


@pytest.fixture
def nodes(job: Job):
    made = Nodes(job)
    yield made
    for process in made.started:
        end(process)


def huge_model(folder: Path, like: Path) -> Path:
    """A model folder whose weights are a hole of 1 TiB: no disk has room for its checkpoints."""
    folder.mkdir()
    for path in like.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    size = 2**40
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return folder


def test_two_nodes_that_fit(nodes: Nodes) -> None:
    nodes.start(0, NPROC_PER_NODE="2")
    nodes.start(1, NPROC_PER_NODE="2")
    (code, table, error), (other_code, other, other_error) = nodes.ends()
    assert (code, other_code, error, other_error) == (0, 0, "", "")
    assert [line.split()[-3] for line in other.splitlines()] == ["to"]
    lines = {line[:12].strip(): line.split()[1:] for line in table.splitlines()}
    assert "2 of 2: node 0" in table
    assert "4 ranks" in table
    assert "read by all nodes" in table
    assert "all-to-all" in table
    assert {"gpus", "software", "settings", "network", "space", "data", "model", "clocks", "memory"} <= lines.keys()
    assert "FAIL" not in table
    assert table.splitlines()[-1] == "node 0: fit to train on"
    assert list(nodes.job.run.iterdir()) == []


def test_everything_that_is_wrong_at_once(nodes: Nodes, tmp_path: Path) -> None:
    """Two folders instead of one, a clock an hour ahead, no room for checkpoints, a file that one node lacks."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(
        "import time\nreal = time.time\ntime.time = lambda: real() + 3600\n"
    )
    try:
        model = huge_model(tmp_path / "huge", nodes.job.inputs / "qwen3")
    except OSError:
        pytest.skip("this file system has no holes of 1 TiB")
    given = f"model.partial_pretrain={model}"
    root = Path(__file__).parents[2]
    gone = f"data.val_files={tmp_path}/gone.parquet"
    nodes.start(0, given)
    nodes.start(1, given, gone, PYTHONPATH=f"{tmp_path}/clock:{root}", CHECKPOINT_DIR=str(tmp_path / "elsewhere"))
    (code, table, error), (other_code, _, other_error) = nodes.ends()
    assert code == other_code == 65  # the first in the contract's order of those that there are
    assert error == other_error
    assert "the run folder\n    is not one folder for all nodes: node 0 " in error
    assert "the run needs about" in error
    assert "gone.parquet" in error
    assert "node 1 (" in error
    assert "3,600 s ahead of node 0" in table
    assert "not fit to train on: exit code 65 (data)" in error
    assert "Traceback" not in error + table


def test_a_node_that_does_not_come(job: Job) -> None:
    """Seen from node 0, and from node 1 where it is node 0 that is missing."""
    alone = [Nodes(job), Nodes(job)]
    try:
        for number, each in enumerate(alone):
            each.start(number, "--limit", "16")
        ((code, table, error),), ((other_code, _, other_error),) = (each.ends() for each in alone)
    finally:
        for each in alone:
            for process in each.started:
                end(process)
    assert (code, other_code) == (137, 137)
    assert "node 1 (rank 1)\n    did not come within " in error
    assert "1 of 2: node 0" in table
    assert f"no verdict came from node 0 at 127.0.0.1:{alone[1].port}" in other_error


def test_a_run_on_two_folders_ends_before_weights_load(nodes: Nodes, tmp_path: Path) -> None:
    nodes.start(0, verb="train")
    nodes.start(1, verb="train", CHECKPOINT_DIR=str(tmp_path / "elsewhere"))
    ends = nodes.ends()
    assert [code for code, *_ in ends] == [73, 73]
    assert all("is not one folder for all nodes" in error for *_, error in ends)
    assert json.loads((nodes.job.run / "logs" / "outcome.json").read_text())["code"] == 73
    assert not list((nodes.job.run / "checkpoints").glob("global_step_*"))


def test_stopped_while_it_waits_it_leaves_nothing(nodes: Nodes) -> None:
    process = nodes.start(0)
    deadline = time.monotonic() + 60
    while not list(nodes.job.run.glob(".preflight.*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    ((code, table, error),) = nodes.ends()
    assert (code, table, error) == (143, "", "stopped before there was a verdict\n")
    assert list(nodes.job.run.iterdir()) == []
