"""Graph problems with worked-out answers: the demo's training and held-out rows.

A graph is an undirected edge list over nodes with one-letter names. Each problem asks one question about one
graph; its response works the answer out in the open (which edges touch a node, what a breadth-first search
finds) and ends with ``Answer: ...``, which is what exact match compares.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

NODES = "ABCDEF"
KINDS = ("neighbours", "degree", "edge", "connected", "path")
ANSWER_MARK = "Answer:"

# Every edge that a graph can have, and the fewest and the most of them in one graph.
_PAIRS = tuple(itertools.combinations(NODES, 2))
_EDGES = (4, 8)

Edges = tuple[tuple[str, str], ...]
"""Pairs of nodes, sorted."""
Graph = Mapping[str, tuple[str, ...]]
"""Neighbours of each node, in alphabetical order."""


@dataclass(frozen=True)
class GraphProblem:
    """One question about one graph.

    Attributes:
        kind: one of ``KINDS``.
        prompt: edge list and question.
        response: the worked answer; its last line is ``Answer: ...``.
        answer: the final answer alone.
    """

    kind: str
    prompt: str
    response: str
    answer: str


def final_answer(text: str) -> str | None:
    """What stands after the last ``Answer:`` of a response, without spaces at its ends; None where there is none."""
    _, mark, answer = text.rpartition(ANSWER_MARK)
    return answer.strip() if mark else None


def draw_problems(train_rows: int, held_out_rows: int, seed: int) -> tuple[list[GraphProblem], list[GraphProblem]]:
    """Training and held-out problems, each about a graph of its own, kinds in equal shares.

    Args:
        train_rows: number of training problems.
        held_out_rows: number of held-out problems, drawn first, so that they do not depend on ``train_rows``.
        seed: the same seed gives the same problems.
    """
    rng = random.Random(seed)
    seen: set[Edges] = set()
    problems: list[GraphProblem] = []
    while len(problems) < held_out_rows + train_rows:
        edges = tuple(sorted(rng.sample(_PAIRS, rng.randint(*_EDGES))))
        problem = None if edges in seen else _draw(len(problems), edges, rng)
        if problem is not None:
            seen.add(edges)
            problems.append(problem)
    return problems[held_out_rows:], problems[:held_out_rows]


def write_parquet(problems: list[GraphProblem], path: Path) -> None:
    """Write the problems with columns ``prompt``, ``response``, ``answer`` and ``kind``."""
    columns = ("prompt", "response", "answer", "kind")
    table = pa.table({name: [getattr(problem, name) for problem in problems] for name in columns})
    pq.write_table(table, path)


def _draw(index: int, edges: Edges, rng: random.Random) -> GraphProblem | None:
    """A problem of the kind whose turn it is, or None where this graph does not allow the question."""
    kind = KINDS[index % len(KINDS)]
    graph = _graph(edges)
    start = rng.choice(NODES)
    others = [node for node in NODES if node != start]
    if kind in ("edge", "connected"):
        # By turns with the answers yes and no, so that guessing earns half of them at most.
        yes = index // len(KINDS) % 2 == 0
        near = graph[start] if kind == "edge" else _search(graph, start)
        others = [node for node in others if (node in near) == yes]
    elif kind == "path":
        others = [node for node in others if _shortest_paths(graph, start, node) == 1]
    if not others:
        return None
    goal = rng.choice(others)
    question, work, answer = _ask(kind, graph, start, goal)
    listed = " ".join(a + b for a, b in edges)
    return GraphProblem(kind, f"Edges: {listed}\n{question}", f"{work}\n{ANSWER_MARK} {answer}", answer)


def _graph(edges: Edges) -> Graph:
    found: dict[str, list[str]] = {node: [] for node in NODES}
    for a, b in edges:
        found[a].append(b)
        found[b].append(a)
    return {node: tuple(sorted(others)) for node, others in found.items()}


def _ask(kind: str, graph: Graph, start: str, goal: str) -> tuple[str, str, str]:
    """Question, work and answer."""
    touching = f"{start}: {_listed(graph[start])}"
    if kind == "neighbours":
        return f"Which nodes are neighbours of {start}?", touching, ", ".join(graph[start]) or "none"
    if kind == "degree":
        return f"What is the degree of {start}?", touching, str(len(graph[start]))
    if kind == "edge":
        work, answer = _found(touching, goal, goal in graph[start])
        return f"Is there an edge between {start} and {goal}?", work, answer
    came_from, search = _search(graph, start), _search_text(graph, start, goal)
    if kind == "connected":
        work, answer = _found(search, goal, goal in came_from)
        return f"Is {goal} connected to {start}?", work, answer
    path = [goal]
    while path[-1] != start:
        path.append(came_from[path[-1]])
    work = f"{search}\nBack: {' '.join(path)}"
    return f"What is the shortest path from {start} to {goal}?", work, "-".join(reversed(path))


def _found(work: str, goal: str, there: bool) -> tuple[str, str]:
    """Work with its conclusion, and the answer."""
    return f"{work}\nFound: {goal if there else 'none'}", "yes" if there else "no"


def _listed(nodes: Sequence[str]) -> str:
    return " ".join(nodes) or "none"


def _search(graph: Graph, start: str) -> dict[str, str]:
    """Breadth-first search: the node from which each reached node was found first (the start: itself)."""
    came_from, queue = {start: start}, deque([start])
    while queue:
        node = queue.popleft()
        for other in graph[node]:
            if other not in came_from:
                came_from[other] = node
                queue.append(other)
    return came_from


def _search_text(graph: Graph, start: str, goal: str) -> str:
    """The search as lines ``node: nodes found from it``, until the goal is found or nothing is left."""
    lines, seen, queue = [], {start}, deque([start])
    while queue and goal not in seen:
        node = queue.popleft()
        fresh = [other for other in graph[node] if other not in seen]
        seen.update(fresh)
        queue.extend(fresh)
        lines.append(f"{node}: {_listed(fresh)}")
    return "\n".join(lines)


def _shortest_paths(graph: Graph, start: str, goal: str) -> int:
    """Number of different shortest paths (0 = not connected)."""
    distance, ways, queue = {start: 0}, {start: 1}, deque([start])
    while queue:
        node = queue.popleft()
        for other in graph[node]:
            if other not in distance:
                distance[other], ways[other] = distance[node] + 1, 0
                queue.append(other)
            if distance[other] == distance[node] + 1:
                ways[other] += ways[node]
    return ways.get(goal, 0)
