from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_job.contract import ExitCode
from sft_job.errors import Problem
from sft_job.preflight import judge as room
from sft_job.preflight.facts import NodeFacts, from_wire, to_wire
from sft_job.preflight.findings import Check, Network, Speed
from sft_job.preflight.gpus import Gpu
from sft_job.preflight.shared import Token
from sft_job.preflight.space import Space

GIB = 2**30
H100 = Gpu(0, "H100", "550.54", 80 * GIB, 0, 0)
NODE = NodeFacts(
    node=0,
    host="a",
    ranks=2,
    nodes=2,
    versions={"sft_job": "0.1", "torch": "2.13", "python": "3.11.7"},
    settings={"optim.lr": 1e-5, "trainer.log_freq": 1},
    data={"data.train_files file 0": "10 bytes, abc"},
    model={"config.json": "5 bytes, def"},
    token=Token(".preflight.a", "x"),
    folder="/ckpt/sft",
    free=100 * GIB,
    devices=2,
    gpus=(H100, replace(H100, index=1)),
    memory=64 * GIB,
    memory_free=60 * GIB,
    shm=8 * GIB,
    shm_free=8 * GIB,
)
NEEDED = Space(GIB, GIB, 0)
OTHER = replace(NODE, node=1, host="b")
NETWORK = Network((Speed("nccl", "all-reduce", 10**9, 0.1, 4),), {0: 1000.0, 1: 1000.5})


def judged(
    *nodes: NodeFacts, faults=None, unseen=None, network: Network | None = NETWORK, needed: Space = NEEDED
) -> dict[str, Check]:
    checks = room.judge(nodes, faults or {}, unseen or {}, network, needed, all_read=True)
    assert [Check.from_wire(json.loads(json.dumps(check.to_wire()))) for check in checks] == checks
    return {check.name: check for check in checks}


def failed(checks: dict[str, Check]) -> dict[str, list[Problem]]:
    return {name: list(check.problems) for name, check in checks.items() if check.problems}


def test_two_equal_nodes_are_fit() -> None:
    checks = judged(NODE, OTHER)
    assert {check.verdict for check in checks.values()} == {"ok"}
    names = ["gpus", "software", "settings", "network", "run folder", "space", "data", "model", "clocks", "memory"]
    assert list(checks) == names
    assert checks["gpus"].text == "2 x H100, 80.0 GiB, driver 550.54 on each node"
    assert checks["network"].text == "all-reduce 15.00 GB/s (nccl)"
    assert checks["clocks"].text == "at most 0.50 s apart"
    assert checks["run folder"].text == "/ckpt/sft: written, read by all nodes"


@pytest.mark.parametrize(
    ("change", "name", "code", "text"),
    [
        ({"versions": {**NODE.versions, "torch": "2.11"}}, "software", 2, "2.13 on node 0 (a), 2.11 on node 1 (b)"),
        ({"versions": {**NODE.versions, "flash-attn": "2"}}, "software", 2, "nothing on node 0 (a), 2 on node 1 (b)"),
        ({"settings": {**NODE.settings, "optim.lr": 1}}, "settings", 2, "1e-05 on node 0 (a), 1 on node 1 (b)"),
        ({"data": {"data.train_files file 0": "9 bytes, abc"}}, "data", 65, "differs between the nodes"),
        ({"data": {}}, "data", 65, "nothing on node 1"),
        ({"model": {"config.json": "5 bytes, dee"}}, "model", 66, "differs between the nodes"),
        ({"free": 1}, "space", 73, "has 0.0 GiB free, the run needs about 3.0 GiB"),
        ({"token": Token("", fault="Read-only file system")}, "run folder", 73, "cannot be written: Read-only file"),
        ({"cuda_fault": "driver too old"}, "gpus", 2, "torch cannot use its GPUs: driver too old"),
        ({"gpus": (), "devices": 0}, "gpus", 137, "shows no GPU; others show 2"),
        ({"problems": (Problem(ExitCode.DATA, "x.parquet", "r"),)}, "data", 65, "node 1 (b): x.parquet"),
        ({"problems": (Problem(ExitCode.MODEL, "m", "r"),)}, "model", 66, "node 1 (b): m"),
        ({"problems": (Problem(ExitCode.CONFIG, "url", "r"),)}, "settings", 2, "node 1 (b): url"),
    ],
)
def test_what_makes_an_allocation_unfit(change: dict, name: str, code: int, text: str) -> None:
    problems = failed(judged(NODE, replace(OTHER, **change)))
    assert list(problems) == [name]
    assert {problem.code for problem in problems[name]} == {code}
    assert text in "\n".join(problem.text() for problem in problems[name])


@pytest.mark.parametrize(
    ("shown", "code", "text"),
    [
        ((0, 0), 2, "node 0 (a), node 1 (b)\n    shows no GPU; 8 were asked for"),
        ((8, 7), 137, "node 1 (b)\n    shows 7 GPUs; 8 were asked for"),
        ((8, 0), 137, "node 1 (b)\n    shows no GPUs; 8 were asked for"),
        ((8, 8), None, ""),
        ((9, 8), None, ""),
    ],
)
def test_fewer_gpus_than_were_asked_for(shown: tuple[int, int], code: int | None, text: str) -> None:
    """Without any the ranks would run on the CPU; at the start of a run as in the preflight."""
    nodes = [replace(each, devices=count, devices_asked=8) for each, count in zip((NODE, OTHER), shown, strict=True)]
    for checks in (room.judge_start(nodes, {}, NETWORK), list(judged(*nodes).values())):
        problems = [problem for check in checks for problem in check.problems]
        assert [problem.code for problem in problems] == ([code] if code else [])
        assert text in "\n".join(problem.text() for problem in problems)


