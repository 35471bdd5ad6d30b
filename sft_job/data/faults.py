"""Why rows are not trained on: rejected, without a target, or left out on request. Counted by kind and file."""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_job.contract import ExitCode
from sft_job.errors import Problem

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


_TEXTS: Mapping[Fault, tuple[str | None, str, str]] = {
    Fault.DAMAGED: (None, "cannot be read", "write the files again, or leave them out"),
    Fault.NO_TEXT: (None, "have no text to train on", "mend or remove these rows"),
    Fault.UNDECODABLE: (None, "hold bytes that are not valid UTF-8", "mend or remove these rows"),
    Fault.EMPTY: (None, "are empty: neither prompt nor response has a character", "mend or remove these rows"),
    Fault.NOT_RENDERED: ("data.chat_template", "make the chat template fail", "mend the rows or the template"),
    Fault.NOT_PROVED: (
        "data.chat_template",
        "cannot be masked: what the assistant wrote is not found for certain in the template's rendering",
        "mend the rows or the template; {% generation %} in the template says where the assistant writes",
    ),
    Fault.OVERLONG: (
        "data.max_length",
        "are longer than {limit:,} tokens and data.truncation is error",
        "raise data.max_length, set data.truncation to left, right, drop or turn, or shorten these rows",
    ),
    Fault.MALFORMED: (
        "data.custom_cls",
        "are not what a data set class must give",
        "mend the class: sft_job/data/custom.py says what its rows must be",
    ),
}


@dataclass(frozen=True)
class Judged:
    """What the rows that are not trained on mean for the run.

    Attributes:
        problems: why it cannot go on (exit 65).
        warning: what to tell where it goes on without some rows; '' = nothing.
    """

    problems: tuple[Problem, ...] = ()
    warning: str = ""


def judge(
    log: FaultLog,
    rows: int,
    *,
    files: Sequence[Path],
    option: str,
    max_length: int,
    allowed: float,
    listing: Path | None = None,
) -> Judged:
    """Compare the share of rejected rows with ``data.max_rejected_fraction``.

    Args:
        log: rows that are not trained on.
        rows: rows that were looked at.
        files: the files that the log's indices count.
        option: the option that names the files.
        max_length: limit that overlong rows exceed.
        allowed: the share that may be left out.
        listing: file that names all rejected rows.

    Returns:
        A problem for each kind of rejected row where there are too many, with the first ten of it.
    """
    rejected = log.rejected
    if not rejected:
        return Judged()
    if rejected > allowed * rows:
        # Enough digits that setting the shown share lets the run go on.
        share = math.ceil(rejected / rows * 10**4) / 10**4
        way = f"data.max_rejected_fraction is {allowed:g}: with {share:g} the run goes on without all that are rejected"
        kinds = [fault for fault in _TEXTS if log.counts[fault]]
        return Judged(tuple(_problem(log, kind, rows, files, option, max_length, way, listing) for kind in kinds))
    kinds_text = ", ".join(f"{log.counts[fault]:,} {fault.value}" for fault in _TEXTS if log.counts[fault])
    named = f"; {listing} names them" if listing else ""
    return Judged(
        warning=f"{rejected:,} of {rows:,} rows of {option} ({100 * rejected / rows:.2g} %) cannot be used and are "
        f"left out, as data.max_rejected_fraction = {allowed:g} allows ({kinds_text}){named}"
    )


def _problem(
    log: FaultLog,
    fault: Fault,
    rows: int,
    files: Sequence[Path],
    option: str,
    max_length: int,
    way: str,
    listing: Path | None,
) -> Problem:
    subject, rule, fix = _TEXTS[fault]
    count, examples = log.counts[fault], log.examples[fault]
    head = f"{count:,} of {rows:,} rows {rule.format(limit=max_length)}"
    lines = [f"{head}; the first ones (rows count from 0):" if count > 1 else f"{head}:"]
    lines += [f"      {files[file]} {where}: {detail}" for file, where, detail in examples]
    if listing:
        lines.append(f"    all of them: {listing}")
    return Problem(ExitCode.DATA, subject or option, "\n".join(lines), f"{fix}\n    {way}")
