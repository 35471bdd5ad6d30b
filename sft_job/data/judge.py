"""Whether a run may go on without the rows that cannot be used (``data.max_rejected_fraction``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_job.contract import ExitCode
from sft_job.data.cache import TokenCache
from sft_job.data.faults import Fault, FaultLog
from sft_job.data.spec import CacheSpec
from sft_job.errors import Problem

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


def judge_rows(cache: TokenCache, spec: CacheSpec, allowed: float, listing: Path | None = None) -> Judged:
    """Whether a run may go on with the rows that a cache holds.

    Args:
        cache: the cache of ``spec``.
        spec: what it was made from.
        allowed: ``data.max_rejected_fraction``.
        listing: file that names all rows that are not trained on, for the messages.
    """
    report = cache.report
    judged = judge(
        cache.faults,
        report["rows_read"],
        files=spec.origins,
        option=spec.files_option,
        max_length=spec.max_length,
        allowed=allowed,
        listing=listing,
    )
    if judged.problems or cache.num_rows:
        return judged
    return Judged((nothing_usable(spec, report["rows_read"], cache.faults),))


def nothing_usable(spec: CacheSpec, rows: int, faults: FaultLog) -> Problem:
    """The problem of a data set of which no row can be trained on."""
    kinds = ", ".join(f"{count:,} {fault.value}" for fault, count in faults.counts.items())
    rule = f"none of {rows:,} rows has a token to train on within data.max_length = {spec.max_length:,} ({kinds})"
    fix = "raise data.max_length, or data.truncation=left, which keeps the responses' ends"
    return Problem(ExitCode.DATA, spec.files_option, rule, fix)
