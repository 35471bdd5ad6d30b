"""The data report of a run's caches, completed by what their lengths and rows tell."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sft_job.data.cache import TokenCache

_MOST_BINS = 20
# Lengths that are further apart than this share no scale but a logarithmic one.
_WIDE = 40
# Counting equal rows reads the whole cache: left out where that takes longer than a look should.
_MOST_TOKENS_READ = 100_000_000


@dataclass(frozen=True)
class SetReport:
    """What is to be said about one set of rows.

    Attributes:
        name: ``train``, ``val`` or the set's own name.
        counts: rows and tokens, by the names of ``logs/data_report.json``.
        edges: [bins + 1] lengths in tokens; a bin holds rows from its edge to below the next one.
        rows: [bins] usable rows of each length.
        duplicates: usable rows whose tokens another row has already; None = not counted.
        rejected: rejected rows by kind.
        files: the counts of each file, with its ``path``.
        notes: on template and tokenizer.
        warnings: to be heeded.
    """

    name: str
    counts: Mapping[str, int]
    edges: tuple[int, ...]
    rows: tuple[int, ...]
    duplicates: int | None
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
            ("duplicates", "not counted" if self.duplicates is None else _of(self.duplicates, read)),
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
    """The report that a cache carries; what it leaves out is counted here."""
    report = cache.report
    names = ("rows_read", "rows_usable", "rows_without_target", "rows_truncated", "tokens", "trained_tokens")
    counts = {key: int(report.get(key, 0)) for key in (*names, "longest_row", "rows_rejected", "rows_dropped")}
    lengths = report.get("lengths") or {}
    edges, rows = (lengths["edges"], lengths["counts"]) if lengths else histogram(cache.lengths)
    return SetReport(
        name=str(report.get("name") or name),
        counts=counts,
        edges=tuple(edges),
        rows=tuple(rows),
        duplicates=report["duplicates"] if "duplicates" in report else _duplicates(cache),
        rejected=dict(report.get("rejected") or {}),
        files=tuple(report["files"]),
        notes=tuple(report["notes"]),
        warnings=tuple(report["warnings"]),
    )


def histogram(lengths: npt.NDArray[np.int32]) -> tuple[list[int], list[int]]:
    """Edges and rows of at most about 20 bins with round edges; each twice as wide as the last where lengths differ."""
    low, high = int(lengths.min()), int(lengths.max())
    if high > _WIDE * low:
        edges = [2**power for power in range(low.bit_length() - 1, high.bit_length() + 1)]
    else:
        steps = [lead * 10**zeros for zeros in range(10) for lead in (1, 2, 5)]
        step = next(step for step in steps if (high - low) / step < _MOST_BINS - 1)
        edges = list(range(low // step * step, high + step + 1, step))
    while edges[-2] > high:
        edges.pop()
    return edges, np.histogram(lengths, bins=[*edges[:-1], edges[-1] - 0.5])[0].tolist()


def _duplicates(cache: TokenCache) -> int | None:
    if cache.lengths.sum(dtype=np.int64) > _MOST_TOKENS_READ:
        return None
    digests = {hashlib.blake2b(cache.row(index).ids.tobytes(), digest_size=16).digest() for index in range(len(cache))}
    return len(cache) - len(digests)
