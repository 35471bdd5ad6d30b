"""How many ranks run where: read from the launcher's environment variables, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sft_job.contract import Env, ExitCode
from sft_job.errors import Problem

_KUBEFLOW_PREFIX = "PET_"
_COUNT_WORDS = ("auto", "gpu", "cpu")


@dataclass(frozen=True)
class Topology:
    """Where this node stands in the run.

    Attributes:
        nproc_per_node: ranks on this node.
        nnodes: nodes of the run.
        node_rank: number of this node, from 0.
        master_addr: host on which rank 0 runs.
        master_port: its port; None = the supervisor picks a free one (one node only).
    """

    nproc_per_node: int
    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int | None

    @property
    def world(self) -> int:
        """Ranks of the whole run."""
        return self.nproc_per_node * self.nnodes


def count_gpus(environ: Mapping[str, str], dev: Path = Path("/dev")) -> int:
    """Count the NVIDIA devices that this process may use.

    Device nodes are counted; ``CUDA_VISIBLE_DEVICES`` narrows them as CUDA reads it: the list ends at the first
    entry that names no device, and an empty list or -1 hides all.
    """
    devices = sum(bool(re.fullmatch(r"nvidia[0-9]+", each.name)) for each in dev.glob("nvidia[0-9]*"))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or devices == 0:
        return devices
    count = 0
    for entry in (part.strip() for part in visible.split(",")):
        by_name = entry.startswith(("GPU-", "MIG-"))
        if not by_name and not (entry.isascii() and entry.isdecimal() and int(entry) < devices):
            break
        count += 1
    return count


def asked_gpus(environ: Mapping[str, str]) -> int:
    """GPUs on each node that the launcher asked for; 0 where it says nothing."""
    return _whole(environ.get(Env.GPUS_PER_NODE, "").strip()) or 0


def read_topology(environ: Mapping[str, str], gpu_count: int) -> tuple[Topology, list[Problem]]:
    """Read ranks and nodes from ``NPROC_PER_NODE``, ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``.

    Kubeflow's ``PET_*`` names are read where the plain ones are absent; where both are set they must agree. For the
    ranks on a node only two numbers can disagree: the words auto, gpu and cpu are a default that a number beats.
    auto = all GPUs, or 1 rank without any; gpu = all GPUs; cpu = 1 rank, which uses all cores through threads.
    Without either variable: as auto.

    Returns:
        The topology (single values fall back to those of a run on one node where they are wrong) and the problems.
    """
    reader = _Reader(environ)
    nproc = reader.ranks_on_node(gpu_count)
    before = len(reader.problems)
    nnodes = reader.number(Env.NNODES, default=1, lowest=1)
    nnodes_known = len(reader.problems) == before
    node_rank = reader.number(Env.NODE_RANK, default=0, lowest=0)
    address, _ = reader.text(Env.MASTER_ADDR)
    port = reader.number(Env.MASTER_PORT, default=0, lowest=1, highest=65535)
    if nnodes > 1:
        reader.require((Env.NODE_RANK, Env.MASTER_ADDR, Env.MASTER_PORT), nnodes)
    if node_rank >= nnodes and nnodes_known:
        reader.problem(
            Env.NODE_RANK,
            node_rank,
            f"nodes are counted from 0, so with {nnodes} node{'s' if nnodes > 1 else ''} it is at most {nnodes - 1}",
            f"set {Env.NNODES} to the number of nodes",
        )
    return Topology(nproc, nnodes, min(node_rank, nnodes - 1), address or "127.0.0.1", port or None), reader.problems


class _Reader:
    """Reads variables under both names and collects problems."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.problems: list[Problem] = []

    def problem(self, subject: str, value: object, rule: str, fix: str) -> None:
        self.problems.append(Problem(ExitCode.CONFIG, subject, rule, fix, value, origin="environment"))

    def both(self, name: str) -> list[tuple[str, str]]:
        """(variable, value) for the plain and the Kubeflow name, those that are set and not empty."""
        names = (name, _KUBEFLOW_PREFIX + name)
        return [(each, self.environ[each].strip()) for each in names if self.environ.get(each, "").strip()]

    def text(self, name: str) -> tuple[str | None, str]:
        """The value and the variable it came from."""
        found = self.both(name)
        if len(found) == 2 and found[0][1] != found[1][1]:
            self._differ(found)
        return (found[0][1], found[0][0]) if found else (None, name)

    def number(self, name: str, default: int, lowest: int, highest: int | None = None) -> int:
        value, variable = self.text(name)
        if value is None:
            return default
        # Kubeflow writes PET_NNODES of an elastic job as "least:most"; both equal means a fixed size.
        least, _, most = value.partition(":")
        if name == Env.NNODES and most and least != most:
            self.problem(variable, value, "a changing number of nodes is not supported", "set one fixed number")
            return default
        number = _whole(least) if name == Env.NNODES else _whole(value)
        if number is None or number < lowest or (highest is not None and number > highest):
            limits = f"from {lowest}" if highest is None else f"from {lowest} to {highest}"
            self.problem(variable, value, f"must be a whole number {limits}", f"correct {variable} or unset it")
            return default
        return number

    def ranks_on_node(self, gpu_count: int) -> int:
        found = self.both(Env.NPROC_PER_NODE)
        numbers = [(variable, value) for variable, value in found if value not in _COUNT_WORDS]
        if len(numbers) == 2 and numbers[0][1] != numbers[1][1]:
            self._differ(numbers)
        variable, value = (numbers or found or [(Env.NPROC_PER_NODE, "auto")])[0]
        if value == "cpu":
            return 1
        if value == "gpu" and gpu_count == 0:
            self.problem(variable, value, "this node shows no GPU", "set a number, or auto to run on CPUs without GPUs")
        if value in ("auto", "gpu"):
            return gpu_count or 1
        number = _whole(value)
        if number is None or number < 1:
            words = ", ".join(_COUNT_WORDS)
            self.problem(variable, value, f"must be a whole number from 1, or one of {words}", f"correct {variable}")
            return gpu_count or 1
        if 0 < gpu_count < number:
            self.problem(
                variable,
                number,
                f"each rank needs a GPU of its own: {number} ranks, {gpu_count} GPU{'s' if gpu_count > 1 else ''} here",
                f"set {variable} to {gpu_count} or less (CUDA_VISIBLE_DEVICES= runs the ranks on CPUs)",
            )
        return number

    def require(self, names: tuple[str, ...], nnodes: int) -> None:
        for name in names:
            if not self.both(name):
                rule = f"must be set for a run on {nnodes} nodes"
                self.problems.append(
                    Problem(ExitCode.CONFIG, name, rule, f"set {name} on every node", origin="environment")
                )

    def _differ(self, found: list[tuple[str, str]]) -> None:
        (first, one), (second, other) = found
        self.problem(first, one, f"{second} is set too and differs: {other!r}", "unset one of the two")


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None
