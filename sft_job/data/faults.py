"""Rows and row groups that cannot be used: counted by kind, the first ones kept as examples."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sft_job.contract import ExitCode
from sft_job.errors import Problem

_EXAMPLES = 10


class Fault(enum.Enum):
    """What is wrong with a row, or with a row group that cannot be read."""

    DAMAGED = "damaged"
    NO_TEXT = "no text"
    NOT_RENDERED = "not rendered"
    NOT_PROVED = "not proved"
    OVERLONG = "overlong"
    MALFORMED = "malformed"


@dataclass
class FaultLog:
    """Faults of some rows, in the order of the rows.

    Attributes:
        counts: rows (for DAMAGED row groups) at fault.
        examples: the first ones of each kind: index of the file, where in it, what is wrong.
    """

    counts: Counter[Fault] = field(default_factory=Counter)
    examples: dict[Fault, list[tuple[int, str, str]]] = field(default_factory=dict)

    def add(self, fault: Fault, file: int, where: str, detail: str) -> None:
        """Note one row or row group."""
        self.counts[fault] += 1
        examples = self.examples.setdefault(fault, [])
        if len(examples) < _EXAMPLES:
            examples.append((file, where, detail))

    def extend(self, later: FaultLog) -> None:
        """Append the faults of rows that come after these."""
        self.counts += later.counts
        for fault, examples in later.examples.items():
            kept = self.examples.setdefault(fault, [])
            kept += examples[: _EXAMPLES - len(kept)]

    def problems(self, files: Sequence[Path], option: str, rows: int, max_length: int) -> list[Problem]:
        """One problem for each kind of fault, with its count and its first examples.

        Args:
            files: the files that the examples' indices count.
            option: the option that names the files.
            rows: rows that were looked at.
            max_length: limit that overlong rows exceed.
        """
        texts = {
            Fault.DAMAGED: (option, "{n} cannot be read", "write the files again, or leave them out"),
            Fault.NO_TEXT: (option, "{n} have no text as prompt or response", "mend or remove these rows"),
            Fault.NOT_RENDERED: (
                "data.chat_template",
                "{n} make the chat template fail",
                "mend the rows or the template",
            ),
            Fault.NOT_PROVED: (
                "data.chat_template",
                "{n} cannot be masked: what the assistant wrote is not found for certain in the template's rendering",
                "mend the rows or the template; {% generation %} in the template says where the assistant writes",
            ),
            Fault.OVERLONG: (
                "data.max_length",
                f"{{n}} are longer than {max_length:,} tokens and data.truncation is error",
                "raise data.max_length, set data.truncation to left or right, or shorten these rows",
            ),
            Fault.MALFORMED: (
                "data.custom_cls",
                "{n} are not what a data set class must give",
                "mend the class: sft_job/data/custom.py says what its rows must be",
            ),
        }
        problems: list[Problem] = []
        for fault, (subject, rule, fix) in texts.items():
            count = self.counts[fault]
            if not count:
                continue
            groups = "row group" if count == 1 else "row groups"
            n = f"{count:,} {groups}" if fault is Fault.DAMAGED else f"{count:,} of {rows:,} rows"
            lines = [
                f"{rule.format(n=n)}; the first ones (rows count from 0):" if count > 1 else f"{rule.format(n=n)}:"
            ]
            lines += [f"      {files[file]} {where}: {detail}" for file, where, detail in self.examples[fault]]
            problems.append(Problem(ExitCode.DATA, subject, "\n".join(lines), fix))
        return problems
