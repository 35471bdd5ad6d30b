"""One piece of text becomes one part of the token cache, an Arrow IPC file. Runs in the worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_job.data.columns import Cell, Unreadable, read_texts
from sft_job.data.custom_rows import CustomRows, MalformedRowError
from sft_job.data.faults import Fault, FaultLog
from sft_job.data.pieces import Piece, Segment
from sft_job.data.render import PromptResponseRenderer, Rendered, TemplateFailure, load_tokenizer, truncate
from sft_job.data.spec import CacheSpec
from sft_job.data.tokenizer import vocabulary_size

Int32 = npt.NDArray[np.int32]
PART_SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        # Flat pairs of start and end: 2 numbers for a prompt and its response, more for a conversation.
        ("spans", pa.large_list(pa.int32())),
        ("file", pa.int32()),
        ("row", pa.int64()),
    ]
)
# Characters given to the tokenizer at once: it holds far more than the ids for each token until a batch is done.
_ENCODED_AT_ONCE = 1 << 20


@dataclass
class FileCounts:
    """Rows and tokens of one file, or of all."""

    rows_read: int = 0
    rows_usable: int = 0
    rows_without_target: int = 0
    rows_truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_row: int = 0
    largest_id: int = 0
    rows_with_control_tokens: int = 0
    control_token: str = ""
    """The first one that stands in a row's text and was encoded as plain text."""

    def add(self, other: FileCounts) -> None:
        """Add the counts of more rows of the same file."""
        self.rows_read += other.rows_read
        self.rows_usable += other.rows_usable
        self.rows_without_target += other.rows_without_target
        self.rows_truncated += other.rows_truncated
        self.tokens += other.tokens
        self.trained_tokens += other.trained_tokens
        self.longest_row = max(self.longest_row, other.longest_row)
        self.largest_id = max(self.largest_id, other.largest_id)
        self.rows_with_control_tokens += other.rows_with_control_tokens
        self.control_token = self.control_token or other.control_token


class Part(NamedTuple):
    """One file of the cache: its name, its size in bytes, its rows."""

    name: str
    size: int
    rows: int


@dataclass
class PieceResult:
    """What became of a piece.

    Attributes:
        index: number of the piece.
        part: its file; None where no row was usable.
        lengths: tokens of each usable row.
        targets: trained tokens of each usable row that have a predecessor.
        counts: by index of the file.
        faults: rows that cannot be used.
    """

    index: int
    part: Part | None
    lengths: Int32
    targets: Int32
    counts: dict[int, FileCounts]
    faults: FaultLog


@dataclass
class _Columns:
    """Usable rows of a piece, column by column."""

    ids: list[Int32] = field(default_factory=list)
    spans: list[Int32] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def append(self, row: Rendered, file: int, number: int) -> None:
        self.ids.append(np.array(row.ids, dtype=np.int32))
        self.spans.append(np.array(row.spans, dtype=np.int32).reshape(-1))
        self.files.append(file)
        self.rows.append(number)
        self.targets.append(row.num_targets)

    def record_batch(self) -> pa.RecordBatch:
        columns = [_large_list(self.ids), _large_list(self.spans), pa.array(self.files, pa.int32())]
        return pa.record_batch([*columns, pa.array(self.rows, pa.int64())], schema=PART_SCHEMA)


def _large_list(rows: Sequence[Int32]) -> pa.LargeListArray:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))


