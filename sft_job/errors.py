"""Errors that users see: a list of problems, shown together on one screen, with one exit code."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sft_job.contract import ExitCode

_MOST_SHOWN = 50
_LONGEST_LINE = 2000
# With several kinds of problem at once the exit code is the first of these that occurs.
_PRIORITY = (ExitCode.CONFIG, ExitCode.DATA, ExitCode.MODEL)


class _Missing(enum.Enum):
    """A value that is left out; an enum member stays the same object when an error crosses processes."""

    VALUE = enum.auto()


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        code: exit code of this kind of problem.
        subject: the option's full path (``data.train_batch_size``), or the file and row.
        rule: what must hold, with the arithmetic where there is some.
        fix: what the user can do.
        value: what was found; leave it out where there is nothing to show.
        origin: where the value came from: ``sft_trainer.yaml:12``, ``command line``, ``environment NNODES``.
    """

    code: ExitCode
    subject: str
    rule: str
    fix: str = ""
    value: Any = _Missing.VALUE
    origin: str = ""

    def text(self) -> str:
        """Two or three lines: where, what was found; the rule; the fix."""
        lines = [self._head(), f"    {self.rule}"]
        if self.fix:
            lines.append(f"    fix: {self.fix}")
        return "\n".join(shorten(line, _LONGEST_LINE) for line in lines)

    def line(self) -> str:
        """The same in one line, for what is told and refused nothing."""
        fix = f" (fix: {self.fix})" if self.fix else ""
        return shorten(" ".join(f"{self._head()}: {self.rule}{fix}".splitlines()), _LONGEST_LINE)

    def _head(self) -> str:
        head = f"{self.origin}: {self.subject}" if self.origin else self.subject
        return head if self.value is _Missing.VALUE else f"{head} = {_shown(self.value)}"


def shorten(text: str, limit: int) -> str:
    """The text, cut to so many characters; the mark at the cut is how the mask knows a secret that is not whole."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _shown(value: Any) -> str:
    return shorten(repr(value), 200)


class JobError(Exception):
    """An end with a defined exit code and a message for the user; its text is shown without a traceback."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.code, str(self))


class ProblemsError(JobError):
    """One or more problems found before any work was done; all of them are shown."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        if not problems:
            raise ValueError("ProblemsError needs at least one problem")
        super().__init__(worst_code(problems), problems_text(problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def worst_code(problems: Iterable[Problem]) -> ExitCode:
    """The exit code for a set of problems: configuration first, then data, then model, then any other."""
    codes = {problem.code for problem in problems}
    return next((code for code in _PRIORITY if code in codes), min(codes))


def problems_text(problems: Sequence[Problem]) -> str:
    """All problems under a heading that counts them."""
    count = f"{len(problems)} problem" + ("s" if len(problems) > 1 else "")
    shown = [problem.text() for problem in problems[:_MOST_SHOWN]]
    more = [f"... and {len(problems) - _MOST_SHOWN} more"] if len(problems) > _MOST_SHOWN else []
    return "\n".join([f"{count}:", *shown, *more])


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise ProblemsError if there is any problem."""
    if problems:
        raise ProblemsError(problems)
