"""How the nodes of a job learn of each other's ends: an empty file for each, whose name says it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

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
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{node}_{code}").touch()

    def all(self) -> dict[int, int]:
        """Node -> exit code, of those that have ended."""
        try:
            names = [path.name for path in self._folder.iterdir()]
        except OSError:
            return {}
        found = (match for name in names if (match := _NAME.fullmatch(name)))
        return {int(match[1]): int(match[2]) for match in found}
