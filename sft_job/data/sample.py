"""Rows rendered as training would, a sample or all of them: what ``sft-job check`` looks at."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from sft_job.data.build import Outcome, start_reading
from sft_job.data.counts import FileCounts
from sft_job.data.footer import UNREADABLE, one_line
from sft_job.data.judge import judge, nothing_usable
from sft_job.data.pieces import Gap, Piece, Segment, batch_stream, names_in, numbered_segment
from sft_job.data.spec import CacheSpec
from sft_job.data.tokenise import Int32, PieceTokeniser
from sft_job.data.workers import available_cores
from sft_job.errors import Problem

_SPOTS = 20


class Looked(NamedTuple):
    """What a look at rows found.

    Attributes:
        counts: over the rows looked at.
        notes: on template and tokenizer.
        problems: of the rows (exit 65).
        warning: where some rows are left out and the run goes on; '' = nothing.
    """

    counts: FileCounts
    notes: list[str]
    problems: list[Problem]
    warning: str = ""


def check_sample(spec: CacheSpec, rows: int, allowed: float = 0.0) -> Looked:
    """Render about ``rows`` rows from places spread evenly over all files.

    Args:
        spec: the split.
        rows: how many; taken from at most 20 row groups, so that little has to be read.
        allowed: ``data.max_rejected_fraction``, of the sample.

    Raises:
        ProblemsError: the tokenizer (66) or the template (2) cannot be used.
    """
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        tokeniser = PieceTokeniser(spec, Path(folder))
        piece = Piece(0)
        for found in _segments(spec, rows) if tokeniser.custom is None else _numbered(len(tokeniser.custom), rows):
            piece.append(found)
        outcome.add(tokeniser.run(piece))
    return _looked(spec, outcome, tokeniser.notes, allowed, "(in a sample) ")


class SampledLengths(NamedTuple):
    """Lengths of some rows.

    Attributes:
        lengths: tokens of each usable row of the sample.
        targets: of these, those that are trained.
        read: rows that were read.
        total: rows of the data set.
    """

    lengths: Int32
    targets: Int32
    read: int
    total: int


def sample_lengths(spec: CacheSpec, rows: int) -> SampledLengths:
    """Tokens of about ``rows`` rows from the places that ``check_sample`` looks at.

    Raises:
        ProblemsError: the tokenizer (66) or the template (2) cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokeniser = PieceTokeniser(spec, Path(folder))
        custom = tokeniser.custom
        piece = Piece(0)
        for found in _segments(spec, rows) if custom is None else _numbered(len(custom), rows):
            piece.append(found)
        result = tokeniser.run(piece)
    total = sum(pq.read_metadata(file).num_rows for file in spec.sources) if custom is None else len(custom)
    total = min(total, spec.max_samples) if spec.max_samples >= 0 else total
    read = sum(counts.rows_read for counts in result.counts.values())
    return SampledLengths(result.lengths, result.targets, read, total)


def check_all(spec: CacheSpec, allowed: float = 0.0, workers: int | None = None) -> Looked:
    """Render every row, as training would, and keep nothing.

    Args:
        spec: the split.
        allowed: ``data.max_rejected_fraction``.
        workers: processes that tokenise; None = one for each core.

    Raises:
        ProblemsError: as ``build.build`` says.
        JobError: exit 137, where a worker process was killed.
    """
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        reading = start_reading(spec, Path(folder), workers or available_cores())
        with closing(reading.results) as results:
            for result in results:
                outcome.add(result)
                if result.part:
                    (Path(folder) / result.part.name).unlink()
    return _looked(spec, outcome, reading.notes, allowed)


def _looked(spec: CacheSpec, outcome: Outcome, notes: list[str], allowed: float, where: str = "") -> Looked:
    total = outcome.total()
    judged = judge(
        outcome.faults,
        total.rows_read,
        files=spec.origins,
        option=spec.files_option,
        max_length=spec.max_length,
        allowed=allowed,
    )
    problems = list(judged.problems)
    if total.rows_read and not total.rows_usable and not problems:
        problems.append(nothing_usable(spec, total.rows_read, outcome.faults))
    shown = [replace(problem, rule=f"{where}{problem.rule}") for problem in problems]
    return Looked(total, notes, shown, f"{where}{judged.warning}" if judged.warning else "")


def _segments(spec: CacheSpec, rows: int) -> Iterator[Segment | Gap]:
    groups = [place for index, file in enumerate(spec.sources) for place in _row_groups(index, file)]
    spots = _spread(groups, _SPOTS)
    each = -(-rows // max(1, len(spots)))
    for index, group, first_row, count in spots:
        try:
            with pq.ParquetFile(spec.sources[index], page_checksum_verification=True) as parquet:
                names = names_in(parquet.schema_arrow, spec.columns)
                batch = next(parquet.iter_batches(each, row_groups=[group], columns=names), None)
            read = 0 if batch is None else batch.num_rows
            reason = "it gives fewer rows than the footer says"
        except UNREADABLE as error:
            batch, read, reason = None, 0, one_line(error)
        if batch is not None and read:
            yield Segment(index, first_row, batch_stream(batch), read)
        if read < min(each, count):
            yield Gap(index, first_row + read, min(each, count) - read, f"row group {group}", reason)


def _numbered(total: int, rows: int) -> Iterator[Segment]:
    spots = min(_SPOTS, total, rows)
    each = min(-(-rows // max(1, spots)), -(-total // max(1, spots)))
    for spot in range(spots):
        first = spot * total // spots
        yield numbered_segment(first, min(each, (spot + 1) * total // spots - first))


def _row_groups(index: int, file: Path) -> Iterator[tuple[int, int, int, int]]:
    """(file, row group, number of its first row, its rows) of each row group that has rows."""
    metadata = pq.read_metadata(file)
    first_row = 0
    for group in range(metadata.num_row_groups):
        count = metadata.row_group(group).num_rows
        if count:
            yield index, group, first_row, count
        first_row += count


def _spread(places: Sequence[tuple[int, int, int, int]], count: int) -> list[tuple[int, int, int, int]]:
    if len(places) <= count:
        return list(places)
    return [places[i * len(places) // count] for i in range(count)]
