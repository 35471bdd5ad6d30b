"""A sample of the rows, rendered as training would: what ``sft-job check`` looks at before tokenising everything."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from sft_job.data.faults import FaultLog
from sft_job.data.pieces import Piece, Segment, batch_stream, names_in, numbered_segment
from sft_job.data.spec import CacheSpec
from sft_job.data.tokenise import FileCounts, PieceTokeniser
from sft_job.errors import Problem

_SPOTS = 20


def check_sample(spec: CacheSpec, rows: int) -> tuple[FileCounts, list[str], list[Problem]]:
    """Render about ``rows`` rows from places spread evenly over all files.

    Args:
        spec: the split.
        rows: how many; taken from at most 20 row groups, so that little has to be read.

    Returns:
        Counts over the sample, notes on template and tokenizer, and the problems of its rows (exit 65).

    Raises:
        ProblemsError: the tokenizer (66) or the template (2) cannot be used.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokeniser = PieceTokeniser(spec, Path(folder))
        segments = _segments(spec, rows) if tokeniser.custom is None else _numbered(len(tokeniser.custom), rows)
        result = tokeniser.run(Piece(0, list(segments)))
    total = FileCounts()
    for counts in result.counts.values():
        total.add(counts)
    faults = FaultLog()
    faults.extend(result.faults)
    problems = faults.problems(spec.origins, spec.files_option, total.rows_read, spec.max_length)
    shown = [replace(problem, rule=f"(in a sample) {problem.rule}") for problem in problems]
    return total, tokeniser.notes, shown


def _segments(spec: CacheSpec, rows: int) -> Iterator[Segment]:
    groups = [place for index, file in enumerate(spec.files) for place in _row_groups(index, file)]
    spots = _spread(groups, _SPOTS)
    each = -(-rows // max(1, len(spots)))
    for index, group, first_row in spots:
        with pq.ParquetFile(spec.files[index], page_checksum_verification=True) as parquet:
            names = names_in(parquet.schema_arrow, spec.columns)
            batch = next(parquet.iter_batches(each, row_groups=[group], columns=names), None)
        if batch is not None and batch.num_rows:
            yield Segment(index, first_row, batch_stream(batch))


def _numbered(total: int, rows: int) -> Iterator[Segment]:
    spots = min(_SPOTS, total, rows)
    each = min(-(-rows // max(1, spots)), -(-total // max(1, spots)))
    for spot in range(spots):
        first = spot * total // spots
        yield numbered_segment(first, min(each, (spot + 1) * total // spots - first))


def _row_groups(index: int, file: Path) -> Iterator[tuple[int, int, int]]:
    """(file, row group, number of its first row) of each row group that has rows."""
    metadata = pq.read_metadata(file)
    first_row = 0
    for group in range(metadata.num_row_groups):
        count = metadata.row_group(group).num_rows
        if count:
            yield index, group, first_row
        first_row += count


def _spread(places: Sequence[tuple[int, int, int]], count: int) -> list[tuple[int, int, int]]:
    if len(places) <= count:
        return list(places)
    return [places[i * len(places) // count] for i in range(count)]
