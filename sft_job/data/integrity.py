"""Whether a parquet file is whole: what its footer must fulfil, and which pages carry checksums.

A page's checksum covers the page alone. Neither the footer nor a page's header has one, so a bit that flipped there is
found by what does not fit together: rows that are counted in three places, and byte ranges that may not overlap. A page
whose header is damaged may be passed over without an error; then a row group gives fewer rows than its footer says,
which ``pieces.py`` looks at.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# What pyarrow raises on damaged files: a name that is no text and a size that no number holds are plain errors.
UNREADABLE = (OSError, ValueError, KeyError, OverflowError, pa.ArrowException)
# The four numbers at the head of a page header: a byte before each, and 5 at the most of its own.
_HEADER_BYTES = 24
_CRC_FIELD = 4
# The footer's length and the end mark.
_END_BYTES = 8
_THRIFT_I32 = 5


def one_line(error: BaseException) -> str:
    """An error's text for a list of faults."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def footer_fault(metadata: pq.FileMetaData, size: int) -> str | None:
    """What in a footer does not fit together; None = nothing.

    Args:
        metadata: the footer.
        size: of the file in bytes.
    """
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    rows = sum(group.num_rows for group in groups)
    if rows != metadata.num_rows:
        return f"the footer counts {metadata.num_rows:,} rows, its row groups {rows:,}"
    ranges: list[tuple[int, int]] = []
    for number, group in enumerate(groups):
        for index in range(group.num_columns):
            chunk = group.column(index)
            if not metadata.schema.column(index).max_repetition_level and chunk.num_values != group.num_rows:
                name = chunk.path_in_schema
                return f"row group {number} has {group.num_rows:,} rows, its column {name} {chunk.num_values:,}"
            start = _first_page(chunk)
            ranges.append((start, start + chunk.total_compressed_size))
    ranges.sort()
    if ranges and (ranges[0][0] < 0 or max(end for _, end in ranges) > size - metadata.serialized_size - _END_BYTES):
        return "the footer names bytes outside of the file"
    for (_, end), (start, _) in itertools.pairwise(ranges):
        if start < end:
            return f"the footer names the bytes from {start:,} on for two columns"
    return None


def _first_page(chunk: pq.ColumnChunkMetaData) -> int:
    places = [chunk.data_page_offset]
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:  # some writers note 0 where there is none
        places.append(chunk.dictionary_page_offset)
    return min(places)


def has_checksums(file: Path, names: Collection[str]) -> bool:
    """Whether the pages of these columns carry checksums, by the first page of each in every row group.

    The footer does not tell; a page's header does, in a field of its own (4: crc).
    """
    try:
        with pq.ParquetFile(file) as parquet, file.open("rb") as stream:
            metadata = parquet.metadata
            for start in _pages(metadata, names):
                stream.seek(start)
                if not _names_crc(stream.read(_HEADER_BYTES)):
                    return False
    except UNREADABLE:
        return False
    return True


def _pages(metadata: pq.FileMetaData, names: Collection[str]) -> Iterator[int]:
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for index in range(group.num_columns):
            chunk = group.column(index)
            if chunk.num_values and chunk.path_in_schema.split(".")[0] in names:
                yield _first_page(chunk)


def _names_crc(header: bytes) -> bool:
    """Whether the head of a page header, in Thrift's compact protocol, holds the field ``crc``.

    Each field begins with a byte of (step of the field's number, type); before ``crc`` there are three numbers of 32
    bits, each in as many bytes as have their top bit set, and one more.
    """
    number, place = 0, 0
    while place < len(header):
        step, kind = header[place] >> 4, header[place] & 15
        number += step
        if number >= _CRC_FIELD or not step or kind != _THRIFT_I32:
            return number == _CRC_FIELD and kind == _THRIFT_I32
        place += 1
        while place < len(header) and header[place] & 0x80:
            place += 1
        place += 1
    return False
