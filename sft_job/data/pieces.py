"""Reads parquet files in pieces of bounded size, small enough to hand to another process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sft_job.data.columns import Column
from sft_job.data.faults import Fault, FaultLog
from sft_job.data.files import FileFooter

_MIB = 1 << 20
# Compressed bytes of a column that are held at once; without it pyarrow reads a row group's whole column first.
_READ_BUFFER = 4 * _MIB
_MAX_BATCH_ROWS = 8192


@dataclass(frozen=True)
class Segment:
    """Some consecutive rows of one file.

    Attributes:
        file: index of the file.
        first_row: number of the first row in its file, from 0.
        stream: the rows as an Arrow IPC stream of one batch, which travels between processes without its surroundings.
    """

    file: int
    first_row: int
    stream: bytes

    def batch(self) -> pa.RecordBatch:
        """The rows."""
        return pa.ipc.open_stream(self.stream).read_next_batch()


@dataclass
class Piece:
    """Rows that are tokenised together and become one part of the cache.

    Attributes:
        index: number of the piece, from 0.
        segments: its rows, in order; many small files may share a piece.
    """

    index: int
    segments: list[Segment] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes of text, about."""
        return sum(len(segment.stream) for segment in self.segments)


def piece_bytes(text_bytes: int) -> int:
    """Size of a piece: by the data alone, so that the cache is the same whatever the number of processes.

    About 512 pieces keep many processes evenly busy; the bounds keep start-up costs and memory small.
    """
    return min(max(text_bytes // 512, _MIB), 16 * _MIB)


def read_pieces(
    files: Sequence[Path], footers: Sequence[FileFooter], columns: Sequence[Column], max_rows: int, faults: FaultLog
) -> Iterator[Piece]:
    """The files' rows as pieces, in order; only the columns that are needed, never a whole file at once.

    Args:
        files: parquet files with faultless footers.
        footers: their footers.
        columns: columns to read.
        max_rows: stop after so many rows.
        faults: row groups that cannot be read are noted here, and left out.
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
        for segment in _read_file(file, index, columns, batch_rows, min(rows_left, footer.rows), faults):
            piece.segments.append(segment)
            if piece.num_bytes >= target:
                yield piece
                piece = Piece(piece.index + 1)
        rows_left -= footer.rows
    if piece.segments:
        yield piece


def numbered_pieces(rows: int) -> Iterator[Piece]:
    """Pieces that hold only the rows' numbers, for rows that are read elsewhere; about 512 of them."""
    size = min(max(rows // 512, 64), 4096)
    for index, first in enumerate(range(0, rows, size)):
        yield Piece(index, [numbered_segment(first, min(size, rows - first))])


def numbered_segment(first: int, count: int) -> Segment:
    """Some consecutive rows by their numbers."""
    numbers = pa.array(range(first, first + count), pa.int64())
    return Segment(0, first, batch_stream(pa.record_batch({"row": numbers})))


def _read_file(
    file: Path, index: int, columns: Sequence[Column], batch_rows: int, max_rows: int, faults: FaultLog
) -> Iterator[Segment]:
    try:
        with pq.ParquetFile(file, buffer_size=_READ_BUFFER, page_checksum_verification=True) as parquet:
            names = names_in(parquet.schema_arrow, columns)
            first_row = 0
            for group in range(parquet.metadata.num_row_groups):
                row = first_row
                try:
                    for batch in parquet.iter_batches(batch_rows, row_groups=[group], columns=names):
                        if row >= max_rows:
                            return
                        yield Segment(index, row, batch_stream(batch.slice(0, max_rows - row)))
                        row += batch.num_rows
                except (OSError, pa.ArrowException) as error:
                    faults.add(Fault.DAMAGED, index, f"row group {group}", _one_line(error))
                first_row += parquet.metadata.row_group(group).num_rows
    except (OSError, pa.ArrowException) as error:
        faults.add(Fault.DAMAGED, index, "footer", _one_line(error))


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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
