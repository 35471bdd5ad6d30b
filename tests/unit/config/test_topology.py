from __future__ import annotations

from pathlib import Path

import pytest

from sft_job.config.topology import Topology, count_gpus, read_topology
from sft_job.contract import ExitCode

TWO_NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environ", "gpus", "ranks"),
    [
        ({}, 0, 1),
        ({}, 8, 8),
        ({"NPROC_PER_NODE": "2"}, 8, 2),
        ({"NPROC_PER_NODE": "8"}, 8, 8),
        ({"NPROC_PER_NODE": " 2 "}, 0, 2),
        ({"NPROC_PER_NODE": ""}, 4, 4),
        ({"PET_NPROC_PER_NODE": "4"}, 8, 4),
        ({"PET_NPROC_PER_NODE": "auto"}, 8, 8),
        ({"PET_NPROC_PER_NODE": "auto"}, 0, 1),
        ({"PET_NPROC_PER_NODE": "gpu"}, 8, 8),
        ({"PET_NPROC_PER_NODE": "cpu"}, 8, 1),
        ({"NPROC_PER_NODE": "4", "PET_NPROC_PER_NODE": "4"}, 8, 4),
        ({"NPROC_PER_NODE": "4", "PET_NPROC_PER_NODE": "auto"}, 8, 4),
        ({"NPROC_PER_NODE": "auto", "PET_NPROC_PER_NODE": "4"}, 8, 4),
    ],
)
def test_ranks_on_this_node(environ: dict[str, str], gpus: int, ranks: int):
    topology, problems = read_topology(environ, gpus)
    assert problems == []
    assert topology == Topology(ranks, 1, 0, "127.0.0.1", None)
    assert topology.world == ranks


@pytest.mark.parametrize("prefix", ["", "PET_"])
def test_several_nodes_under_both_names(prefix: str):
    environ = {prefix + name: value for name, value in TWO_NODES.items()} | {"NPROC_PER_NODE": "4"}
    topology, problems = read_topology(environ, 0)
    assert problems == []
    assert topology == Topology(4, 2, 1, "10.0.0.1", 29500)
    assert topology.world == 8


def test_a_fixed_size_may_be_written_as_a_range():
    environ = {f"PET_{name}": value for name, value in TWO_NODES.items()} | {"PET_NNODES": "2:2"}
    topology, problems = read_topology(environ, 0)
    assert (topology.nnodes, problems) == (2, [])


@pytest.mark.parametrize(
    ("environ", "gpus", "message"),
    [
        ({"NPROC_PER_NODE": "four"}, 0, "NPROC_PER_NODE = 'four'\n    must be a whole number from 1, or one of auto"),
        ({"NPROC_PER_NODE": "0"}, 0, "must be a whole number from 1"),
        ({"NPROC_PER_NODE": "1.5"}, 0, "must be a whole number from 1"),
        ({"PET_NPROC_PER_NODE": "gpu"}, 0, "PET_NPROC_PER_NODE = 'gpu'\n    this node shows no GPU"),
        ({"NPROC_PER_NODE": "8"}, 4, "8 ranks, 4 GPUs here"),
        ({"NPROC_PER_NODE": "8", "PET_NPROC_PER_NODE": "4"}, 0, "PET_NPROC_PER_NODE is set too and differs: '4'"),
        ({**TWO_NODES, "PET_NNODES": "3"}, 0, "PET_NNODES is set too and differs: '3'"),
        ({**TWO_NODES, "PET_NODE_RANK": "0"}, 0, "PET_NODE_RANK is set too and differs"),
        ({**TWO_NODES, "PET_MASTER_ADDR": "other"}, 0, "PET_MASTER_ADDR is set too and differs"),
        ({**TWO_NODES, "PET_MASTER_PORT": "1"}, 0, "PET_MASTER_PORT is set too and differs"),
        ({**TWO_NODES, "NNODES": "two"}, 0, "NNODES = 'two'\n    must be a whole number from 1"),
        ({**TWO_NODES, "NNODES": "1:4"}, 0, "a changing number of nodes is not supported"),
        ({**TWO_NODES, "NODE_RANK": "2"}, 0, "with 2 nodes it is at most 1"),
        ({"NODE_RANK": "1"}, 0, "with 1 node it is at most 0"),
        ({**TWO_NODES, "NODE_RANK": "-1"}, 0, "NODE_RANK = '-1'\n    must be a whole number from 0"),
        ({**TWO_NODES, "MASTER_PORT": "70000"}, 0, "must be a whole number from 1 to 65535"),
        ({**TWO_NODES, "MASTER_ADDR": ""}, 0, "MASTER_ADDR\n    must be set for a run on 2 nodes"),
        ({**TWO_NODES, "MASTER_PORT": ""}, 0, "MASTER_PORT\n    must be set"),
        ({**TWO_NODES, "NODE_RANK": ""}, 0, "NODE_RANK\n    must be set"),
    ],
)
def test_wrong_variables_are_named(environ: dict[str, str], gpus: int, message: str):
    _, problems = read_topology(environ, gpus)
    assert len(problems) == 1
    assert message in problems[0].text()
    assert problems[0].code is ExitCode.CONFIG
    assert problems[0].origin == "environment"


def test_all_wrong_variables_at_once():
    _, problems = read_topology({"NPROC_PER_NODE": "x", "NNODES": "2", "MASTER_PORT": "y"}, 0)
    assert {problem.subject for problem in problems} == {"NPROC_PER_NODE", "MASTER_PORT", "NODE_RANK", "MASTER_ADDR"}


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia2x", "null"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 3),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("0,2", 2),
        (" 1 , 0 ", 2),
        ("0,-1,1", 1),
        ("0,7,1", 1),
        ("GPU-3f,MIG-1a", 2),
        ("NoDevFiles", 0),
    ],
)
def test_visible_gpus(dev: Path, visible: str | None, count: int):
    assert count_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, dev) == count


def test_no_devices_no_gpus(tmp_path: Path):
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path) == 0
    assert count_gpus({}, tmp_path / "missing") == 0
