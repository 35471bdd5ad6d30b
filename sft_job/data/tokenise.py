"""One piece of text becomes one part of the token cache, an Arrow IPC file. Runs in the worker processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_job.data.columns import Cell, Unreadable, read_texts
from sft_job.data.counts import FileCounts
from sft_job.data.custom_rows import CustomRows, MalformedRowError
from sft_job.data.faults import Fault, FaultLog, RowFault
from sft_job.data.fit import Turns, fit, most_characters
from sft_job.data.message_rows import message_rows
from sft_job.data.messages import MessageRenderer
from sft_job.data.pieces import Piece, Segment
from sft_job.data.rejected import LeftOut
from sft_job.data.render import PromptResponseRenderer, Rendered, TemplateFailure, load_tokenizer
from sft_job.data.spec import CacheSpec
from sft_job.data.tokenizer import vocabulary_size

Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]
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
        hashes: [rows, 2] uint64 of each usable row: rows with the same ids and spans have the same hash.
        counts: by index of the file.
        faults: counts and first examples of the rows that are not trained on.
        left_out: those rows, as ``rejected.CACHED``.
    """

    index: int
    part: Part | None
    lengths: Int32
    targets: Int32
    hashes: UInt64
    counts: dict[int, FileCounts]
    faults: FaultLog
    left_out: pa.Table


class Made(NamedTuple):
    """A row that could be rendered.

    Attributes:
        number: its number in the segment.
        row: its tokens.
        turns: what ``data.truncation=turn`` needs; None where the row has no turns.
        rewritten: an example of JSON in it that is trained on in other words; empty = none.
    """

    number: int
    row: Rendered
    turns: Turns | None = None
    rewritten: str = ""


@dataclass
class _Columns:
    """Usable rows of a piece, column by column."""

    ids: list[Int32] = field(default_factory=list)
    spans: list[Int32] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)

    def append(self, row: Rendered, file: int, number: int) -> None:
        ids, spans = np.array(row.ids, dtype=np.int32), np.array(row.spans, dtype=np.int32).reshape(-1)
        self.ids.append(ids)
        self.spans.append(spans)
        self.hashes.append(_hash(ids, spans))
        self.files.append(file)
        self.rows.append(number)
        self.targets.append(row.num_targets)

    def record_batch(self) -> pa.RecordBatch:
        columns = [_large_list(self.ids), _large_list(self.spans), pa.array(self.files, pa.int32())]
        return pa.record_batch([*columns, pa.array(self.rows, pa.int64())], schema=PART_SCHEMA)


