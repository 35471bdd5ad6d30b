"""Ranks that measure their network, and nodes that compare themselves before weights load."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sft_job.errors import ProblemsError
from tests.distributed.runs import join_ranks
from tests.distributed.test_forensics import config_of
from tests.ranks import free_port


def measure_alone(port: int, seconds: float, absent: int) -> Any:
    from sft_job.preflight.network import measure

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timedelta(seconds=30), wait_for_workers=True)
    began = time.monotonic()
    found = None if rank == absent else measure(store, rank, world, 1, seconds)
    store.set(f"end/{rank}", "")
    store.wait([f"end/{each}" for each in range(world)], timedelta(seconds=60))  # rank 0 keeps the store
    return found, time.monotonic() - began


def test_the_network_is_measured(ranks) -> None:
    for found, _ in ranks(2, measure_alone, free_port(), 60.0, -1):
        assert found.faults == {}
        assert [(speed.backend, speed.name) for speed in found.speeds] == [
            ("gloo", "all-reduce"),
            ("gloo", "all-to-all"),
        ]
        assert all(speed.seconds > 0 for speed in found.speeds)
        assert found.clocks.keys() == {0, 1}
        assert abs(found.clocks[0] - found.clocks[1]) < 60


def test_a_rank_that_does_not_join_is_a_fault_in_time(ranks) -> None:
    found, _ = ranks(2, measure_alone, free_port(), 2.0, 1)[0]
    assert found.faults[0].startswith("failed while ")
    assert "\n" not in found.faults[0]


def compare(inputs: Path, folders: list[str], settings: list[list[str]], per_node: int) -> tuple[int, str]:
    from sft_job.preflight import start

    start.unseen = partial(start.unseen, seconds=0.5)
    runtime = join_ranks()
    node = runtime.rank // per_node
    config = config_of(inputs, Path(folders[node]), *settings[node])
    try:
        start.compare_nodes(config, runtime, {"LOCAL_WORLD_SIZE": str(per_node)})
    except ProblemsError as error:
        return int(error.code), str(error)
    return 0, ""


def test_nodes_with_one_folder_and_one_config_may_start(inputs: Path, tmp_path: Path, ranks) -> None:
    one = str(tmp_path / "run")
    assert ranks(4, compare, inputs, [one, one], [[], ["trainer.log_freq=3"]], 2) == [(0, "")] * 4
    assert list((tmp_path / "run").iterdir()) == []


def test_nodes_that_differ_end_alike_on_every_rank(inputs: Path, tmp_path: Path, ranks) -> None:
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    answers = ranks(2, compare, inputs, folders, [[], ["optim.lr=3"]], 1)
    assert answers[0] == answers[1]
    code, text = answers[0]
    assert code == 2
    assert "the run folder\n    is not one folder for all nodes: node 0 " in text
    assert "optim.lr\n    differs between the nodes: 0.01 on node 0" in text
    off = ["trainer.preflight=false"]
    assert ranks(2, compare, inputs, folders, [off, [*off, "optim.lr=3"]], 1) == [(0, "")] * 2
