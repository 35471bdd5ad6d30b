"""Builds a token cache in a folder: reads, tokenises, writes parts, arrays and manifest. ``cache.py`` publishes it."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sft_job.contract import ExitCode
from sft_job.data.counts import FileCounts, control_tokens_note, hidden_thoughts_note
from sft_job.data.duplicates import later_duplicates
from sft_job.data.faults import FaultLog
from sft_job.data.files import FileFooter, footer_problems, read_footers
from sft_job.data.footer import has_checksums
from sft_job.data.pieces import Piece, numbered_pieces, read_pieces
from sft_job.data.rejected import CACHED, TableWriter
from sft_job.data.spec import CacheSpec
from sft_job.data.tokenise import Part, PieceResult, PieceTokeniser
from sft_job.data.workers import tokenise_here, tokenise_in_processes
from sft_job.errors import Problem, ProblemsError, raise_problems

FORMAT = 3
MANIFEST = "manifest.json"
LENGTHS = "lengths.int32"
TARGETS = "targets.int32"
HASHES = "hashes.uint64"
REJECTED = "rejected.parquet"
# Below this much text one process is done before others have started.
_SMALL = 2_000_000
_FEW_ROWS = 2_000
_MANY_SET_ASIDE = 0.05
_THREADS = 32

Progress = Callable[[int, int], None]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that may give other ids for the same text; a cache is used with these versions only."""
    return {name: version(name) for name in ("tokenizers", "transformers")}


@dataclass
class Outcome:
    """What the pieces gave, in their order.

    Attributes:
        parts: files with their rows.
        counts: by index of the file.
        faults: rows that are not trained on.
    """

    parts: list[Part] = field(default_factory=list)
    counts: dict[int, FileCounts] = field(default_factory=dict)
    faults: FaultLog = field(default_factory=FaultLog)

    def add(self, result: PieceResult) -> None:
        """Append a piece."""
        self.parts += [result.part] if result.part else []
        self.faults.extend(result.faults)
        for file, counts in result.counts.items():
            self.counts.setdefault(file, FileCounts()).add(counts)

    def total(self) -> FileCounts:
        """Counts over all files."""
        total = FileCounts()
        for counts in self.counts.values():
            total.add(counts)
        return total


def build(spec: CacheSpec, folder: Path, fingerprint: str, workers: int, progress: Progress | None) -> None:
    """Fill an empty folder with the cache of ``spec``; the manifest is written last.

    Rows that cannot be used are counted and listed; whether the run goes on without them is not decided here.

    Raises:
        ProblemsError: everything that is wrong with the files as such, or no row to read (exit 65); the tokenizer
            (66); the template (2).
        JobError: exit 137, where a worker process was killed.
        OSError: the folder cannot be written.
    """
    reading = start_reading(spec, folder, workers)
    outcome = Outcome()
    done = 0
    with (
        closing(reading.results) as results,
        (folder / LENGTHS).open("wb") as lengths,
        (folder / TARGETS).open("wb") as targets,
        (folder / HASHES).open("wb") as hashes,
        TableWriter(folder / REJECTED, CACHED) as rejected,
    ):
        for result in results:
            outcome.add(result)
            lengths.write(result.lengths.tobytes())
            targets.write(result.targets.tobytes())
            hashes.write(result.hashes.tobytes())
            rejected.write(result.left_out)
            done += sum(counts.rows_read for counts in result.counts.values())
            if progress:
                progress(done, reading.rows)
        for stream in (lengths, targets, hashes):
            stream.flush()
            os.fsync(stream.fileno())
    _count_duplicates(folder, outcome)
    _write_manifest(folder, spec, fingerprint, outcome, reading.notes)


@dataclass(frozen=True)
class Reading:
    """A data set on its way through the tokenizer.

    Attributes:
        rows: rows that are read in all.
        notes: what was found out about template, tokenizer or class.
        results: pieces, as they get done; to be closed.
    """

    rows: int
    notes: list[str]
    results: Generator[PieceResult, None, None]


def start_reading(spec: CacheSpec, folder: Path, workers: int) -> Reading:
    """Look at all footers, load the tokenizer, and begin to tokenise into a folder.

    Raises:
        ProblemsError: as ``build`` says.
    """
    footers: list[FileFooter] = []
    if spec.custom is None:
        footers = read_footers(spec.sources, spec.columns, spec.files_option)
        raise_problems(footer_problems(spec.files, footers, spec.files_option))
    tokeniser = PieceTokeniser(spec, folder)
    total_rows = sum(footer.rows for footer in footers) if tokeniser.custom is None else len(tokeniser.custom)
    max_rows = total_rows if spec.max_samples < 0 else min(total_rows, spec.max_samples)
    if not max_rows:
        raise ProblemsError([_no_rows(spec)])
    if spec.custom is None:
        pieces = read_pieces(spec.sources, footers, spec.columns, max_rows)
        small = sum(footer.text_bytes for footer in footers) < _SMALL
    else:
        pieces, small = numbered_pieces(max_rows), max_rows < _FEW_ROWS
    results = _results(spec, tokeniser, folder, pieces, 1 if small else workers)
    return Reading(max_rows, tokeniser.notes, results)


