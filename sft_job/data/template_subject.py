"""What the chat template's self-test looks at, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_job.contract import ExitCode
from sft_job.data.chat import ChatTemplate, TemplateFailure
from sft_job.data.encode import Encoder
from sft_job.data.render import Rendered
from sft_job.errors import Problem

OPTION = "data.chat_template"
USER, ANSWER = "userprobe", "answerprobe"
NEXT_USER, NEXT_ANSWER = "nextuserprobe", "nextanswerprobe"


@dataclass
class TemplateReport:
    """What the self-test found.

    Attributes:
        problems: what makes the run impossible (exit 2).
        warnings: what a user should know before training.
        found: what holds, in a few words each.
    """

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)

    def text(self) -> str:
        """One line."""
        wrong = f"{len(self.problems)} of its checks failed" if self.problems else ""
        return "; ".join([*([wrong] if wrong else []), *self.found])


@dataclass(frozen=True)
class Subject:
    """What is tested.

    Attributes:
        tokenizer: of transformers.
        template: the template in force.
        encoder: makes ids of what the template renders.
        stop_id: the token that ends a turn in training.
        folder: the base model's.
        row: renders one user message and its answer as training does.
        own: the template is the tokenizer's own.
        messages: rows are conversations: each of an assistant's turns is rendered by the template.
    """

    tokenizer: Any
    template: ChatTemplate
    encoder: Encoder
    stop_id: int
    folder: Path
    row: Callable[[str, str], Rendered]
    own: bool = True
    messages: bool = False

    def problem(self, rule: str, fix: str, *needles: str) -> Problem:
        """A problem of the template, with the line where the first of the needles stands."""
        own = " (the tokenizer's own)" if self.own else ""
        where = self._line(needles)
        if self.own:
            fix = f"{fix}; a mended copy is named by {OPTION}=FILE"
        return Problem(ExitCode.CONFIG, f"{OPTION}{own}", f"{rule}{where}", fix)

    def _line(self, needles: Sequence[str]) -> str:
        for needle in needles:
            for number, line in enumerate(self.template.text.splitlines(), start=1):
                place = line.find(needle)
                if place >= 0:
                    start, end = max(0, place - 40), place + len(needle) + 60
                    shown = ("…" if start else "") + line[start:end] + ("…" if end < len(line) else "")
                    return f"\n    line {number}: {shown.strip()}"
        return ""

    def name(self, token: int) -> str:
        """A token as users know it."""
        return f"{self.text(token)!r} (id {token})"

    def controls(self, text: str) -> list[int]:
        """Special and added tokens of a text that the template wrote."""
        added = {*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids}
        return [token for token in self.encoder.encode([text])[0] if token in added]

    def tried(self, messages: Sequence[dict[str, str]]) -> str | None:
        """The rendering of a conversation; None where the template fails on it."""
        try:
            return self.template.render([messages])[0]
        except TemplateFailure:
            return None

    def text(self, token: int) -> str:
        """A token's text."""
        return str(self.tokenizer.convert_ids_to_tokens(token))


def cut(text: str, end: bool = False, limit: int = 80) -> str:
    """The text, or its beginning or end."""
    if len(text) <= limit:
        return text
    return f"…{text[-limit:]}" if end else f"{text[:limit]}…"
