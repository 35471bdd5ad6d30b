"""Whether a parquet file is whole: what its footer must fulfil, and which pages carry checksums.

A page's checksum covers the page alone. Neither the footer nor a page's header has one, so a bit that flipped there is
found by what does not fit together: rows that are counted in three places, and byte ranges that may not overlap. A page
whose header is damaged may be passed over without an error; then a row group gives fewer rows than its footer says,
which ``pieces.py`` looks at.

The column chunks are decoded here and not taken from pyarrow's metadata objects: these end the whole process where a
damaged footer gives a chunk another type than its statistics have (an uncaught C++ exception; pyarrow 26).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

# What pyarrow raises on damaged files: a name that is no text and a size that no number holds are plain errors.
UNREADABLE = (OSError, ValueError, KeyError, OverflowError, pa.ArrowException)
# The footer's length and the end mark.
_END_BYTES = 8
# The four numbers at the head of a page header: a byte before each, and 5 at the most of its own.
_HEADER_BYTES = 24
_DEEPEST = 32


def one_line(error: BaseException) -> str:
    """An error's text for a list of faults."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclass(frozen=True)
class Chunk:
    """One column in one row group.

    Attributes:
        path: names from the column down to its leaf.
        num_values: cells, nulls among them.
        text_bytes: size before it was compressed.
        start: place of its first page in the file.
        end: place behind its last page.
    """

    path: tuple[str, ...]
    num_values: int
    text_bytes: int
    start: int
    end: int


@dataclass(frozen=True)
class Group:
    """One row group."""

    num_rows: int
    chunks: tuple[Chunk, ...]


def read_groups(file: Path) -> tuple[Group, ...]:
    """The row groups that a file's footer names.

    Raises:
        OSError: the file cannot be read.
        ValueError: the footer is damaged.
    """
    with file.open("rb") as stream:
        stream.seek(-_END_BYTES, 2)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-_END_BYTES - length, 2)
        content = stream.read(length)
    try:
        # The numbers are those of the fields in parquet.thrift.
        return tuple(Group(int(group[3]), tuple(map(_chunk, group[1]))) for group in _struct(content, 0)[0].get(4, ()))
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("the footer cannot be decoded") from error


def _chunk(fields: dict[int, Any]) -> Chunk:
    meta = fields[3]
    places = [int(meta[9])]
    if meta.get(11):  # some writers note 0 where there is no dictionary
        places.append(int(meta[11]))
    start = min(places)
    path = tuple(part.decode() for part in meta[3])
    return Chunk(path, int(meta[5]), int(meta[6]), start, start + int(meta[7]))


def footer_fault(metadata: pq.FileMetaData, groups: Sequence[Group], size: int) -> str | None:
    """What in a footer does not fit together; None = nothing.

    Args:
        metadata: the footer as pyarrow reads it.
        groups: its row groups.
        size: of the file in bytes.
    """
    rows = sum(group.num_rows for group in groups)
    if rows != metadata.num_rows:
        return f"the footer counts {metadata.num_rows:,} rows, its row groups {rows:,}"
    columns = [metadata.schema.column(index) for index in range(len(metadata.schema))]
    for number, group in enumerate(groups):
        if [".".join(chunk.path) for chunk in group.chunks] != [column.path for column in columns]:
            return f"row group {number} has other columns than the schema"
        for chunk, column in zip(group.chunks, columns, strict=True):
            if not column.max_repetition_level and chunk.num_values != group.num_rows:
                name = ".".join(chunk.path)
                return f"row group {number} has {group.num_rows:,} rows, its column {name} {chunk.num_values:,}"
    ranges = sorted((chunk.start, chunk.end) for group in groups for chunk in group.chunks if chunk.num_values)
    if ranges and (ranges[0][0] < 0 or max(end for _, end in ranges) > size - metadata.serialized_size - _END_BYTES):
        return "the footer names bytes outside of the file"
    for (_, end), (start, _) in itertools.pairwise(ranges):
        if start < end:
            return f"the footer names the bytes from {start:,} on for two columns"
    return None


def has_checksums(file: Path, names: Collection[str]) -> bool:
    """Whether the pages of these columns carry checksums, by the first page of each in every row group.

    The footer does not tell; a page's header does, in a field of its own (4: crc).
    """
    try:
        with file.open("rb") as stream:
            for group in read_groups(file):
                for chunk in group.chunks:
                    if not chunk.num_values or chunk.path[0] not in names:
                        continue
                    stream.seek(chunk.start)
                    if not _names_crc(stream.read(_HEADER_BYTES)):
                        return False
    except (OSError, ValueError):
        return False
    return True


def _names_crc(header: bytes) -> bool:
    """Whether the head of a page header has ``crc`` behind its three numbers: the kind of page and its two sizes."""
    place = 0
    try:
        for _ in range(3):
            if header[place] != 0x15:  # the next field, a number of 32 bits
                return False
            _, place = _varint(header, place + 1)
        return header[place] == 0x15
    except IndexError:
        return False


# Thrift's compact protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while content[place] & 0x80:
        value |= (content[place] & 0x7F) << shift
        shift += 7
        place += 1
    return value | content[place] << shift, place + 1


def _zigzag(content: bytes, place: int) -> tuple[int, int]:
    value, place = _varint(content, place)
    return value >> 1 ^ -(value & 1), place


def _struct(content: bytes, place: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Values by the number of their field, and the place behind them."""
    fields: dict[int, Any] = {}
    number = 0
    while content[place]:
        step, kind = content[place] >> 4, content[place] & 15
        place += 1
        if step:
            number += step
        else:
            number, place = _zigzag(content, place)
        if kind in (1, 2):  # a truth value is in the kind itself
            fields[number] = kind == 1
        else:
            fields[number], place = _value(content, place, kind, depth)
    return fields, place + 1


def _value(content: bytes, place: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (4, 5, 6):  # whole numbers of 16, 32 and 64 bits
        return _zigzag(content, place)
    if kind == 8:  # bytes or text
        length, place = _varint(content, place)
        if place + length > len(content):
            raise IndexError(place)
        return content[place : place + length], place + length
    if depth > _DEEPEST:
        raise ValueError("the footer cannot be decoded")
    if kind == 12:
        return _struct(content, place, depth + 1)
    if kind in (9, 10):  # a list or a set
        count, kind, place = content[place] >> 4, content[place] & 15, place + 1
        if count == 15:
            count, place = _varint(content, place)
        values: list[Any] = []
        for _ in range(count):
            value, place = _value(content, place, kind, depth + 1)
            values.append(value)
        return values, place
    if kind in (1, 2, 3):  # one byte: a truth value in a list, a small number
        return content[place], place + 1
    if kind == 7:
        return content[place : place + 8], place + 8
    raise ValueError("the footer cannot be decoded")
