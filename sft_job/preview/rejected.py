"""One row of the files by itself: where it is, and why training does not take it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sft_job.contract import ExitCode
from sft_job.data.pieces import Piece, Segment, batch_stream, names_in, numbered_segment
from sft_job.data.spec import CacheSpec
from sft_job.data.tokenise import PieceTokeniser
from sft_job.errors import Problem, ProblemsError

_OPTION = "--row"
_NAMED = 5


def find_file(text: str, files: Sequence[Path]) -> tuple[int, int]:
    """The file (its index) and the row number that ``FILE:ROW`` means.

    Args:
        text: what the user gave; FILE is a path, the end of one, or a name.
        files: files to choose from.

    Raises:
        ProblemsError: exit 2, where it is not of this form; 65, where no file or several fit.
    """
    name, _, digits = text.rpartition(":")
    if not name or not digits.isdecimal():
        rule = "must be FILE:ROW, with the row's number in the file from 0, or one number: the row's place in the cache"
        raise ProblemsError([Problem(ExitCode.CONFIG, _OPTION, rule, _example(files), text)])
    wanted = Path(name).expanduser()
    # A file that is listed several times has several indices; its first one serves.
    found = {file: files.index(file) for file in files if _ends_with(file, wanted)}
    if len(found) == 1:
        return next(iter(found.values())), int(digits)
    listed = [str(file) for file in (found or dict.fromkeys(files))]
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    rule = f"{'several files end like this' if found else 'no such file among'}: {', '.join(listed[:_NAMED])}{more}"
    raise ProblemsError([Problem(ExitCode.DATA, _OPTION, rule, _example(list(found) or files), text)])


def _ends_with(file: Path, wanted: Path) -> bool:
    parts = tuple(part for part in wanted.parts if part != ".")
    return file == wanted or file.parts[-len(parts) :] == parts or file.absolute() == wanted.absolute()


def _example(files: Sequence[Path]) -> str:
    return f"for example {_OPTION} {files[0].name}:0"


def no_such_row(text: str, subject: str, rows: int) -> ProblemsError:
    """The error for a number past the end."""
    rule = f"{subject} has {rows:,} rows, numbered from 0 to {rows - 1:,}" if rows else f"{subject} has no rows"
    return ProblemsError([Problem(ExitCode.DATA, _OPTION, rule, value=text)])


def reject_reason(spec: CacheSpec, file: int, number: int) -> str | None:
    """Why a row is not trained, found by rendering it alone; None where nothing is wrong with it.

    Args:
        spec: the split.
        file: index of its file.
        number: its number in the file.

    Raises:
        ProblemsError: exit 65, where the file has no such row or cannot be read; 66 or 2 for tokenizer and template.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokeniser = PieceTokeniser(spec, Path(folder))
        if tokeniser.custom is None:
            segment = _segment(spec, file, number)
        elif number < len(tokeniser.custom):
            segment = numbered_segment(number, 1)
        else:
            raise no_such_row(str(number), str(spec.origins[file]), len(tokeniser.custom))
        piece = Piece(0)
        piece.append(segment)
        result = tokeniser.run(piece)
    reasons = [f"{row['kind']}: {row['reason']}" for row in result.left_out.to_pylist()]
    return "; ".join(reasons) or None


def _segment(spec: CacheSpec, file: int, number: int) -> Segment:
    """The row's cells, read from its row group."""
    path = spec.sources[file]
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            names = names_in(parquet.schema_arrow, spec.columns)
            if number >= parquet.metadata.num_rows:
                raise no_such_row(str(number), str(spec.origins[file]), parquet.metadata.num_rows)
            first, group = 0, 0
            while number >= first + parquet.metadata.row_group(group).num_rows:
                first += parquet.metadata.row_group(group).num_rows
                group += 1
            for batch in parquet.iter_batches(row_groups=[group], columns=names):
                if number < first + batch.num_rows:
                    return Segment(file, number, batch_stream(batch.slice(number - first, 1)), 1)
                first += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        rule = f"cannot be read: {' '.join(str(error).split())[:200]}"
        raise ProblemsError([Problem(ExitCode.DATA, f"{spec.origins[file]}:{number}", rule)]) from error
    raise AssertionError("a row group has fewer rows than its footer says")
