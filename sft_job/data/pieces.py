"""Reads parquet files in pieces of bounded size, small enough to hand to another process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sft_job.data.columns import Column
from sft_job.data.files import FileFooter
from sft_job.data.footer import UNREADABLE, one_line

_MIB = 1 << 20
# Compressed bytes of a column that are held at once; without it pyarrow reads a row group's whole column first.
_READ_BUFFER = 4 * _MIB
_MAX_BATCH_ROWS = 8192
# What a row that cannot be read takes in the list of rejected rows, with its reason.
_GAP_ROW_BYTES = 256


@dataclass(frozen=True)
class Segment:
    """Some consecutive rows of one file.

    Attributes:
        file: index of the file.
        first_row: number of the first row in its file, from 0.
        stream: the rows as an Arrow IPC stream of one batch, which travels between processes without its surroundings.
        num_rows: how many.
    """

    file: int
    first_row: int
    stream: bytes
    num_rows: int

    def batch(self) -> pa.RecordBatch:
        """The rows."""
        return pa.ipc.open_stream(self.stream).read_next_batch()


@dataclass(frozen=True)
class Gap:
    """Some consecutive rows of one file that cannot be read.

    Attributes:
        file: index of the file.
        first_row: number of the first row in its file, from 0.
        rows: how many.
        where: ``row group 3``.
        reason: what is wrong there.
    """

    file: int
    first_row: int
    rows: int
    where: str
    reason: str


@dataclass
class Piece:
    """Rows that are tokenised together and become one part of the cache.

    Attributes:
        index: number of the piece, from 0.
        segments: its rows, in order; many small files may share a piece.
        gaps: rows between them that cannot be read.
        num_bytes: bytes of text, about.
    """

    index: int
    segments: list[Segment] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    num_bytes: int = 0

    def append(self, rows: Segment | Gap) -> None:
        """Add rows that come after these."""
        if isinstance(rows, Segment):
            self.segments.append(rows)
            self.num_bytes += len(rows.stream)
        else:
            self.gaps.append(rows)
            self.num_bytes += rows.rows * _GAP_ROW_BYTES


def piece_bytes(text_bytes: int) -> int:
    """Size of a piece: by the data alone, so that the cache is the same whatever the number of processes.

    About 512 pieces keep many processes evenly busy; the bounds keep start-up costs and memory small.
    """
    return min(max(text_bytes // 512, _MIB), 16 * _MIB)


def read_pieces(
    files: Sequence[Path], footers: Sequence[FileFooter], columns: Sequence[Column], max_rows: int
) -> Iterator[Piece]:
    """The files' rows as pieces, in order; only the columns that are needed, never a whole file at once.

    Args:
        files: parquet files with faultless footers.
        footers: their footers.
        columns: columns to read.
        max_rows: stop after so many rows, those that cannot be read among them.
    """
    target = piece_bytes(sum(footer.text_bytes for footer in footers))
    piece = Piece(0)
    rows_left = max_rows
    for index, file in enumerate(files):
        if rows_left <= 0:
            break
        footer = footers[index]
        average = max(1, footer.text_bytes // max(1, footer.rows))
        batch_rows = min(max(1, target // average), _MAX_BATCH_ROWS)
        for rows in _read_file(file, index, columns, batch_rows, min(rows_left, footer.rows)):
            piece.append(rows)
            if piece.num_bytes >= target:
                yield piece
                piece = Piece(piece.index + 1)
        rows_left -= footer.rows
    if piece.segments or piece.gaps:
        yield piece


def numbered_pieces(rows: int) -> Iterator[Piece]:
    """Pieces that hold only the rows' numbers, for rows that are read elsewhere; about 512 of them."""
    size = min(max(rows // 512, 64), 4096)
    for index, first in enumerate(range(0, rows, size)):
        yield Piece(index, [numbered_segment(first, min(size, rows - first))])


def numbered_segment(first: int, count: int) -> Segment:
    """Some consecutive rows by their numbers."""
    numbers = pa.array(range(first, first + count), pa.int64())
    return Segment(0, first, batch_stream(pa.record_batch({"row": numbers})), count)


def _read_file(
    file: Path, index: int, columns: Sequence[Column], batch_rows: int, max_rows: int
) -> Iterator[Segment | Gap]:
    """The first ``max_rows`` rows: each of them once, in a segment or in a gap."""
    row, where = 0, "footer"
    try:
        with pq.ParquetFile(file, buffer_size=_READ_BUFFER, page_checksum_verification=True) as parquet:
            for group in range(parquet.metadata.num_row_groups):
                where, end = f"row group {group}", min(row + parquet.metadata.row_group(group).num_rows, max_rows)
                for rows in _read_group(parquet, index, group, columns, batch_rows, row, end):
                    yield rows
                    row += rows.rows if isinstance(rows, Gap) else rows.num_rows
                if row >= max_rows:
                    return
    except UNREADABLE as error:
        yield from _gaps(index, row, max_rows, where, one_line(error))
    else:
        # The footer was read a second time and tells of fewer rows.
        yield from _gaps(index, row, max_rows, "footer", "the file was changed while it was read")


def _read_group(
    parquet: pq.ParquetFile, file: int, group: int, columns: Sequence[Column], batch_rows: int, row: int, end: int
) -> Iterator[Segment | Gap]:
    """Rows from ``row`` to ``end`` of a file, which are the first ones of this row group."""
    names = names_in(parquet.schema_arrow, columns)
    reason = "it gives fewer rows than the footer says"
    try:
        for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=names):
            batch = batch.slice(0, end - row)
            yield Segment(file, row, batch_stream(batch), batch.num_rows)
            row += batch.num_rows
            if row >= end:
                return
    except UNREADABLE as error:
        reason = one_line(error)
    yield from _gaps(file, row, end, f"row group {group}", reason)


def _gaps(file: int, row: int, end: int, where: str, reason: str) -> Iterator[Gap]:
    for first in range(row, end, _MAX_BATCH_ROWS):
        yield Gap(file, first, min(_MAX_BATCH_ROWS, end - first), where, reason)


def names_in(schema: pa.Schema, columns: Sequence[Column]) -> list[str]:
    """Names of the columns, each once, without optional ones that the file does not hold."""
    found = (column.name for column in columns if not column.optional or column.name in schema.names)
    return list(dict.fromkeys(found))


def batch_stream(batch: pa.RecordBatch) -> bytes:
    """The rows as an Arrow IPC stream, without the buffers around a slice."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()
