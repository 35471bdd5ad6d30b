"""Signs of life of a rank, written by it and read by its supervisor: which phase, which step, still moving? Torch-free.

One record of fixed length in a file of the report folder, which lies on this node: a beat costs microseconds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STARTING = "starting"
LOADING = "loading"
TRAINING = "training"
SAVING = "saving"
VALIDATING = "validating"
FINISHING = "finishing"
_SIZE = 64


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life.

    Attributes:
        count: grows with every sign.
        step: optimizer steps done.
        phase: what the rank is doing.
    """

    count: int = 0
    step: int = 0
    phase: str = STARTING


class Pulse:
    """This rank's signs of life.

    Args:
        path: where the supervisor looks; None = there is no supervisor.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._file = -1 if path is None else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._count = 0
        self._step = 0
        self._phase = STARTING

    def beat(self, *, step: int | None = None) -> None:
        """Something was done; ``step`` where it is a whole step."""
        self._count += 1
        self._step = self._step if step is None else step
        if self._file >= 0:
            # A sign of life that cannot be written is no reason to end what is alive.
            with contextlib.suppress(OSError):
                os.pwrite(self._file, f"{self._count} {self._step} {self._phase}".ljust(_SIZE).encode(), 0)

    def enter(self, phase: str) -> None:
        """From here on the rank does something else."""
        self._phase = phase
        self.beat()

    @contextlib.contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """The rank does something else inside."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)


def pulse_file(reports: Path, rank: int) -> Path:
    """Where a rank's signs of life are."""
    return reports / f"pulse_{rank}"


def read_beat(path: Path) -> Beat:
    """A rank's last sign of life; that of a rank that gave none yet where there is none."""
    try:
        count, step, phase = path.read_text(encoding="ascii").split()
        return Beat(int(count), int(step), phase)
    except (OSError, ValueError):
        return Beat()