def _results(
    spec: CacheSpec,
    tokeniser: PieceTokeniser,
    folder: Path,
    pieces: Iterable[Piece],
    workers: int,
) -> Generator[PieceResult, None, None]:
    # A daemonic process may have no children of its own.
    if workers <= 1 or multiprocessing.current_process().daemon:
        return tokenise_here(tokeniser, pieces)
    return tokenise_in_processes(spec, folder, pieces, workers)


def _no_rows(spec: CacheSpec) -> Problem:
    if spec.custom and spec.max_samples != 0:
        rule = f"{spec.custom.name} gives no rows: its length is 0"
        return Problem(ExitCode.DATA, spec.files_option, rule, value=str(spec.custom.path))
    subject = f"data.{spec.split}_max_samples"
    return Problem(ExitCode.DATA, subject, "leaves no row", "a number of rows, or -1 for all", spec.max_samples)


def _count_duplicates(folder: Path, outcome: Outcome) -> None:
    """Note in each file's counts how many of its rows equal an earlier one of any file."""
    files = sorted(outcome.counts)
    # Rows are in the order of the files: [files], the number of the first row that lies behind each.
    ends = np.cumsum([outcome.counts[file].rows_usable for file in files])
    repeated = later_duplicates(folder / HASHES, outcome.total().rows_usable)
    found = np.bincount(np.searchsorted(ends, repeated, side="right"), minlength=len(files))
    for file, count in zip(files, found, strict=True):
        outcome.counts[file].duplicates = int(count)


def _write_manifest(folder: Path, spec: CacheSpec, fingerprint: str, outcome: Outcome, notes: list[str]) -> None:
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "versions": library_versions(),
        "rows": outcome.total().rows_usable,
        "parts": [part._asdict() for part in outcome.parts],
        "rejected_bytes": (folder / REJECTED).stat().st_size,
        "faults": outcome.faults.to_json(),
        "files": [str(file) for file in spec.origins],
        "report": _report(spec, outcome, notes),
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _report(spec: CacheSpec, outcome: Outcome, notes: list[str]) -> dict[str, Any]:
    total = outcome.total()
    repeated = sorted({str(file) for file in spec.files if spec.files.count(file) > 1}) if _repeats(spec) else []
    warnings = [
        f"{file} is listed more than once in {spec.files_option}: its rows count each time" for file in repeated
    ]
    if note := control_tokens_note(total):
        warnings.append(f"{spec.files_option}: {note}")
    if note := hidden_thoughts_note(total):
        warnings.append(f"{spec.files_option}: {note}")
    aside = total.rows_without_target
    if aside > _MANY_SET_ASIDE * total.rows_read:
        share = 100 * aside / total.rows_read
        warnings.append(
            f"{aside:,} of {total.rows_read:,} rows ({share:.1f} %) of {spec.files_option} are set aside: within "
            f"data.max_length = {spec.max_length:,} they have no token to train on"
        )
    return {
        **total.report(),
        # By the index of the file: the same cache serves equal files at other paths.
        "files": [
            {**outcome.counts.get(index, FileCounts()).report(), "checksums": checksums}
            for index, checksums in enumerate(_checksums(spec))
        ],
        "notes": [*notes, *_notes(spec, total)],
        "warnings": warnings,
    }


def _notes(spec: CacheSpec, total: FileCounts) -> list[str]:
    notes: list[str] = []
    of = f"of {total.rows_read:,} rows of {spec.files_option}"
    if total.rows_dropped:
        notes.append(
            f"{total.rows_dropped:,} {of} are left out: longer than {spec.max_length:,} tokens "
            f"(data.truncation = {spec.truncation})"
        )
    if total.rows_with_rewritten_json:
        notes.append(
            f"{total.rows_with_rewritten_json:,} {of} hold JSON that is read and written again in other words: "
            f"{total.rewritten_json}"
        )
    if total.rows_of_one_target:
        notes.append(
            f"{total.rows_of_one_target:,} {of} train one token: where the response is empty, the end of the turn"
        )
    return notes


def _checksums(spec: CacheSpec) -> list[bool | None]:
    """Whether each file's pages carry checksums; None where the user's class reads it."""
    if spec.custom:
        return [None]
    names = {column.name for column in spec.columns}
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda file: has_checksums(file, names), spec.sources))


def _repeats(spec: CacheSpec) -> bool:
    return len(set(spec.files)) < len(spec.files)


def unwritable(folder: Path, error: OSError) -> ProblemsError:
    """The error for a cache folder that cannot be written: exit 73."""
    rule = f"the token cache cannot be written: {error.strerror or error}"
    fix = "free space or name another folder: data.cache_dir"
    return ProblemsError([Problem(ExitCode.CANNOT_CREATE, "data.cache_dir", rule, fix, str(folder))])
