"""Why rows are not trained on: rejected, without a target, or left out on request. Counted by kind and file."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 10


class Fault(enum.Enum):
    """Why a row is not trained on. The values are the kinds in ``logs/rejected_rows.parquet``."""

    DAMAGED = "damaged"
    NO_TEXT = "no_text"
    UNDECODABLE = "undecodable"
    EMPTY = "empty"
    NOT_RENDERED = "not_rendered"
    NOT_PROVED = "not_proved"
    OVERLONG = "overlong"
    MALFORMED = "malformed"
    WITHOUT_TARGET = "without_target"
    DROPPED = "dropped"

    @property
    def rejected(self) -> bool:
        """Whether the row cannot be used; the other kinds follow from settings and do not speak against the data."""
        return self not in (Fault.WITHOUT_TARGET, Fault.DROPPED)


class RowFault(Exception):
    """A row that cannot be used.

    Attributes:
        fault: the kind.
    """

    def __init__(self, fault: Fault, reason: str) -> None:
        super().__init__(reason)
        self.fault = fault


@dataclass
class FaultLog:
    """Rows that are not trained on, in the order of the rows.

    Attributes:
        counts: rows of each kind.
        examples: the first different ones of each kind: index of the file, where in it, what is wrong.
    """

    counts: Counter[Fault] = field(default_factory=Counter)
    examples: dict[Fault, list[tuple[int, str, str]]] = field(default_factory=dict)

    @property
    def rejected(self) -> int:
        """Rows that cannot be used."""
        return sum(count for fault, count in self.counts.items() if fault.rejected)

    def add(self, fault: Fault, file: int, where: str, detail: str, rows: int = 1) -> None:
        """Note one row, or several with one cause."""
        self.counts[fault] += rows
        self._show(fault, [(file, where, detail)])

    def extend(self, later: FaultLog) -> None:
        """Append the faults of rows that come after these."""
        self.counts += later.counts
        for fault, examples in later.examples.items():
            self._show(fault, examples)

    def _show(self, fault: Fault, examples: Sequence[tuple[int, str, str]]) -> None:
        kept = self.examples.setdefault(fault, [])
        # Consecutive rows with one cause are one example.
        kept += [example for example in examples[: EXAMPLES - len(kept)] if example not in kept]

    def to_json(self) -> dict[str, Any]:
        """Plain values, by kind."""
        return {
            fault.value: {"rows": self.counts[fault], "examples": self.examples.get(fault, [])}
            for fault in Fault
            if self.counts[fault]
        }

    @staticmethod
    def from_json(kinds: Mapping[str, Any]) -> FaultLog:
        """What ``to_json`` gave.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        log = FaultLog()
        for kind, entry in kinds.items():
            log.counts[Fault(kind)] = int(entry["rows"])
            log.examples[Fault(kind)] = [(int(file), str(where), str(text)) for file, where, text in entry["examples"]]
        return log
