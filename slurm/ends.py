"""How the nodes of a job learn of each other's ends (an empty file for each, whose name says it), and act on it."""

from __future__ import annotations

import contextlib
import re
import signal
from pathlib import Path

from sft_job.contract import ExitCode

_PEERS_SECONDS = 3.0
"""Between two looks at the other nodes while the job runs."""
_NOTICE_SECONDS = 45.0
"""How long this node's ranks may take to notice by themselves that another node's have failed, or that all is done."""
_LEAVE_SECONDS = 30.0
"""From the signal that ends them to the kill."""
SETTLED = "settled"
"""Beside the ends, for the batch script: node 0's task has judged."""
_NAME = re.compile(r"(\d+)_(\d+)")


class Ends:
    """Ends of the nodes' processes in one start of a job.

    Names alone are read: one look at the folder tells all of them, also on a network file system, which looks at a
    folder anew when it is opened.

    Args:
        folder: of scripts and logs.
        job_id: Slurm's id.
        start: how often the job was queued again before.
    """

    def __init__(self, folder: Path, job_id: str, start: int) -> None:
        self._folder = folder / f"{job_id}_ends" / str(start)

    def put(self, node: int, code: int) -> None:
        """Say how a node's process ended; where that cannot be written the others go without it."""
        self._put(f"{node}_{code}")

    def settle(self, code: int) -> None:
        """Say that it is judged what becomes of the job, and with which exit code the batch script is to end."""
        self._put(SETTLED, f"{code}\n")

    def all(self) -> dict[int, int]:
        """Node -> exit code, of those that have ended."""
        try:
            names = [path.name for path in self._folder.iterdir()]
        except OSError:
            return {}
        found = (match for name in names if (match := _NAME.fullmatch(name)))
        return {int(match[1]): int(match[2]) for match in found}

    def _put(self, name: str, text: str = "") -> None:
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / name).write_text(text, encoding="utf-8")


class Peers:
    """Watches the other nodes while this one's job runs.

    Args:
        ends: of this start.
        node: this node.
    """

    def __init__(self, ends: Ends, node: int) -> None:
        self._ends = ends
        self._node = node
        self._next = 0.0
        self._since: float | None = None
        self._sent: set[signal.Signals] = set()
        self.code = 0
        """The exit code of the node whose end this one acts on."""

    def wish(self, now: float, grace_seconds: float) -> signal.Signals | None:
        """What to send to this node's job, because another node has ended; None = nothing.

        A node that was stopped stops the others at once. One that failed is noticed by its peers' ranks, which then say
        more than a signal could; they are ended where they do not. So are those that still run after node 0's, which
        says when the run is done; any other node may be done before.
        """
        if now >= self._next and self._since is None:
            self._next = now + _PEERS_SECONDS
            ends = {node: code for node, code in self._ends.all().items() if node != self._node}
            others = [code for node, code in sorted(ends.items()) if code != ExitCode.DONE or node == 0]
            if others:
                self._since, self.code = now, next((each for each in others if each != ExitCode.STOPPED), others[0])
        if self._since is None:
            return None
        stopped = self.code == ExitCode.STOPPED
        first = self._since + (0 if stopped else _NOTICE_SECONDS)
        last = first + (grace_seconds if stopped else 0) + _LEAVE_SECONDS
        due = [number for at, number in ((first, signal.SIGUSR2), (last, signal.SIGKILL)) if now >= at]
        for number in due:
            if number not in self._sent:
                self._sent.add(number)
                return number
        return None
