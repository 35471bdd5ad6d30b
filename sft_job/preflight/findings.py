"""What a preflight finds: the checks of the table, and what the ranks measured together. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_job.errors import Problem
from sft_job.preflight.facts import problem_from_wire, problem_to_wire


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: what was looked at.
        text: what was found.
        notes: what is allowed, but perhaps not meant.
        problems: why the allocation is not fit.
        tried: False where something before it failed.
    """

    name: str
    text: str = ""
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    tried: bool = True

    @property
    def verdict(self) -> str:
        """One word."""
        if self.problems:
            return "FAIL"
        if not self.tried:
            return "-"
        return "note" if self.notes else "ok"

    def to_wire(self) -> dict[str, Any]:
        """In values that JSON keeps."""
        problems = [problem_to_wire(problem) for problem in self.problems]
        return {"name": self.name, "text": self.text, "notes": self.notes, "problems": problems, "tried": self.tried}

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> Check:
        """What ``to_wire`` wrote."""
        problems = tuple(map(problem_from_wire, fields["problems"]))
        return cls(fields["name"], fields["text"], tuple(fields["notes"]), problems, fields["tried"])


@dataclass(frozen=True)
class Speed:
    """One collective over all ranks.

    Attributes:
        backend: gloo or nccl.
        name: all-reduce or all-to-all.
        bytes: of each rank's buffer.
        seconds: of one of them.
        world: ranks.
    """

    backend: str
    name: str
    bytes: int
    seconds: float
    world: int

    def text(self) -> str:
        """Bandwidth of a rank's links, as NCCL's own tests count it (bus bandwidth)."""
        share = (self.world - 1) / self.world * (2 if self.name == "all-reduce" else 1)
        return f"{self.name} {share * self.bytes / max(self.seconds, 1e-9) / 1e9:,.2f} GB/s ({self.backend})"


@dataclass(frozen=True)
class Network:
    """What the ranks found out together.

    Attributes:
        speeds: of the collectives that worked.
        clocks: Unix time of each node at one moment.
        faults: rank -> what failed there.
        uncertain: seconds by which ``clocks`` may be apart by the measurement alone.
    """

    speeds: tuple[Speed, ...] = ()
    clocks: Mapping[int, float] = field(default_factory=dict[int, float])
    faults: Mapping[int, str] = field(default_factory=dict[int, str])
    uncertain: float = 0.0
