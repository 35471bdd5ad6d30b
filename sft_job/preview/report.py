"""The data report of a run's caches, in the words and numbers that are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft_job.data.cache import TokenCache


@dataclass(frozen=True)
class SetReport:
    """What is to be said about one set of rows.

    Attributes:
        name: ``train``, ``val`` or the set's own name.
        counts: rows and tokens, by the names of ``logs/data_report.json``.
        edges: [bins + 1] lengths in tokens; a bin holds rows from its edge to below the next one.
        rows: [bins] rows of each length, before any was cut.
        duplicates: usable rows that equal an earlier one.
        rejected: rejected rows by kind.
        files: the counts of each file, with its ``path``.
        notes: on template and tokenizer.
        warnings: to be heeded.
    """

    name: str
    counts: Mapping[str, int]
    edges: tuple[int, ...]
    rows: tuple[int, ...]
    duplicates: int
    rejected: Mapping[str, int]
    files: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def trained_share(self) -> float:
        """Trained tokens of all tokens, from 0 to 1."""
        return share(self.counts)

    def lines(self) -> list[tuple[str, str]]:
        """The counts in words: what, and how many."""
        read = self.counts["rows_read"]
        return [
            ("rows read", f"{read:,}"),
            ("trained on", _of(self.counts["rows_usable"], read)),
            ("rejected", _of(self.counts["rows_rejected"], read)),
            *((f"  {kind}", f"{count:,}") for kind, count in self.rejected.items() if count),
            ("without a target", _of(self.counts["rows_without_target"], read)),
            ("dropped as too long", _of(self.counts["rows_dropped"], read)),
            ("truncated", _of(self.counts["rows_truncated"], read)),
            ("duplicates", _of(self.duplicates, read)),
            ("tokens", f"{self.counts['tokens']:,}"),
            ("trained tokens", _of(self.counts["trained_tokens"], self.counts["tokens"])),
            ("longest row", f"{self.counts['longest_row']:,} tokens"),
        ]

    def bins(self) -> list[tuple[str, int]]:
        """The histogram: lengths from and to, and rows."""
        edges = zip(self.edges, self.edges[1:], strict=False)
        return [(f"{low:,} to {high - 1:,}", count) for (low, high), count in zip(edges, self.rows, strict=True)]


def _of(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.1f} %)" if count and total else f"{count:,}"


def share(counts: Mapping[str, Any]) -> float:
    """Trained tokens of all tokens, from 0 to 1."""
    return counts["trained_tokens"] / max(1, counts["tokens"])


def set_report(name: str, cache: TokenCache) -> SetReport:
    """The report that a cache carries."""
    report = cache.report
    names = ("rows_read", "rows_usable", "rows_rejected", "rows_without_target", "rows_dropped", "rows_truncated")
    counts = {key: int(report[key]) for key in (*names, "tokens", "trained_tokens", "longest_row")}
    return SetReport(
        name=name,
        counts=counts,
        edges=tuple(report["lengths"]["edges"]),
        rows=tuple(report["lengths"]["counts"]),
        duplicates=int(report["duplicates"]),
        rejected=dict(report["rejected"]),
        files=tuple(report["files"]),
        notes=tuple(report["notes"]),
        warnings=tuple(report["warnings"]),
    )
