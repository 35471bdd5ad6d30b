"""Counts of rows and tokens: of one file, or of all files of a data set."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sft_job.data.faults import Fault

# Rows below this length share the histogram's first bar; each further bar is twice as wide as the one before it.
_FIRST_EDGE = 16


@dataclass
class FileCounts:
    """Rows and tokens of one file, or of all.

    ``rows_read`` = ``rows_usable`` + the rows left out: each row is in one of them.

    Attributes:
        rows_read: rows that were looked at.
        rows_usable: rows that are trained on.
        left_out: rows that are not, by the reason.
        rows_truncated: rows that were cut; one whose targets were all cut away is without target too.
        rows_of_one_target: usable rows that train one token, as those with an empty response do.
        tokens: of usable rows.
        trained_tokens: those of them that have a predecessor and are trained.
        longest_row: tokens of the longest row before it was cut.
        largest_id: of usable rows.
        duplicates: usable rows that equal an earlier one, in ids and in what is trained.
        rows_with_control_tokens: rendered rows whose text holds control tokens, which were encoded as plain text.
        control_token: the first of these.
        rows_with_rewritten_json: rendered rows with JSON that templates write in other words, and so it is trained.
        rewritten_json: the first of these.
        rows_with_hidden_thoughts: rendered conversations of which the template leaves out thoughts of a trained turn.
        lengths: rows that could be rendered, by length before they were cut: number of the histogram's bar -> rows.
    """

    rows_read: int = 0
    rows_usable: int = 0
    left_out: Counter[Fault] = field(default_factory=Counter)
    rows_truncated: int = 0
    rows_of_one_target: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_row: int = 0
    largest_id: int = 0
    duplicates: int = 0
    rows_with_control_tokens: int = 0
    control_token: str = ""
    rows_with_rewritten_json: int = 0
    rewritten_json: str = ""
    rows_with_hidden_thoughts: int = 0
    lengths: Counter[int] = field(default_factory=Counter)

    @property
    def rows_rejected(self) -> int:
        """Rows that cannot be used."""
        return sum(count for fault, count in self.left_out.items() if fault.rejected)

    @property
    def rows_without_target(self) -> int:
        """Rows set aside because they have no token to train on."""
        return self.left_out[Fault.WITHOUT_TARGET]

    @property
    def rows_dropped(self) -> int:
        """Overlong rows that ``data.truncation`` leaves out."""
        return self.left_out[Fault.DROPPED]

    def saw_length(self, tokens: int) -> None:
        """Note the length of a rendered row, before it is cut."""
        self.longest_row = max(self.longest_row, tokens)
        self.lengths[_bar(tokens)] += 1

    def add(self, other: FileCounts) -> None:
        """Add the counts of more rows."""
        self.rows_read += other.rows_read
        self.rows_usable += other.rows_usable
        self.rows_truncated += other.rows_truncated
        self.rows_of_one_target += other.rows_of_one_target
        self.tokens += other.tokens
        self.trained_tokens += other.trained_tokens
        self.duplicates += other.duplicates
        self.rows_with_control_tokens += other.rows_with_control_tokens
        self.control_token = self.control_token or other.control_token
        self.rows_with_rewritten_json += other.rows_with_rewritten_json
        self.rewritten_json = self.rewritten_json or other.rewritten_json
        self.rows_with_hidden_thoughts += other.rows_with_hidden_thoughts
        self.left_out += other.left_out
        self.lengths += other.lengths
        self.longest_row = max(self.longest_row, other.longest_row)
        self.largest_id = max(self.largest_id, other.largest_id)

    def report(self) -> dict[str, Any]:
        """As ``logs/data_report.json`` shows them."""
        names = ("rows_read", "rows_usable", "rows_rejected", "rows_without_target", "rows_dropped", "rows_truncated")
        names += ("tokens", "trained_tokens", "longest_row", "largest_id", "duplicates")
        names += ("rows_with_control_tokens", "control_token", "rows_with_rewritten_json", "rewritten_json")
        names += ("rows_with_hidden_thoughts",)
        bars = _bar(self.longest_row) + 1
        return {
            **{name: getattr(self, name) for name in names},
            "lengths": {
                "edges": [0, *(_FIRST_EDGE << bar for bar in range(bars))],
                "counts": [self.lengths[bar] for bar in range(bars)],
            },
            "rejected": {
                fault.value: self.left_out[fault] for fault in Fault if fault.rejected and self.left_out[fault]
            },
        }


def control_tokens_note(counts: FileCounts) -> str | None:
    """What a user should know of control tokens in the rows' texts; None where there are none."""
    if not counts.rows_with_control_tokens:
        return None
    rows = "1 row holds" if counts.rows_with_control_tokens == 1 else f"{counts.rows_with_control_tokens:,} rows hold"
    return (
        f"{rows} control tokens such as {counts.control_token} as text; they are read as plain text "
        "(data.allow_control_tokens=true gives them their meaning)"
    )


def hidden_thoughts_note(counts: FileCounts) -> str | None:
    """What a user should know of thoughts that are not trained; None where all are shown."""
    if not counts.rows_with_hidden_thoughts:
        return None
    rows = f"{counts.rows_with_hidden_thoughts:,} row{'s' * (counts.rows_with_hidden_thoughts > 1)}"
    return f"the chat template does not show all thoughts of trained turns in {rows}: they are not trained"


def _bar(tokens: int) -> int:
    return (tokens // _FIRST_EDGE).bit_length()