def _hash(ids: Int32, spans: Int32) -> bytes:
    digest = hashlib.blake2b(len(ids).to_bytes(8, "little"), digest_size=16)
    digest.update(ids.data)
    digest.update(spans.data)
    return digest.digest()


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
        self._too_long = Fault.OVERLONG if spec.truncation == "error" else Fault.DROPPED
        tokenizer = load_tokenizer(spec.tokenizer, spec.trust_remote_code)
        self.custom: CustomRows | None = None
        self._messages: MessageRenderer | None = None
        if spec.custom:
            if spec.chat_template:
                tokenizer.chat_template = spec.chat_template
            self.custom = CustomRows(spec.custom, spec.sources, tokenizer, vocabulary_size(spec.tokenizer, tokenizer))
            self.notes = [f"rows come from {spec.custom.name} in {spec.custom.path}"]
            return
        self._most_characters = most_characters(tokenizer.get_vocab(), spec.max_length, spec.truncation)
        options: dict[str, Any] = {
            "chat_template": spec.chat_template,
            "template_kwargs": spec.template_kwargs,
            "allow_control_tokens": spec.allow_control_tokens,
        }
        if spec.messages:
            self._messages = MessageRenderer(tokenizer, **options)
            self.notes = self._messages.notes
        else:
            self._renderer = PromptResponseRenderer(tokenizer, **options)
            self.notes = self._renderer.notes

    def run(self, piece: Piece) -> PieceResult:
        """Tokenise a piece and write its part.

        Raises:
            OSError: the part cannot be written.
        """
        columns, faults = _Columns(), LeftOut()
        counts: dict[int, FileCounts] = {}
        for segment in piece.segments:
            batch = segment.batch()
            of_file = counts.setdefault(segment.file, FileCounts())
            of_file.rows_read += batch.num_rows
            for made in self._rows(segment, batch, faults):
                self._take(made, segment, columns, of_file, faults)
        for gap in piece.gaps:
            counts.setdefault(gap.file, FileCounts()).rows_read += gap.rows
            faults.add_damaged(gap.file, gap.first_row, gap.rows, gap.where, gap.reason)
        for file, kinds in faults.by_file.items():
            counts[file].left_out += kinds
        return PieceResult(
            index=piece.index,
            part=self._write(piece.index, columns),
            lengths=np.array([len(ids) for ids in columns.ids], dtype=np.int32),
            targets=np.array(columns.targets, dtype=np.int32),
            hashes=np.frombuffer(b"".join(columns.hashes), dtype=np.uint64).reshape(-1, 2),
            counts=counts,
            faults=faults.log,
            left_out=faults.table(),
        )

    def _rows(self, segment: Segment, batch: pa.RecordBatch, faults: LeftOut) -> Iterator[Made]:
        """Rows that can be made, with their numbers in the segment."""
        if self._messages:
            yield from self._conversations(self._messages, segment, batch, faults)
            return
        if self.custom is None:
            prompts, responses = (read_texts(batch, names) for names in (self._spec.prompt, self._spec.response))
            yield from self._rendered(prompts, responses, segment.file, segment.first_row, faults)
            return
        for number in range(batch.num_rows):
            try:
                yield Made(number, self.custom.row(segment.first_row + number))
            except MalformedRowError as error:
                faults.add(Fault.MALFORMED, segment.file, segment.first_row + number, str(error))

    def _conversations(
        self, renderer: MessageRenderer, segment: Segment, batch: pa.RecordBatch, faults: LeftOut
    ) -> Iterator[Made]:
        found = message_rows(renderer, batch, self._spec.messages, self._spec.train_on, self._most_characters)
        for number, row, *more in found:
            place = (segment.file, segment.first_row + number)
            if isinstance(row, Rendered):
                yield Made(number, row, *more)  # type: ignore[arg-type]  # turns, rewritten
            elif isinstance(row, int):
                reason = f"{row:,} characters, more than any {self._spec.max_length:,} tokens"
                faults.add(self._too_long, *place, reason)
            else:
                faults.add(row.fault, *place, row.reason)

    def _rendered(
        self, prompts: list[Cell], responses: list[Cell], file: int, first_row: int, faults: LeftOut
    ) -> Iterator[Made]:
        """Rows that can be rendered, with their numbers in the segment."""
        texts: list[tuple[int, str, str]] = []
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if not (isinstance(prompt, str) and isinstance(response, str)):
                unreadable = [cell for cell in (prompt, response) if isinstance(cell, Unreadable)]
                reasons = "; ".join(cell.reason for cell in unreadable)
                faults.add(unreadable[0].fault, file, first_row + number, reasons)
            elif not (prompt or response):
                faults.add(Fault.EMPTY, file, first_row + number, "prompt and response are empty")
            elif self._most_characters is not None and len(prompt) + len(response) > self._most_characters:
                reason = f"{len(prompt) + len(response):,} characters, more than any {self._spec.max_length:,} tokens"
                faults.add(self._too_long, file, first_row + number, reason)
            else:
                texts.append((number, prompt, response))
        for chunk in _chunks(texts):
            try:
                rows = self._renderer.render([prompt for _, prompt, _ in chunk], [answer for *_, answer in chunk])
            except TemplateFailure:
                yield from self._one_by_one(chunk, file, first_row, faults)
            else:
                yield from (Made(number, row) for (number, *_), row in zip(chunk, rows, strict=True))

    def _one_by_one(
        self, chunk: list[tuple[int, str, str]], file: int, first_row: int, faults: LeftOut
    ) -> Iterator[Made]:
        for number, prompt, response in chunk:
            try:
                row = self._renderer.render([prompt], [response])[0]
            except TemplateFailure as failure:
                faults.add(Fault.NOT_RENDERED, file, first_row + number, str(failure))
            else:
                yield Made(number, row)

    def _take(self, made: Made, segment: Segment, columns: _Columns, counts: FileCounts, faults: LeftOut) -> None:
        row, number = made.row, segment.first_row + made.number
        length, limit, how = len(row.ids), self._spec.max_length, self._spec.truncation
        counts.saw_length(length)
        if row.control_tokens:
            counts.rows_with_control_tokens += 1
            counts.control_token = counts.control_token or row.control_tokens[0]
        if made.rewritten:
            counts.rows_with_rewritten_json += 1
            counts.rewritten_json = counts.rewritten_json or made.rewritten
        counts.rows_with_hidden_thoughts += row.hides_thoughts
        if length > limit:
            try:
                shorter = fit(row, limit, how, made.turns)
            except RowFault as error:
                faults.add(error.fault, segment.file, number, f"without its oldest turns: {error}")
                return
            if shorter is None:
                faults.add(self._too_long, segment.file, number, f"{length:,} tokens")
                return
            row = shorter
            counts.rows_truncated += 1
        if not row.num_targets:
            cut = f" is left of {length:,} tokens cut to {limit:,} ({how})" if length > limit else ""
            faults.add(Fault.WITHOUT_TARGET, segment.file, number, f"no token to train on{cut}")
            return
        counts.largest_id = max(counts.largest_id, *row.ids)
        columns.append(row, segment.file, number)
        counts.rows_usable += 1
        counts.rows_of_one_target += row.num_targets == 1
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
