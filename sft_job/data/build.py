"""Builds a token cache in a folder: reads, tokenises, writes parts, arrays and manifest. ``cache.py`` publishes it."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sft_job.contract import ExitCode
from sft_job.data.faults import FaultLog
from sft_job.data.files import FileFooter, footer_problems, read_footers
from sft_job.data.pieces import Piece, numbered_pieces, read_pieces
from sft_job.data.spec import CacheSpec
from sft_job.data.tokenise import FileCounts, Part, PieceResult, PieceTokeniser, control_tokens_note
from sft_job.data.workers import tokenise_here, tokenise_in_processes
from sft_job.errors import Problem, ProblemsError, raise_problems

FORMAT = 2
MANIFEST = "manifest.json"
LENGTHS = "lengths.int32"
TARGETS = "targets.int32"
# Below this much text one process is done before others have started.
_SMALL = 2_000_000
_FEW_ROWS = 2_000
_MANY_SET_ASIDE = 0.05

Progress = Callable[[int, int], None]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that may give other ids for the same text; a cache is used with these versions only."""
    return {name: version(name) for name in ("tokenizers", "transformers")}


@dataclass
class _Outcome:
    """What the pieces gave, in their order."""

    parts: list[Part] = field(default_factory=list)
    counts: dict[int, FileCounts] = field(default_factory=dict)
    faults: FaultLog = field(default_factory=FaultLog)

    def add(self, result: PieceResult) -> None:
        self.parts += [result.part] if result.part else []
        self.faults.extend(result.faults)
        for file, counts in result.counts.items():
            self.counts.setdefault(file, FileCounts()).add(counts)

    def total(self) -> FileCounts:
        total = FileCounts()
        for counts in self.counts.values():
            total.add(counts)
        return total


def build(spec: CacheSpec, folder: Path, fingerprint: str, workers: int, progress: Progress | None) -> None:
    """Fill an empty folder with the cache of ``spec``; the manifest is written last.

    Raises:
        ProblemsError: everything that is wrong with files and rows, after all of them were looked at (exit 65); the
            tokenizer (66); the template (2).
        JobError: exit 137, where a worker process was killed.
        OSError: the folder cannot be written.
    """
    footers: list[FileFooter] = []
    if spec.custom is None:
        footers = read_footers(spec.sources, spec.columns, spec.files_option)
        raise_problems(footer_problems(spec.files, footers, spec.files_option))
    tokeniser = PieceTokeniser(spec, folder)
    total_rows = sum(footer.rows for footer in footers) if tokeniser.custom is None else len(tokeniser.custom)
    max_rows = total_rows if spec.max_samples < 0 else min(total_rows, spec.max_samples)
    outcome, unread = _Outcome(), FaultLog()
    if spec.custom is None:
        pieces = read_pieces(spec.sources, footers, spec.columns, max_rows, unread)
        small = sum(footer.text_bytes for footer in footers) < _SMALL
    else:
        pieces, small = numbered_pieces(max_rows), max_rows < _FEW_ROWS
    results = _results(spec, tokeniser, folder, pieces, 1 if small else workers)
    done = 0
    with closing(results), (folder / LENGTHS).open("wb") as lengths, (folder / TARGETS).open("wb") as targets:
        for result in results:
            outcome.add(result)
            lengths.write(result.lengths.tobytes())
            targets.write(result.targets.tobytes())
            done += sum(counts.rows_read for counts in result.counts.values())
            if progress:
                progress(done, max_rows)
        for stream in (lengths, targets):
            stream.flush()
            os.fsync(stream.fileno())
    outcome.faults.extend(unread)
    raise_problems(_problems(spec, outcome, max_rows))
    _write_manifest(folder, spec, fingerprint, outcome, tokeniser.notes)


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


def _problems(spec: CacheSpec, outcome: _Outcome, rows: int) -> list[Problem]:
    problems = outcome.faults.problems(spec.origins, spec.files_option, rows, spec.max_length)
    if problems or outcome.parts:
        return problems
    if not rows and spec.custom and spec.max_samples != 0:
        rule = f"{spec.custom.name} gives no rows: its length is 0"
        return [Problem(ExitCode.DATA, spec.files_option, rule, value=str(spec.custom.path))]
    if not rows:
        subject = f"data.{spec.split}_max_samples"
        return [Problem(ExitCode.DATA, subject, "leaves no row", "a number of rows, or -1 for all", spec.max_samples)]
    rule = f"none of {rows:,} rows has a token to train on within data.max_length = {spec.max_length:,}"
    fix = "raise data.max_length, or data.truncation=left, which keeps the responses' ends"
    return [Problem(ExitCode.DATA, spec.files_option, rule, fix)]


def _write_manifest(folder: Path, spec: CacheSpec, fingerprint: str, outcome: _Outcome, notes: list[str]) -> None:
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "versions": library_versions(),
        "rows": outcome.total().rows_usable,
        "parts": [part._asdict() for part in outcome.parts],
        "files": [str(file) for file in spec.origins],
        "report": _report(spec, outcome, notes),
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def _report(spec: CacheSpec, outcome: _Outcome, notes: list[str]) -> dict[str, Any]:
    total = outcome.total()
    repeated = sorted({str(file) for file in spec.files if spec.files.count(file) > 1}) if _repeats(spec) else []
    warnings = [
        f"{file} is listed more than once in {spec.files_option}: its rows count each time" for file in repeated
    ]
    if note := control_tokens_note(total):
        warnings.append(f"{spec.files_option}: {note}")
    aside = total.rows_without_target
    if aside > _MANY_SET_ASIDE * total.rows_read:
        share = 100 * aside / total.rows_read
        warnings.append(
            f"{aside:,} of {total.rows_read:,} rows ({share:.1f} %) of {spec.files_option} are set aside: within "
            f"data.max_length = {spec.max_length:,} they have no token to train on"
        )
    return {
        **asdict(total),
        # By the index of the file: the same cache serves equal files at other paths.
        "files": [asdict(outcome.counts.get(index, FileCounts())) for index in range(len(spec.origins))],
        "notes": notes,
        "warnings": warnings,
    }


def _repeats(spec: CacheSpec) -> bool:
    return len(set(spec.files)) < len(spec.files)


def unwritable(folder: Path, error: OSError) -> ProblemsError:
    """The error for a cache folder that cannot be written: exit 73."""
    rule = f"the token cache cannot be written: {error.strerror or error}"
    fix = "free space or name another folder: data.cache_dir"
    return ProblemsError([Problem(ExitCode.CANNOT_CREATE, "data.cache_dir", rule, fix, str(folder))])
