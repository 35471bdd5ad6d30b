"""Rows that are not trained on, one by one: in the token cache by the index of the file, in the run's logs by its path.

They are written as they come, so that a data set of which nothing can be used needs no more memory than another.
"""

from __future__ import annotations

import os
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from sft_job.data.faults import Fault, FaultLog

CACHED = pa.schema([("file", pa.int32()), ("row", pa.int64()), ("kind", pa.string()), ("reason", pa.string())])
LOGGED = pa.schema(
    [
        ("split", pa.string()),
        ("name", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("kind", pa.string()),
        ("reason", pa.string()),
    ]
)
_REASON_CHARACTERS = 300
_GROUP_ROWS = 1 << 16


class LeftOut:
    """Rows of a piece that are not trained on.

    Attributes:
        log: their counts, and the first ones.
        by_file: their counts by the index of the file.
    """

    def __init__(self) -> None:
        self.log = FaultLog()
        self.by_file: defaultdict[int, Counter[Fault]] = defaultdict(Counter)
        self._files: list[int] = []
        self._rows: list[int] = []
        self._kinds: list[str] = []
        self._reasons: list[str] = []

    def add(self, fault: Fault, file: int, row: int, reason: str) -> None:
        """Note a row by the index of its file and its number in that file from 0."""
        reason = _text(reason)[:_REASON_CHARACTERS]
        self.log.add(fault, file, f"row {row}", reason)
        self._append(fault, file, row, reason)

    def add_damaged(self, file: int, first_row: int, rows: int, where: str, reason: str) -> None:
        """Note consecutive rows that cannot be read, with one cause."""
        reason = _text(reason)[:_REASON_CHARACTERS]
        self.log.add(Fault.DAMAGED, file, where, reason, rows)
        for row in range(first_row, first_row + rows):
            self._append(Fault.DAMAGED, file, row, f"{where}: {reason}")

    def _append(self, fault: Fault, file: int, row: int, reason: str) -> None:
        self._files.append(file)
        self._rows.append(row)
        self._kinds.append(fault.value)
        self._reasons.append(reason)
        self.by_file[file][fault] += 1

    def table(self) -> pa.Table:
        """All of them, as ``CACHED``."""
        return pa.table([self._files, self._rows, self._kinds, self._reasons], schema=CACHED)


class TableWriter:
    """Writes a parquet file from small tables, in row groups of a useful size; without rows it is written too."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._stream = path.open("wb")
        self._writer = pq.ParquetWriter(self._stream, schema, write_page_checksum=True)
        self._pending: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        self._pending.append(table)
        if sum(each.num_rows for each in self._pending) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        table = pa.concat_tables([self._schema.empty_table(), *self._pending])
        self._pending.clear()
        if table.num_rows:
            self._writer.write_table(table)

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream:
            if error is None:
                self._flush()
            self._writer.close()
            self._stream.flush()
            os.fsync(self._stream.fileno())


def write_rejected_rows(path: Path, sets: Iterable[tuple[str, str, Sequence[Path], Path]]) -> None:
    """Write ``logs/rejected_rows.parquet``: the whole file, or none of it.

    Args:
        path: the file.
        sets: for each data set its split, its name, its files, and its table in the token cache.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with TableWriter(temporary, LOGGED) as writer:
            for split, name, files, cached in sets:
                paths = pa.array([_text(str(file)) for file in files], pa.string())
                with pq.ParquetFile(cached, page_checksum_verification=True) as table:
                    for batch in table.iter_batches(_GROUP_ROWS):
                        columns = [[split] * batch.num_rows, [name] * batch.num_rows]
                        columns += [paths.take(batch.column("file")), *batch.columns[1:]]
                        writer.write(pa.table(columns, schema=LOGGED))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _text(text: str) -> str:
    """The text with everything that no file of UTF-8 can hold replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")
