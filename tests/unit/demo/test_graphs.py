from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sft_job.demo.graphs import KINDS, NODES, GraphProblem, draw_problems, final_answer, write_parquet


@pytest.fixture(scope="module")
def problems() -> list[GraphProblem]:
    train, held_out = draw_problems(1500, 100, seed=3)
    return [*train, *held_out]


def edges_of(problem: GraphProblem) -> set[frozenset[str]]:
    listed = problem.prompt.splitlines()[0].removeprefix("Edges: ").split()
    assert all(len(edge) == 2 for edge in listed)
    return {frozenset(edge) for edge in listed}


def asked_nodes(problem: GraphProblem) -> list[str]:
    return re.findall(r"\b[A-F]\b", problem.prompt.splitlines()[1])


def simple_paths(edges: set[frozenset[str]], start: str, goal: str) -> list[str]:
    """Every path without a repeated node, shortest first, found by trying every order of every set of nodes."""
    others = [node for node in NODES if node not in (start, goal)]
    found = []
    for size in range(len(others) + 1):
        for middle in itertools.permutations(others, size):
            path = (start, *middle, goal)
            if all(frozenset(pair) in edges for pair in itertools.pairwise(path)):
                found.append("-".join(path))
    return found


def expected(problem: GraphProblem) -> str:
    """The answer by brute force over the prompt's text alone."""
    edges, nodes = edges_of(problem), asked_nodes(problem)
    around = sorted(other for other in NODES if frozenset((nodes[0], other)) in edges)
    if problem.kind == "neighbours":
        return ", ".join(around) or "none"
    if problem.kind == "degree":
        return str(len(around))
    if problem.kind == "edge":
        return "yes" if frozenset(nodes) in edges else "no"
    paths = simple_paths(edges, *nodes)
    if problem.kind == "connected":
        return "yes" if paths else "no"
    shortest = [path for path in paths if len(path) == len(paths[0])]
    assert len(shortest) == 1, "the question has one answer"
    return shortest[0]


def test_answers_are_right(problems: list[GraphProblem]) -> None:
    for problem in problems:
        assert problem.answer == expected(problem), problem


def test_worked_steps_are_right(problems: list[GraphProblem]) -> None:
    for problem in problems:
        edges, found = edges_of(problem), set(asked_nodes(problem)[-1:] if problem.kind == "connected" else [])
        for line in problem.response.splitlines():
            name, _, rest = line.partition(": ")
            if name not in NODES:
                continue
            around = {node for node in NODES if frozenset((name, node)) in edges}
            listed = set(rest.split()) - {"none"}
            found.add(name)
            # A search names what is new; the other kinds name every neighbour.
            assert listed == (around - found if problem.kind in ("connected", "path") else around), problem
            found |= listed


def test_conclusions_are_right(problems: list[GraphProblem]) -> None:
    concluded = [problem for problem in problems if "\nFound: " in problem.response]
    assert {problem.kind for problem in concluded} == {"edge", "connected"}
    for problem in concluded:
        goal = asked_nodes(problem)[0 if problem.kind == "connected" else 1]
        found = problem.response.splitlines()[-2].removeprefix("Found: ")
        assert found == (goal if problem.answer == "yes" else "none")


def test_response_ends_with_the_answer(problems: list[GraphProblem]) -> None:
    for problem in problems:
        assert problem.response.endswith(f"\nAnswer: {problem.answer}")
        assert final_answer(problem.response) == problem.answer


def test_final_answer() -> None:
    assert final_answer("work\nAnswer: A-B \n") == "A-B"
    assert final_answer("Answer: 1\nAnswer: 2") == "2"
    assert final_answer("no such thing") is None


def test_kinds_are_equal_and_answers_varied(problems: list[GraphProblem]) -> None:
    assert set(Counter(problem.kind for problem in problems).values()) == {len(problems) // len(KINDS)}
    for kind in ("edge", "connected"):
        answers = Counter(problem.answer for problem in problems if problem.kind == kind)
        assert 0.4 < answers["yes"] / answers.total() < 0.6
    for kind in ("neighbours", "path"):
        answers = Counter(problem.answer for problem in problems if problem.kind == kind)
        assert answers.most_common(1)[0][1] / answers.total() < 0.15


def test_no_graph_is_asked_about_twice() -> None:
    train, held_out = draw_problems(2000, 200, seed=1)
    assert (len(train), len(held_out)) == (2000, 200)
    graphs = [problem.prompt.splitlines()[0] for problem in (*train, *held_out)]
    assert len(set(graphs)) == 2200


def test_seeded() -> None:
    assert draw_problems(50, 10, seed=1) == draw_problems(50, 10, seed=1)
    assert draw_problems(50, 10, seed=1) != draw_problems(50, 10, seed=2)
    assert draw_problems(50, 10, seed=1)[1] == draw_problems(500, 10, seed=1)[1]


def test_parquet(tmp_path: Path) -> None:
    train, _ = draw_problems(10, 0, seed=1)
    write_parquet(train, tmp_path / "train.parquet")
    table = pq.read_table(tmp_path / "train.parquet")
    assert table.column_names == ["prompt", "response", "answer", "kind"]
    assert table.column("response").to_pylist() == [problem.response for problem in train]