@pytest.mark.parametrize(
    ("change", "name", "text"),
    [
        ({"settings": {**NODE.settings, "trainer.log_freq": 2}}, "settings", "trainer.log_freq"),
        ({"gpus": (H100,), "devices": 1}, "gpus", "not the same on all nodes"),
        ({"gpus": ()}, "gpus", "node 1 (b): 2, of which nvidia-smi tells nothing"),
        ({"gpus": (H100, replace(H100, index=1, driver="535"))}, "gpus", "several drivers: 535, 550.54"),
        ({"gpus": (H100, replace(H100, index=1, ecc_errors=3))}, "gpus", "node 1 (b) GPU 1: 3 uncorrected memory"),
        ({"gpus": (H100, replace(H100, index=1, slowed="thermal slowdown"))}, "gpus", "thermal slowdown"),
        ({"gpus": (replace(H100, used=5 * GIB), H100)}, "gpus", "5.0 GiB in use by another process"),
        ({"shm": 64 * 2**20}, "memory", "/dev/shm has 0.1 GiB"),
        ({"memory_free": GIB}, "memory", "1.0 GiB of host memory free for 2 ranks"),
    ],
)
def test_what_is_only_noted(change: dict, name: str, text: str) -> None:
    checks = judged(NODE, replace(OTHER, **change))
    assert failed(checks) == {}
    assert [each for each, check in checks.items() if check.verdict == "note"] == [name]
    assert text in "\n".join(checks[name].notes)


def test_a_problem_of_all_nodes_is_told_once() -> None:
    problem = Problem(ExitCode.DATA, "x.parquet", "cannot be read")
    (found,) = judged(*(replace(node, problems=(problem,)) for node in (NODE, OTHER)))["data"].problems
    assert found == problem


def test_a_file_that_a_node_cannot_read_is_not_told_of_twice() -> None:
    blind = replace(OTHER, data={}, problems=(Problem(ExitCode.DATA, "x.parquet", "r"),))
    assert [problem.subject for problem in judged(NODE, blind)["data"].problems] == ["node 1 (b): x.parquet"]


def test_many_differences_are_counted() -> None:
    many = {f"optim.k{number}": number for number in range(9)}
    problems = judged(replace(NODE, settings={}), replace(OTHER, settings=many))["settings"].problems
    assert len(problems) == 5
    assert problems[-1].subject == "and 5 more"


def test_a_folder_that_is_not_shared_is_one_problem() -> None:
    nodes = [replace(NODE, node=number, host=f"h{number}") for number in range(6)]
    unseen = {number: {other: "is not there" for other in range(6) if other != number} for number in range(6)}
    network = Network(clocks=dict.fromkeys(range(6), 0.0))
    problems = failed(judged(*nodes, unseen=unseen, network=network))
    assert list(problems) == ["run folder"]
    (problem,) = problems["run folder"]
    assert problem.code == 73
    assert "node 0 (h0) does not see what node 1 (h1) wrote (it is not there)" in problem.rule
    assert problem.rule.endswith("and 26 more such pairs")


def test_the_network() -> None:
    broken = Network((), {}, {0: "timed out", 1: "timed out", 3: "reset"})
    checks = judged(NODE, OTHER, network=broken)
    assert [(p.code, p.subject) for p in checks["network"].problems] == [(137, "ranks 0, 1"), (137, "rank 3")]
    assert checks["clocks"].verdict == "-"
    assert judged(NODE, OTHER, network=None)["network"].verdict == "-"
    (fault,) = judged(NODE, OTHER, faults={3: "CUDA error"})["gpus"].problems
    assert (fault.code, fault.subject) == (137, "rank 3")


@given(st.floats(-1e9, 1e9), st.floats(0, 5))
def test_clocks_are_noted_where_they_differ_by_more_than_can_be_measured(skew: float, uncertain: float) -> None:
    check = room.check_clocks([NODE, OTHER], Network(clocks={0: 1e9, 1: 1e9 + skew}, uncertain=uncertain))
    real = (1e9 + skew) - 1e9
    assert bool(check.notes) == (abs(real) > room.SKEW_SECONDS + uncertain)
    assert not check.problems
    if check.notes:
        assert ("ahead of" if skew > 0 else "behind") in check.notes[0]


def presence(*nodes: NodeFacts, missing=None, doubles=None) -> Check:
    return room.check_presence(nodes, 2, missing or {}, doubles or {}, 35.2)


def test_who_is_missing() -> None:
    assert presence(NODE, OTHER).verdict == "ok"
    (gone,) = presence(NODE, missing={1: [2, 3]}).problems
    assert (gone.code, gone.subject) == (137, "node 1 (ranks 2, 3)")
    assert gone.rule == "did not come within 35 s; here: node 0 (a)"
    (half,) = presence(NODE, OTHER, missing={1: [3]}).problems
    assert half.subject == "rank 3 of node 1 (b)"
    (double,) = presence(NODE, missing={1: [2, 3]}, doubles={0: "c"}).problems
    assert (double.code, double.subject) == (2, "node 0")
    (uneven,) = presence(NODE, replace(OTHER, ranks=1), missing={1: [3]}).problems
    assert uneven.code == 2
    assert "was told of 2 nodes with 1 ranks each, node 0 (a) of 2 with 2" in uneven.rule


def test_facts_travel_as_json_and_of_other_versions_too() -> None:
    found = replace(NODE, problems=(Problem(ExitCode.DATA, "f", "r", "x", value={"a": [1]}, origin="cfg:3"),))
    wire = json.loads(json.dumps(to_wire(found)))
    there = from_wire({**wire, "of_tomorrow": 1})
    assert replace(there, problems=()) == replace(found, problems=())
    assert there.problems[0].text() == found.problems[0].text()
    del wire["shm"]
    assert from_wire(wire).shm == 0
