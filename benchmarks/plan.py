"""The order of runs in a sitting, and what one run is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, Side
from benchmarks.tokens import Tokens

LEARNING_RATE = 1e-4
"""Of both sides, constant. At 1e-5 a step moves one weight in six of a model in bf16, and losses stay where they began:
such losses prove nothing."""


@dataclass(frozen=True)
class Run:
    """One run of a side.

    Attributes:
        row: name of the row that it was first asked for by.
        part: A and A' (the subject before and after), B (a partner), R (the reference).
        side: what runs.
        steps: measured steps.
        warmup: steps before them.
    """

    row: str
    part: str
    side: Side
    steps: int
    warmup: int


@dataclass(frozen=True)
class RunSpec:
    """Everything a run's processes are told, as a JSON file.

    Attributes:
        settings: the side's.
        tokens: the side's.
        token_file: parquet.
        model: folder.
        out: folder for what the run leaves.
        steps: measured steps.
        warmup: steps before them.
        ranks: processes.
        on_gpu: False on a CPU.
    """

    settings: dict[str, Any]
    tokens: Tokens
    token_file: str
    model: str
    out: str
    steps: int
    warmup: int
    ranks: int
    on_gpu: bool

    @property
    def all_steps(self) -> int:
        """Steps of the run."""
        return self.steps + self.warmup

    def write(self, path: Path) -> None:
        """To a JSON file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> RunSpec:
        """From a JSON file."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "tokens": Tokens(**values["tokens"])})


def runs_of(sitting: Sequence[Row], steps: int, warmup: int, *, partners: bool, reference: bool) -> list[Run]:
    """A-B-A: the subjects, the partners, the subjects the other way round, and last the references.

    Args:
        sitting: rows with the same partners.
        steps: measured steps, unless the row takes fewer.
        warmup: steps before them, likewise.
        partners: with the partners; without them the subjects run once.
        reference: with the reference's first steps.
    """
    first = sitting[0]
    steps, warmup = min(steps, first.steps or steps), min(warmup, first.warmup or warmup)
    runs = [Run(row.name, "A", row.subject, steps, warmup) for row in sitting]
    if partners and first.partners:
        runs += [Run(first.name, "B", side, steps, warmup) for side in first.partners]
        runs += [Run(row.name, "A'", row.subject, steps, warmup) for row in reversed(sitting)]
    if reference:
        # Every row's reference is the same path, unless a row is compared with other settings.
        for row in (each for each in sitting if each.reference_steps):
            side = row.reference()
            if all(run.side != side for run in runs):
                runs.append(Run(row.name, "R", side, min(row.reference_steps, steps + warmup), 0))
    return runs


def data_steps(sitting: Sequence[Row], steps: int, warmup: int) -> int:
    """Steps that the token file holds: one more than a run takes, because a loader looks ahead."""
    first = sitting[0]
    return min(steps, first.steps or steps) + min(warmup, first.warmup or warmup) + 1
