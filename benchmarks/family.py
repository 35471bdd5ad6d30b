"""CPU time and memory of a process with all its descendants, from /proc."""

from __future__ import annotations

import os
import threading
from pathlib import Path

_SECONDS_BETWEEN_LOOKS = 0.2


class Family:
    """Watches this process and its descendants while it is entered.

    What a process used in the last moments before it ended is missed: 0.2 s at most.

    Attributes:
        cpu_seconds: user and system time of all of them since the entry.
        peak_own_bytes: most ``RssAnon`` that they held together.
    """

    def __init__(self) -> None:
        self.cpu_seconds = 0.0
        self.peak_own_bytes = 0
        self._used: dict[int, float] = {}
        self._begin = 0.0
        self._left = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="family", daemon=True)

    def __enter__(self) -> Family:
        self._look()
        self._begin = sum(self._used.values())
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._watcher.join()
        self._look()
        self.cpu_seconds = sum(self._used.values()) - self._begin

    def _watch(self) -> None:
        while not self._left.wait(_SECONDS_BETWEEN_LOOKS):
            self._look()

    def _look(self) -> None:
        parents: dict[int, int] = {}
        used: dict[int, float] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                # Behind the name, which may hold anything: state, parent, ..., user and system time.
                values = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            parents[int(folder.name)] = int(values[1])
            used[int(folder.name)] = (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")
        own = 0
        for process in _descendants(os.getpid(), parents):
            self._used[process] = used[process]
            own += _own_bytes(process)
        self.peak_own_bytes = max(self.peak_own_bytes, own)


def _descendants(root: int, parents: dict[int, int]) -> list[int]:
    found = [root]
    for process in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == process]
    return found


def _own_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)
