"""The ranks of one node as child processes: started together, told to stop together, ended together. Torch-free."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_job.config.topology import Topology
from sft_job.contract import STOP_SIGNALS, Env, ExitCode, RunFolder

LOST_GRACE_SECONDS = 20.0
"""How long the other ranks may take to notice that one is gone before they are killed."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended.

    Attributes:
        rank: global rank.
        code: exit code by section of the contract; LOST where a signal killed it.
        message: what it said, or which signal it was.
        report: what it left for the outcome (step, loss, weights).
    """

    rank: int
    code: ExitCode
    message: str
    report: Mapping[str, Any]


def free_port() -> int:
    """A TCP port on this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Start children with the stop signals blocked: one that comes early waits until the child listens."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RankGroup:
    """The ranks of this node.

    Args:
        command: what each rank runs.
        topology: how many there are, here and elsewhere.
        run: their logs go to its folder.
        reports: folder in which each leaves its end.
        environ: environment they start from.
    """

    def __init__(
        self, command: Sequence[str], topology: Topology, run: RunFolder, reports: Path, environ: Mapping[str, str]
    ) -> None:
        self._reports = reports
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._asked_to_stop = False
        address = topology.master_addr or "127.0.0.1"
        port = topology.master_port or free_port()
        first = topology.node_rank * topology.nproc_per_node
        threads = max(1, len(os.sched_getaffinity(0)) // topology.nproc_per_node)
        for local in range(topology.nproc_per_node):
            rank = first + local
            variables = {
                **environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(topology.world),
                "LOCAL_WORLD_SIZE": str(topology.nproc_per_node),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
                Env.REPORT_DIR: str(reports),
                "PYTHONUNBUFFERED": "1",
            }
            variables.setdefault("OMP_NUM_THREADS", str(threads))
            with run.rank_log(rank).open("ab") as log, signals_blocked():
                self._processes[rank] = subprocess.Popen(
                    command,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    # Rank 0's standard output is the user's progress line; everything else is the rank's log.
                    stdout=None if rank == 0 else log,
                    stderr=log,
                    # A session of its own: a Ctrl-C reaches the supervisor alone, which passes on one wish to stop.
                    start_new_session=True,
                )

    def ask_to_stop(self) -> bool:
        """Pass the wish to stop on: the ranks agree on a step, save and leave. True the first time."""
        if self._asked_to_stop:
            return False
        self._asked_to_stop = True
        self._signal(signal.SIGTERM)
        return True

    def kill(self) -> None:
        """End what is still there."""
        self._signal(signal.SIGKILL)
        for process in self._processes.values():
            process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    def step(self) -> bool:
        """Wait a moment; True when all ranks have ended."""
        time.sleep(POLL_SECONDS)
        return all(process.poll() is not None for process in self._processes.values())

    def one_failed(self) -> bool:
        """Some rank ended in a way that the others cannot go on without."""
        codes = [process.poll() for process in self._processes.values()]
        return any(code not in (None, ExitCode.DONE, ExitCode.STOPPED) for code in codes)

    def ends(self) -> list[RankEnd]:
        """How each rank ended; all of them have."""
        return [self._end(rank, process.wait()) for rank, process in sorted(self._processes.items())]

    def _end(self, rank: int, returned: int) -> RankEnd:
        report: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            report = json.loads((self._reports / f"rank_{rank}.json").read_text(encoding="utf-8"))
        if returned < 0:
            name = signal.Signals(-returned).name
            return RankEnd(rank, ExitCode.LOST, f"rank {rank} was killed by {name}", report)
        try:
            code = ExitCode(returned)
        except ValueError:
            return RankEnd(rank, ExitCode.BUG, f"rank {rank} ended with exit code {returned}", report)
        return RankEnd(rank, code, str(report.get("message", "")), report)


def verdict(ends: Sequence[RankEnd]) -> RankEnd:
    """The one end that explains the others: a stated cause, else a killed rank, else a bug, a loss, a stop, done."""

    def weight(end: RankEnd) -> int:
        if end.code in (ExitCode.DONE, ExitCode.STOPPED):
            return 1 if end.code == ExitCode.STOPPED else 0
        if end.code == ExitCode.LOST:
            return 2 if end.report else 4  # without a report it was killed: the others only noticed
        return 3 if end.code == ExitCode.BUG else 5

    return max(ends, key=weight)


def rank_command(resolved: Path) -> list[str]:
    """What a rank runs: the settings are final, the environment is not looked at again."""
    return [sys.executable, "-m", "sft_job.train", "--resolved", str(resolved)]