class PieceTokeniser:
    """Renders pieces and writes their parts into a folder.

    Attributes:
        custom: rows of the user's own class; None where prompts and responses are rendered.
        notes: what was found out about template, tokenizer or class, for the log and the data report.
    """

    def __init__(self, spec: CacheSpec, folder: Path) -> None:
        """Load the tokenizer and probe the template.

        Raises:
            ProblemsError: exit 66 or 2, where the tokenizer, the template or the user's class cannot be used.
        """
        self._spec = spec
        self._folder = folder
        tokenizer = load_tokenizer(spec.tokenizer, spec.trust_remote_code)
        self.custom: CustomRows | None = None
        if spec.custom:
            if spec.chat_template:
                tokenizer.chat_template = spec.chat_template
            self.custom = CustomRows(spec.custom, spec.sources, tokenizer, vocabulary_size(spec.tokenizer, tokenizer))
            self.notes = [f"rows come from {spec.custom.name} in {spec.custom.path}"]
            return
        self._renderer = PromptResponseRenderer(
            tokenizer,
            chat_template=spec.chat_template,
            template_kwargs=spec.template_kwargs,
            allow_control_tokens=spec.allow_control_tokens,
        )
        self.notes = self._renderer.notes

    def run(self, piece: Piece) -> PieceResult:
        """Tokenise a piece and write its part.

        Raises:
            OSError: the part cannot be written.
        """
        columns, faults = _Columns(), FaultLog()
        counts: dict[int, FileCounts] = {}
        for segment in piece.segments:
            batch = segment.batch()
            of_file = counts.setdefault(segment.file, FileCounts())
            of_file.rows_read += batch.num_rows
            for number, row in self._rows(segment, batch, faults):
                self._take(row, segment.file, segment.first_row + number, columns, of_file, faults)
        lengths = np.array([len(ids) for ids in columns.ids], dtype=np.int32)
        targets = np.array(columns.targets, dtype=np.int32)
        return PieceResult(piece.index, self._write(piece.index, columns), lengths, targets, counts, faults)

    def _rows(self, segment: Segment, batch: pa.RecordBatch, faults: FaultLog) -> Iterator[tuple[int, Rendered]]:
        """Rows that can be made, with their numbers in the segment."""
        if self.custom is None:
            prompts, responses = (read_texts(batch, names) for names in (self._spec.prompt, self._spec.response))
            yield from self._rendered(prompts, responses, segment.file, segment.first_row, faults)
            return
        for number in range(batch.num_rows):
            try:
                yield number, self.custom.row(segment.first_row + number)
            except MalformedRowError as error:
                faults.add(Fault.MALFORMED, segment.file, f"row {segment.first_row + number}", str(error))

    def _rendered(
        self, prompts: list[Cell], responses: list[Cell], file: int, first_row: int, faults: FaultLog
    ) -> Iterator[tuple[int, Rendered]]:
        """Rows that can be rendered, with their numbers in the segment."""
        texts: list[tuple[int, str, str]] = []
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if isinstance(prompt, str) and isinstance(response, str):
                texts.append((number, prompt, response))
            else:
                reasons = [cell.reason for cell in (prompt, response) if isinstance(cell, Unreadable)]
                faults.add(Fault.NO_TEXT, file, f"row {first_row + number}", "; ".join(reasons))
        for chunk in _chunks(texts):
            try:
                rows = self._renderer.render([prompt for _, prompt, _ in chunk], [answer for *_, answer in chunk])
            except TemplateFailure:
                yield from self._one_by_one(chunk, file, first_row, faults)
            else:
                yield from zip((number for number, *_ in chunk), rows, strict=True)

    def _one_by_one(
        self, chunk: list[tuple[int, str, str]], file: int, first_row: int, faults: FaultLog
    ) -> Iterator[tuple[int, Rendered]]:
        for number, prompt, response in chunk:
            try:
                row = self._renderer.render([prompt], [response])[0]
            except TemplateFailure as failure:
                faults.add(Fault.NOT_RENDERED, file, f"row {first_row + number}", str(failure))
            else:
                yield number, row

    def _take(
        self, row: Rendered, file: int, number: int, columns: _Columns, counts: FileCounts, faults: FaultLog
    ) -> None:
        length, limit = len(row.ids), self._spec.max_length
        counts.longest_row = max(counts.longest_row, length)
        if row.control_tokens:
            counts.rows_with_control_tokens += 1
            counts.control_token = counts.control_token or row.control_tokens[0]
        if length > limit:
            if self._spec.truncation == "error":
                faults.add(Fault.OVERLONG, file, f"row {number}", f"{length:,} tokens")
                return
            row = truncate(row, limit, self._spec.truncation)
            counts.rows_truncated += 1
        if not row.num_targets:
            counts.rows_without_target += 1
            return
        counts.largest_id = max(counts.largest_id, *row.ids)
        columns.append(row, file, number)
        counts.rows_usable += 1
        counts.tokens += len(row.ids)
        counts.trained_tokens += row.num_targets

    def _write(self, index: int, columns: _Columns) -> Part | None:
        if not columns.ids:
            return None
        path = self._folder / f"part-{index:06d}.arrow"
        with path.open("wb") as stream:
            with pa.ipc.new_file(stream, PART_SCHEMA) as writer:
                writer.write_batch(columns.record_batch())
            stream.flush()
            os.fsync(stream.fileno())
            return Part(path.name, stream.tell(), len(columns.ids))


def control_tokens_note(counts: FileCounts) -> str | None:
    """What a user should know of control tokens in the rows' texts; None where there are none."""
    if not counts.rows_with_control_tokens:
        return None
    rows = "1 row holds" if counts.rows_with_control_tokens == 1 else f"{counts.rows_with_control_tokens:,} rows hold"
    return (
        f"{rows} control tokens such as {counts.control_token} as text; they are read as plain text "
        "(data.allow_control_tokens=true gives them their meaning)"
    )


def _chunks(texts: list[tuple[int, str, str]]) -> Iterator[list[tuple[int, str, str]]]:
    chunk: list[tuple[int, str, str]] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text[1]) + len(text[2])
        if size >= _ENCODED_AT_ONCE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
