"""Entry of the step before the ranks: tokenise training and validation rows, leave word where the caches are.

A process of its own, so that the supervisor stays small: ``python -m sft_job.prepare RESOLVED_CONFIG``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from sft_job.config.load import load_resolved, run_folder
from sft_job.config.secrets import secrets_hidden
from sft_job.contract import STACK_SIGNAL, STOP_SIGNALS, Env, ExitCode
from sft_job.data.mixture import Rows, named_caches
from sft_job.data.places import write_places
from sft_job.data.prepare import prepare
from sft_job.errors import JobError
from sft_job.model.supported import check_architecture
from sft_job.processes import supervisor_gone
from sft_job.streams import say, settle_streams

REPORT = "prepare.json"
_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """A line now and then; small data is done before the first one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Rows done and rows in all; 0 and 0 while another process does the work."""
        now = time.monotonic()
        if now - self._shown < _SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        if total:
            self._console.print(f"tokenising: {done:,} of {total:,} rows", highlight=False)
        else:
            self._console.print("waiting for another process that tokenises the same rows", highlight=False)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(ExitCode.STOPPED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare one run; the exit code of what happened, its message in the report folder."""
    logging.basicConfig(level=logging.WARNING)
    # As an exception the signal unwinds the building, which then removes its unfinished folder.
    for number in STOP_SIGNALS:
        signal.signal(number, _leave)
    # The supervisor started this process with them blocked, so that one that came early waited until here.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, STACK_SIGNAL))
    reports = Path(os.environ[Env.REPORT_DIR])
    (resolved,) = sys.argv[1:] if arguments is None else arguments
    try:
        config = load_resolved(Path(resolved))
        run = run_folder(config)
        hf_config = check_architecture(config.model)  # before hours of tokenising for a model that cannot be trained
        console = Console()
        train, val = prepare(
            config, run, Progress(console), lambda text: console.print(f"warning: {text}", markup=False)
        )
        refuse_unknown_ids(hf_config, train, val)
        write_places(reports, train, val)
    except JobError as error:
        _leave_word(reports, error.code, str(error))
        return error.code
    except Exception as error:
        _leave_word(reports, ExitCode.BUG, f"preparing the data failed: {type(error).__name__}: {error}")
        say(traceback.format_exc())
        return ExitCode.BUG
    finally:
        if supervisor_gone(os.environ):
            shutil.rmtree(reports, ignore_errors=True)  # nobody reads it, and nobody else removes it
    return ExitCode.DONE


def _leave_word(reports: Path, code: ExitCode, message: str) -> None:
    """Tell the supervisor how it ended; it knows the exit code in any case."""
    with contextlib.suppress(OSError):
        (reports / REPORT).write_text(json.dumps({"code": int(code), "message": message}), encoding="utf-8")


def refuse_unknown_ids(hf_config: Any, *rows: Rows | None) -> None:
    """Refuse rows with ids that the model has no embedding for: on a GPU they end in an assertion that says nothing.

    Raises:
        JobError: exit code 66.
    """
    vocabulary = hf_config.get_text_config().vocab_size
    largest = max(cache.report["largest_id"] for each in rows for cache in named_caches(each).values())
    if largest >= vocabulary:
        raise JobError(
            ExitCode.MODEL,
            f"model.partial_pretrain: the tokenizer gives id {largest}, but the model's vocabulary ends at "
            f"{vocabulary - 1} (vocab_size in config.json)\n    fix: the tokenizer that belongs to this model",
        )


if __name__ == "__main__":
    with secrets_hidden(os.environ):
        code = main()
    settle_streams()
    sys.exit(code)
